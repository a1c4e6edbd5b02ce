"""Two models, tensor by tensor."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from secateur.checks import flag, shown
from secateur.client import Client
from secateur.display.frames import frame_of
from secateur.display.notebook import Displayed
from secateur.embedded import embedded
from secateur.errors import InvalidSpec
from secateur.model import Source
from secateur.names import bare_names
from secateur.report import Report, TensorReport
from secateur.result import FinalizeResult, PruneResult
from secateur.source import read_source
from secateur.tables import Table, listed

if TYPE_CHECKING:
    from pandas import DataFrame

# A tensor that one model does not have has no value there.
_FRAME_DTYPES = {"sparsity": "float64", "zeros": "Int64", "bytes": "Int64", "shape": "object"}
_SHOWN = 3


class Pair(NamedTuple):
    """A tensor in both models.

    Attributes:
        a: Its report in the first model; None if that has no such tensor.
        b: Its report in the second one.
    """

    a: TensorReport | None
    b: TensorReport | None


@dataclass(frozen=True)
class Comparison(Displayed):
    """Two reports, side by side.

    Attributes:
        a: The report of the first model.
        b: The report of the second one.
        labels: What to call them.
    """

    a: Report
    b: Report
    labels: tuple[str, str]

    @cached_property
    def tensors(self) -> Mapping[str, Pair]:
        """The tensors of both, in the order of the first model, then of the second.

        The prefixes of torch.compile and DataParallel may differ; names are those of the first one.
        """
        a, b = self.a.tensors, self.b.tensors
        bare = {short: name for name, short in bare_names(b).items() if name not in a}
        others = {n: n if n in b else bare.get(short, "") for n, short in bare_names(a).items()}
        found = {name: Pair(a[name], b.get(other)) for name, other in others.items()}
        rest = b.keys() - set(others.values())
        return found | {name: Pair(None, b[name]) for name in b if name in rest}

    @property
    def only_in_a(self) -> tuple[str, ...]:
        """Names of the tensors that the second model does not have."""
        return tuple(name for name, pair in self.tensors.items() if pair.b is None)

    @property
    def only_in_b(self) -> tuple[str, ...]:
        """Names of the tensors that the first model does not have."""
        return tuple(name for name, pair in self.tensors.items() if pair.a is None)

    def to_dict(self) -> dict[str, Any]:
        """Returns the comparison as plain data, for JSON."""
        return {
            "labels": list(self.labels),
            "a": _total(self.a),
            "b": _total(self.b),
            "only_in_a": list(self.only_in_a),
            "only_in_b": list(self.only_in_b),
            "tensors": {
                name: {"a": _plain(pair.a), "b": _plain(pair.b)}
                for name, pair in self.tensors.items()
            },
        }

    def to_html(self, path: str | os.PathLike[str], title: str = "Comparison") -> None:
        """Writes the comparison as a page: one HTML file that needs no network.

        Args:
            path: The file.
            title: The heading of the page.

        Raises:
            SecateurError: jinja2 is not installed: pip install 'secateur[html]'.
        """
        from secateur.page.comparisons import comparison_page
        from secateur.page.rendering import write_page

        write_page(comparison_page(self, title), path)

    def to_frame(self) -> "DataFrame":
        """Returns a row for each tensor, by its name, as a pandas.DataFrame.

        Raises:
            SecateurError: pandas is not installed.
        """
        pairs = self.tensors.values()
        columns = {
            f"{what}_{side}": (dtype, [getattr(pair[of], what, None) for pair in pairs])
            for what, dtype in _FRAME_DTYPES.items()
            for of, side in enumerate("ab")
        }
        return frame_of(columns, list(self.tensors))

    def table(self) -> Table:
        """Returns a row for each tensor, and lines on different sizes and tensors of one alone."""
        lines = [*self._sizes()] + [
            f"only in {label}: {listed(names, _SHOWN)}"
            for label, names in zip(self.labels, (self.only_in_a, self.only_in_b), strict=True)
            if names
        ]
        rows = list(self._rows())
        return Table(rows, above=self._legend(), below=tuple(lines), has_total=True)

    def _sizes(self) -> Iterator[str]:
        """The sizes of models of different sizes, whose columns a narrow terminal leaves out."""
        sizes = [(report.total, _total(report)["bytes"]) for report in (self.a, self.b)]
        if sizes[0] != sizes[1]:
            (count, size), (other_count, other_size) = sizes
            yield (f"{count:,} and {other_count:,} parameters, {size:,} and {other_size:,} bytes")

    def _legend(self) -> tuple[str, ...]:
        return tuple(f"{short}: {label}" for short, label in zip("AB", self.labels, strict=True))

    def _rows(self) -> Iterator[tuple[str, ...]]:
        heads = [f"{what} {of}" for what in ("sparsity", "zeros", "bytes", "shape") for of in "AB"]
        yield ("tensor", *heads)
        for name, pair in self.tensors.items():
            yield (name, *_alternating(*map(_cells, pair)))
        yield ("total", *_alternating(*(_sums(report) for report in (self.a, self.b))))


def compare(
    a: Any,
    b: Any,
    client: Client | None = None,
    labels: Sequence[str] | None = None,
    details: bool = False,
) -> Comparison:
    """Compares two models, tensor by tensor: sparsity, zeros, bytes and shapes.

    Args:
        a: A report, a result of `client.prune` or `client.finalize`, or a source: see `Client`.
        b: The other one.
        client: Measures sources; None is the server of $SECATEUR_SERVER, or an embedded one.
        labels: What to call the two; None are their paths, or A and B.
        details: Whether sources are measured with details, for a page: see `Client.report`.

    Raises:
        SecateurError: A source cannot be read or measured.
    """
    names = labels_of(a, b) if labels is None else _checked(labels)
    flag("details", details)
    if not isinstance(client, Client | None):
        raise InvalidSpec(f"client: {shown(client)} is not a secateur.Client")
    one, other = (_report_or_source(given) for given in (a, b))
    if isinstance(one, Report) and isinstance(other, Report):
        return Comparison(one, other, names)
    with _measuring(client) as server:
        reports = [
            given if isinstance(given, Report) else server.report(given, details=details)
            for given in (one, other)
        ]
    return Comparison(reports[0], reports[1], names)


def _report_or_source(given: Any) -> Report | Source:
    if isinstance(given, PruneResult | FinalizeResult):
        return given.report
    return given if isinstance(given, Report) else read_source(given)


def _measuring(client: Client | None) -> AbstractContextManager[Client]:
    if client is not None:
        return nullcontext(client)
    return Client() if os.environ.get("SECATEUR_SERVER") else embedded()


def labels_of(a: Any, b: Any) -> tuple[str, str]:
    """Returns the names of files, or their paths, if those differ; else A and B."""
    paths = [Path(given) for given in (a, b) if isinstance(given, str | os.PathLike)]
    if len(paths) == 2:
        for first, second in (paths[0].name, paths[1].name), map(str, paths):
            if first != second:
                return first, second
    return "A", "B"


def _checked(labels: Any) -> tuple[str, str]:
    is_pair = isinstance(labels, Sequence) and not isinstance(labels, str) and len(labels) == 2
    if not is_pair or not all(isinstance(label, str) and label for label in labels):
        raise InvalidSpec(
            f"labels: {shown(labels)} is not a pair of texts; give ('before', 'after')"
        )
    return labels[0], labels[1]


def _total(report: Report) -> dict[str, Any]:
    size = sum(tensor.bytes for tensor in report.tensors.values())
    found = {"zeros": report.zeros, "total": report.total, "sparsity": report.sparsity}
    return {**found, "bytes": size}


def _plain(tensor: TensorReport | None) -> dict[str, Any] | None:
    if tensor is None:
        return None
    names = ("shape", "dtype", "bytes", "zeros", "total", "sparsity")
    return {name: getattr(tensor, name) for name in names}


def _cells(tensor: TensorReport | None) -> tuple[str, ...]:
    if tensor is None:
        return ("-",) * 4
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    return f"{tensor.sparsity:.2%}", f"{tensor.zeros:,}", f"{tensor.bytes:,}", shape


def _sums(report: Report) -> tuple[str, ...]:
    total = _total(report)
    return f"{report.sparsity:.2%}", f"{report.zeros:,}", f"{total['bytes']:,}", f"{report.total:,}"


def _alternating(a: Sequence[str], b: Sequence[str]) -> Iterator[str]:
    """Cells of both models, each beside that of the other."""
    for pair in zip(a, b, strict=True):
        yield from pair
