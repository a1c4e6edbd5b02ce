"""The page of a report."""

from collections.abc import Iterator
from typing import Any

from secateur.checks import shown
from secateur.details import Histogram
from secateur.errors import InvalidSpec
from secateur.gain import Gain
from secateur.page.bounds import bounds_table
from secateur.page.details import encode_details
from secateur.page.views import Cell, Column, Frame, Page, Table, Total, count, finite, shape, share
from secateur.page.views import size as readable
from secateur.report import Report, TensorReport
from secateur.report_table import telling_patterns
from secateur.tables import listed

_SHOWN = 3

_TENSORS = (
    Column("sparsity", "share", group=(1, 2)),
    Column("zeros", "count", is_minor=True, group="sum"),
    Column("parameters", "count", is_minor=True, group="sum"),
    Column("shape", "text", is_minor=True),
    Column("dtype", "text", is_minor=True),
    Column("bytes", "count", is_minor=True, group="sum"),
    Column("zero slices", "text", is_minor=True),
    Column("patterns", "text", is_minor=True),
    Column("other names", "text", is_minor=True),
)
# The first columns, which every report has.
_ALWAYS = 6
_CHOICES = (
    Column("asked for", "count"),
    Column("pruned", "count"),
    Column("candidates", "count", is_minor=True),
    Column("threshold", "number", is_minor=True),
    Column("ties pruned", "text", is_minor=True),
)


def report_page(report: Report, title: str, gain: Gain | None = None) -> Page:
    """Makes the page of a report; see `Report.to_html`."""
    if not isinstance(gain, Gain | None):
        raise InvalidSpec(f"gain: {shown(gain)} is not a secateur.Gain")
    found = thresholds(report)
    by_size = sorted(report.tensors.items(), key=lambda item: -item[1].total)
    return Page(
        title=title,
        subtitle=f"{len(report.tensors):,} tensors; {report.coverage}",
        totals=list(_totals(report, gain)),
        warnings=[str(of) for of in report.warnings if of.severity != "note"],
        notes=list(_notes(report)),
        tables=[_tensors(report), *filter(None, (_choices(report), _bounds(report)))],
        details={
            name: [("", encode_details(tensor, found.get(name)))]
            for name, tensor in by_size
            if tensor.details or tensor.zero_blocks
        },
    )


def _totals(report: Report, gain: Gain | None) -> Iterator[Total]:
    shrinkage = report.shrinkage
    size = sum(tensor.bytes for tensor in report.tensors.values())
    if shrinkage is None:
        yield Total("parameters", count(report.total))
        zeros = f"{count(report.zeros)} zeros"
        yield Total("not zero", count(report.total - report.zeros), zeros)
        yield Total("sparsity", share(report.zeros, report.total))
        yield Total("bytes", readable(size), "of a dense file")
    else:
        yield _change("parameters", shrinkage.parameters_before, shrinkage.parameters)
        yield _change("bytes", shrinkage.bytes_before, shrinkage.bytes, readable)
        yield Total("sparsity of what is left", share(report.zeros, report.total))
    if gain is not None:
        yield _change("multiply-accumulates", gain.before.macs, gain.after.macs)
        times = f"before {1e3 * gain.before.seconds:,.2f} ms"
        yield Total("one forward pass", f"{1e3 * gain.after.seconds:,.2f} ms", times)


def _change(label: str, before: int, after: int, written: Any = count) -> Total:
    note = f"before {written(before)}: {share(after, before)} left"
    return Total(label, written(after), note)


def _notes(report: Report) -> Iterator[str]:
    yield from (str(of) for of in report.warnings if of.severity == "note")
    if report.shrinkage:
        yield from map(str, report.shrinkage.uncut)
    without = sum(tensor.details is None for tensor in report.tensors.values())
    if report.tensors and without == len(report.tensors):
        yield "Histograms and patterns of zeros are in reports that were made with details=True."
    elif without:
        yield f"Histograms and patterns are of the largest tensors, and not of {without:,} others."


def _tensors(report: Report) -> Table:
    shrunk = report.shrinkage.tensors if report.shrinkage else {}
    rows = []
    for name, tensor in report.tensors.items():
        lengths = shape(tensor.shape)
        if name in shrunk and shrunk[name].shape_before != tensor.shape:
            lengths = f"{shape(shrunk[name].shape_before)} → {lengths}"
        rows.append((tensor.sparsity, tensor.zeros, tensor.total, lengths, *_facts(tensor)))
    # What no tensor has needs no column.
    used = [n for n in range(len(_TENSORS)) if n < _ALWAYS or any(row[n] for row in rows)]
    columns = [_TENSORS[n] for n in used]
    frame = Frame("", [[row[n] for n in used] for row in rows])
    return Table("Tensors", "tensor", columns, list(report.tensors), [frame], is_grouped=True)


def _facts(tensor: TensorReport) -> tuple[Cell, ...]:
    slices = " ".join(map("{}/{}".format, tensor.zero_slices, tensor.shape))
    others = ", ".join(tensor.aliases)
    return tensor.dtype, tensor.bytes, slices, telling_patterns(tensor), others


def _choices(report: Report) -> Table | None:
    names, rows = [], []
    for number, choices in enumerate(report.rules, 1):
        for choice in choices:
            names.append(f"{number}: {listed(choice.tensors, _SHOWN)}")
            ties = f"{choice.ties_pruned:,} of {choice.ties:,}"
            counts = choice.requested, choice.pruned, choice.candidates
            rows.append((*counts, finite(choice.threshold), ties))
    if not rows:
        return None
    note = "What each rule did to the units that it ranked together."
    return Table("Rules", "rule and tensors", _CHOICES, names, [Frame("", rows)], note=note)


def _bounds(report: Report) -> Table | None:
    return bounds_table(
        "rule",
        [(str(number), choices) for number, choices in enumerate(report.rules, 1)],
    )


def thresholds(report: Report) -> dict[str, float]:
    """Returns the threshold of each tensor that was pruned by magnitude alone."""
    found = {}
    for choice in (choice for choices in report.rules for choice in choices):
        if (threshold := choice.threshold) is None:
            continue
        for name in choice.tensors:
            tensor = report.tensors.get(name)
            if tensor and tensor.details and _parts(tensor.details.histogram, threshold):
                found[name] = threshold
    return found


def _parts(found: Histogram, threshold: float) -> bool:
    """Whether everything below the threshold was pruned, and nothing above it.

    The threshold of another importance, such as a norm of rows, does not part magnitudes.
    """
    if not 0 <= threshold <= found.largest or not found.pruned.any():
        return False
    at = int(threshold / found.largest * len(found.kept)) if found.largest else 0
    return not found.kept[:at].any() and not found.pruned[at + 1 :].any()
