"""A report as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from secateur.tables import Table, listed

if TYPE_CHECKING:
    from secateur.report import Choice, Report, TensorReport


def table_of(report: Report) -> Table:
    """Returns a row for each tensor, and lines on rules, coverage and warnings."""
    lines = []
    for number, choices in enumerate(report.rules, 1):
        lines += [f"rule {number}{line}" for line in _outcomes(choices)]
    if report.coverage.uncovered_tensors:
        lines.append(str(report.coverage))
    if report.shrinkage:
        lines.append(str(report.shrinkage))
    below = (*lines, *map(str, report.warnings))
    return Table(_rows(report), left=3, below=below, has_total=True)


def _rows(report: Report) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("tensor", "shape", "dtype", "bytes", "zeros", "total", "sparsity", "zero slices")
    ]
    for name, tensor in report.tensors.items():
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        slices = " ".join(map("{}/{}".format, tensor.zero_slices, tensor.shape))
        name = " = ".join((name, *tensor.aliases))
        rows.append((name, shape, tensor.dtype, *_counts(tensor.bytes, tensor), slices))
    total_bytes = sum(tensor.bytes for tensor in report.tensors.values())
    rows.append(("total", "", "", *_counts(total_bytes, report), ""))
    patterns = ["patterns", *map(telling_patterns, report.tensors.values()), ""]
    if any(patterns[1:]):
        return [(*row, cell) for row, cell in zip(rows, patterns, strict=True)]
    return rows


def telling_patterns(tensor: TensorReport) -> str:
    """Returns patterns of two whole groups that keep at most half, and follow from no others."""
    # 3:4 of 3 input channels says nothing, 13:16 is chance, 0:16 is a tensor of zeros, and a tensor
    # with 2:4 has 4:8 too.
    size = tensor.shape[:2][-1] if tensor.shape else 0
    pairs = [tuple(map(int, pattern.split(":"))) for pattern in tensor.patterns]
    pairs = [(n, m) for n, m in pairs if 0 < 2 * n <= m and 2 * m <= size]
    follows = {
        (n, m)
        for n, m in pairs
        for other, of in pairs
        if (of > m and other <= n) or (of < m and 0 < other * (m // of) <= n)
    }
    return " ".join(f"{n}:{m}" for n, m in pairs if (n, m) not in follows)


def _outcomes(choices: Sequence[Choice]) -> list[str]:
    """Lines on a rule; the choices whose amount was met exactly share the first."""
    if len(choices) == 1:
        return [f": {_outcome(choices[0])}"]
    others = [c for c in choices if c.requested != c.pruned or c.bounds]
    met = [c for c in choices if c.requested == c.pruned and not c.bounds]
    if len(met) < 2:
        others, met = list(choices), []
    lines = [f" ({listed(choice.tensors, 1)}): {_outcome(choice)}" for choice in others]
    return [_total(met), *lines] if met else lines


def _total(choices: list[Choice]) -> str:
    """A line on choices whose amount was met exactly."""
    tensors = sum(len(choice.tensors) for choice in choices)
    sets = f" in {len(choices):,} sets" if tensors > len(choices) else ""
    counts = (sum(choice.requested for choice in choices), sum(c.candidates for c in choices))
    asked = "{:,} of {:,} units asked for".format(*counts)
    return f" ({tensors:,} tensors{sets}): {asked}, {counts[0]:,} pruned"


def _outcome(choice: Choice) -> str:
    """A line on one choice."""
    parts = [
        f"{choice.requested:,} of {choice.candidates:,} units asked for",
        f"{choice.pruned:,} pruned",
    ]
    if choice.threshold is not None:
        parts.append(f"threshold {choice.threshold:.4g}")
    if choice.ties > 1:
        parts.append(f"ties {choice.ties_pruned:,} of {choice.ties:,}")
    bounds = ", ".join(f"{bound.tensor} {bound.rail}" for bound in choice.bounds)
    return ", ".join(parts) + (f"; bounds: {bounds}" if bounds else "")


def _counts(size: int, counted: TensorReport | Report) -> tuple[str, ...]:
    numbers = (f"{number:,}" for number in (size, counted.zeros, counted.total))
    return (*numbers, f"{counted.sparsity:.2%}")
