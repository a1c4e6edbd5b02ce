"""The page of a comparison."""

from collections.abc import Iterator
from typing import Any

from secateur.comparison import Comparison, Pair
from secateur.page.details import encode_details
from secateur.page.reports import thresholds
from secateur.page.views import Cell, Column, Frame, Page, Table, Total, count, shape, share, size

# Dots of a chart; more would hide each other.
_MOST_DOTS = 1000


def comparison_page(comparison: Comparison, title: str) -> Page:
    """Makes the page of a comparison: two reports, side by side."""
    a, b = comparison.labels
    return Page(
        title=title,
        subtitle=f"{a} beside {b}",
        totals=list(_totals(comparison)),
        warnings=list(_warnings(comparison)),
        charts=list(_charts(comparison)),
        tables=[_tensors(comparison)],
        details=_details(comparison),
    )


def _totals(comparison: Comparison) -> Iterator[Total]:
    reports = comparison.a, comparison.b
    figures = {
        "sparsity": [share(report.zeros, report.total) for report in reports],
        "zeros": [count(report.zeros) for report in reports],
        "parameters": [count(report.total) for report in reports],
        "bytes": [size(sum(of.bytes for of in report.tensors.values())) for report in reports],
    }
    for label, both in figures.items():
        named = zip(both, comparison.labels, strict=True)
        yield Total(label, "\n".join(f"{figure} {name}" for figure, name in named))


def _warnings(comparison: Comparison) -> Iterator[str]:
    only = comparison.only_in_a, comparison.only_in_b
    for label, names in zip(comparison.labels, only, strict=True):
        if names:
            yield f"{len(names):,} tensors are only in {label}; search the table for them."


def _tensors(comparison: Comparison) -> Table:
    a, b = comparison.labels
    columns = (
        Column(f"sparsity, {a}", "share", group=(3, 5)),
        Column(f"sparsity, {b}", "share", group=(4, 6), hue=1),
        Column("difference", "difference"),
        *(Column(f"zeros, {label}", "count", True, "sum") for label in (a, b)),
        *(Column(f"parameters, {label}", "count", True, "sum") for label in (a, b)),
        *(Column(f"bytes, {label}", "count", True, "sum") for label in (a, b)),
        Column("shape", "text", True),
    )
    rows = [list(_cells(pair, comparison.labels)) for pair in comparison.tensors.values()]
    note = "The difference is in percentage points."
    frame, names = Frame("", rows), list(comparison.tensors)
    return Table("Tensors", "tensor", columns, names, [frame], is_grouped=True, note=note)


def _cells(pair: Pair, labels: tuple[str, str]) -> Iterator[Cell]:
    a, b = pair
    yield from (None if tensor is None else tensor.sparsity for tensor in pair)
    yield None if a is None or b is None else b.sparsity - a.sparsity
    for name in ("zeros", "total", "bytes"):
        yield from (None if tensor is None else getattr(tensor, name) for tensor in pair)
    yield _shapes(pair, labels)


def _shapes(pair: Pair, labels: tuple[str, str]) -> str:
    if pair.a is None or pair.b is None:
        only = labels[pair.a is None]
        return f"only in {only}: {shape((pair.a or pair.b).shape)}"  # type: ignore[union-attr]
    if pair.a.shape == pair.b.shape:
        return shape(pair.a.shape)
    return f"{shape(pair.a.shape)} → {shape(pair.b.shape)}"


def _charts(comparison: Comparison) -> Iterator[dict[str, Any]]:
    both = [
        {"name": name, "a": pair.a.sparsity, "b": pair.b.sparsity, "total": pair.a.total}
        for name, pair in comparison.tensors.items()
        if pair.a is not None and pair.b is not None
    ]
    if len(both) > 1:
        both.sort(key=lambda dot: -dot["total"])  # type: ignore[operator]
        shown = both[:_MOST_DOTS]
        note = (
            f"Sparsity of {len(shown):,} tensors, a dot each: larger ones have more parameters. "
            f"Those above the line are sparser in {comparison.labels[1]}."
        )
        chart = {"kind": "scatter", "title": "Side by side", "labels": comparison.labels}
        yield {**chart, "points": shown, "note": note}


def _details(comparison: Comparison) -> dict[str, Any]:
    reports = comparison.a, comparison.b
    found = [thresholds(report) for report in reports]
    sizes = {name: max(t.total for t in pair if t) for name, pair in comparison.tensors.items()}
    return {
        name: [
            (label, encode_details(tensor, of.get(name)))
            for label, tensor, of in zip(
                comparison.labels, comparison.tensors[name], found, strict=True
            )
            if tensor is not None and tensor.details is not None
        ]
        for name in sorted(sizes, key=lambda name: -sizes[name])
    }
