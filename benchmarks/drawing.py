"""Draws time over parameters, both axes logarithmic, as an SVG."""

import math
from collections.abc import Sequence
from typing import Any

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 400, 64, 110, 24, 48
PARAMETERS, SECONDS = (6, 9), (-3, 2)  # powers of ten

Point = tuple[float, float]


def draw(sizes: Sequence[dict[str, Any]], growth: Sequence[dict[str, Any]]) -> str:
    """The curves of torch and of secateur, and that of a raw upload.

    sizes: of against_torch.  growth: of shapes; larger models, which torch has no memory for.
    """
    more = [case for case in growth if case["parameters"] > sizes[-1]["parameters"]]
    lines = {
        "torch": [(s["parameters"], s["torch"]["median"]) for s in sizes],
        "secateur": [
            *((s["parameters"], s["secateur"]["median"]) for s in sizes),
            *((case["parameters"], case["seconds"]) for case in more),
        ],
        "raw upload": [
            *((s["parameters"], s["raw_upload_median"]) for s in sizes),
            *((case["parameters"], case["raw_upload"]) for case in more),
        ],
    }
    colours = ("#b5482e", "#2e7d4f", "#888888")
    curves = [_curve(*line, colour) for line, colour in zip(lines.items(), colours, strict=True)]
    return "\n".join([_frame(), *curves, "</svg>", ""])


def _place(point: Point) -> Point:
    """Where parameters and seconds are in the picture."""
    x = (math.log10(point[0]) - PARAMETERS[0]) / (PARAMETERS[1] - PARAMETERS[0])
    y = (math.log10(point[1]) - SECONDS[0]) / (SECONDS[1] - SECONDS[0])
    return LEFT + x * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y * (HEIGHT - TOP - BOTTOM)


def _frame() -> str:
    """The head of the file, and a grid of powers of ten."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13" fill="#555555">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    for power, name in zip(range(PARAMETERS[0], PARAMETERS[1] + 1), _counts(), strict=True):
        (x, low), (_, high) = (_place((10**power, 10.0**end)) for end in SECONDS)
        parts.append(f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="#dddddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{low + 18:.1f}" text-anchor="middle">{name}</text>')
    for power in range(SECONDS[0], SECONDS[1] + 1):
        (left, y), (right, _) = (_place((10**end, 10.0**power)) for end in PARAMETERS)
        parts.append(f'<path d="M{left:.1f} {y:.1f}H{right:.1f}" stroke="#dddddd"/>')
        name = f"{10.0**power:g} s"
        parts.append(f'<text x="{left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{name}</text>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 8}">parameters, fp32; global L1, half</text>')
    return "\n".join(parts)


def _counts() -> tuple[str, ...]:
    return "1 M", "10 M", "100 M", "1 G"


def _curve(name: str, points: Sequence[Point], colour: str) -> str:
    placed = [_place(point) for point in points]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in placed)
    x, y = placed[-1]
    return (
        f'<g fill="{colour}"><path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
        f'{dots}<text x="{x + 9:.1f}" y="{y + 4:.1f}">{name}</text></g>'
    )
