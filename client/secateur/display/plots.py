"""Plots by matplotlib, which is imported when it is needed. Each draws on axes and shows nothing.

Colours are of Okabe and Ito, and the map is cividis: all can be told apart by people who do not see
every colour. Any number of tensors is drawn as a few artists.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from secateur.display.extra import extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE = "#0072B2", "#D55E00"
_COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_MOST_NAMES, _LONGEST_NAME = 40, 40
_HEIGHT_OF_A_NAME = 0.22  # inches


def new_axes(columns: int = 1, names: int = 0) -> list["Axes"]:
    """Returns the axes of a new figure, side by side.

    Args:
        columns: How many.
        names: How many names their vertical axes have.

    Raises:
        SecateurError: matplotlib is not installed.
    """
    pyplot = extra("plot", "matplotlib.pyplot")
    height = max(3.6, 1.2 + _HEIGHT_OF_A_NAME * min(names, _MOST_NAMES))
    _, axes = pyplot.subplots(
        1, columns, figsize=(7 * columns, height), layout="constrained", squeeze=False
    )
    return list(axes[0])


def bars(ax: "Axes | None", sparsities: Mapping[str, float], whole: float) -> "Axes":
    """Draws the sparsity of each tensor, the first on top, and that of all as a line."""
    ax = ax or new_axes(names=len(sparsities))[0]
    places = np.arange(len(sparsities))
    values = list(sparsities.values())
    if len(values) <= _MOST_NAMES:
        ax.barh(places, values, color=BLUE)
    else:  # one artist, with bars that touch each other
        edges = np.arange(len(values) + 1) - 0.5
        ax.stairs(values, edges, orientation="horizontal", fill=True, color=BLUE)
    ax.axvline(whole, color=ORANGE, linestyle="--", label=f"all: {whole:.1%}")
    _name_rows(ax, list(sparsities))
    ax.set(xlim=(0, 1), ylim=(max(1, len(values)) - 0.5, -0.5), xlabel="sparsity")
    _percent(ax.xaxis)
    ax.legend(loc="best")
    return ax


def heat_map(
    ax: "Axes | None", names: Sequence[str], columns: Sequence[str], shares: npt.ArrayLike
) -> "Axes":
    """Draws a share in [0, 1] for each name and column, with a scale."""
    ax = ax or new_axes(names=len(names))[0]
    image = ax.imshow(
        np.asarray(shares, float).reshape(len(names), len(columns)),
        aspect="auto",
        cmap="cividis",
        vmin=0,
        vmax=1,
    )
    _name_rows(ax, names)
    shown = _some(len(columns), 12)
    ax.set_xticks(shown, [columns[place] for place in shown])
    ax.set(xlabel="amount")
    scale = ax.figure.colorbar(image, ax=ax, label="norm removed")
    _percent(scale.ax.yaxis)
    return ax


def curves(
    ax: "Axes | None",
    sparsities: Sequence[float],
    lines: Mapping[str, Sequence[float]],
) -> "Axes":
    """Draws values against sparsities: a line and a kind of marker for each name."""
    ax = ax or new_axes()[0]
    order = np.argsort(sparsities, kind="stable")
    for (name, values), color, marker in zip(
        lines.items(), cycle(_COLOURS), cycle(_MARKERS), strict=False
    ):
        x, y = np.asarray(sparsities)[order], np.asarray(values)[order]
        ax.plot(x, y, color=color, marker=marker, label=name)
    ax.set(xlabel="sparsity", ylabel=next(iter(lines)) if len(lines) == 1 else "")
    ax.yaxis.label.set_parse_math(False)
    _percent(ax.xaxis)
    if len(lines) > 1:
        for text in ax.legend(loc="best").get_texts():
            text.set_parse_math(False)
    return ax


def _name_rows(ax: "Axes", names: Sequence[str]) -> None:
    """Labels rows with names; of very many, with some."""
    shown = _some(len(names), _MOST_NAMES)
    # A dollar sign in a name does not begin mathematics.
    ax.set_yticks(shown, [_cut(names[place]) for place in shown], parse_math=False)


def _some(count: int, most: int) -> list[int]:
    """At most `most` places below `count`, at equal distances."""
    return list(range(0, count, -(-count // most) or 1))


def _cut(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"


def _percent(axis: Any) -> None:
    axis.set_major_formatter(extra("plot", "matplotlib.ticker").PercentFormatter(1))
