"""How sparse a model is, and where."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from secateur.details import TensorDetails
from secateur.display.frames import frame_of
from secateur.display.notebook import Displayed
from secateur.display.plots import bars
from secateur.report_table import table_of
from secateur.shrinkage import Shrinkage
from secateur.tables import Table, listed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

    from secateur.gain import Gain

_FRAME_DTYPES = {
    **{"shape": "object", "dtype": "str", "bytes": "int64", "zeros": "int64", "total": "int64"},
    **{"sparsity": "float64", "pruned": "int64", "is_pruned": "bool"},
}

# Names of tensors in a line for people.
_SHOWN = 3


@dataclass(frozen=True)
class ZeroBlocks:
    """How many blocks of side x side elements are wholly zero.

    Attributes:
        side: Rows and columns of a block.
        zero: Blocks that are wholly zero.
        total: All blocks.
    """

    side: int
    zero: int
    total: int


@dataclass(frozen=True)
class TensorReport:
    """The sparsity of one tensor.

    Attributes:
        shape: The tensor's shape.
        dtype: As safetensors spells it.
        bytes: The size of its values.
        zeros: Elements that are zero.
        total: All elements.
        sparsity: zeros / total.
        pruned: Elements that its mask prunes.
        is_pruned: Whether it has a mask.
        zero_slices: For each dimension, how many slices are wholly zero.
        patterns: "2:4" if of each 4 adjacent elements along the second dimension (the first of
            tensors with one) at most 2 are not zero, and one group has 2; for 2, 4, 8 and 16. The
            last group is filled with zeros.
        zero_blocks: Those of the tensor as a matrix of its first dimension and all others, for
            sides of 4, 8, 16 and 32 up to the last with a zero block; empty below 2 dimensions.
        aliases: Other names of a tied tensor.
        details: What a page shows of it; None if not asked for, or beyond the largest tensors.
    """

    shape: tuple[int, ...]
    dtype: str
    bytes: int
    zeros: int
    total: int
    sparsity: float
    pruned: int
    is_pruned: bool
    zero_slices: tuple[int, ...]
    patterns: tuple[str, ...]
    zero_blocks: tuple[ZeroBlocks, ...]
    aliases: tuple[str, ...] = ()
    details: TensorDetails | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Bound:
    """A guard rail that changed how much of a tensor, or group, was pruned.

    Attributes:
        tensor: The name of the tensor or group.
        rail: min_sparsity, max_sparsity or keep_at_least.
        pruned: Units that the rule pruned of the tensor.
    """

    tensor: str
    rail: str
    pruned: int


@dataclass(frozen=True)
class Choice:
    """What a rule did to tensors, or groups, that were ranked together; counts are of units.

    Attributes:
        tensors: The names of the tensors or groups.
        candidates: Units that were unpruned before.
        requested: Units that the amount asks for.
        pruned: Units that the rule pruned.
        threshold: The importance of the most important unit pruned; None if no unit was ranked.
        ties: Candidates whose importance is the threshold.
        ties_pruned: Ties that were pruned.
        bounds: Guard rails that changed what was pruned.
    """

    tensors: tuple[str, ...]
    candidates: int
    requested: int
    pruned: int
    threshold: float | None
    ties: int
    ties_pruned: int
    bounds: tuple[Bound, ...]


@dataclass(frozen=True)
class ReportWarning:
    """Something about a result that the caller may not have meant.

    Attributes:
        code: What happened; report.proto lists the codes.
        severity: "warning" for a likely mistake, "note" for what is true of most results.
        tensors: Names of at most 10 tensors, or groups, that it is about.
        message: One line: what happened, and what to do about it.
    """

    code: str
    severity: str
    tensors: tuple[str, ...]
    message: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.message}"


@dataclass(frozen=True)
class Coverage:
    """How much of the floating tensors of a model a report covers.

    Attributes:
        covered: Elements of the tensors that the report covers.
        uncovered: Elements of the others.
        uncovered_tensors: How many others there are.
        largest_uncovered: The names of at most 10 of the others, the largest tensor first.
    """

    covered: int
    uncovered: int
    uncovered_tensors: int
    largest_uncovered: tuple[str, ...]

    def __str__(self) -> str:
        whole = f"covers {self.covered:,} of {self.covered + self.uncovered:,} floating parameters"
        others = listed(self.largest_uncovered, _SHOWN, self.uncovered_tensors)
        return f"{whole}; not {others}" if others else whole


@dataclass(frozen=True)
class Report(Displayed):
    """A sparsity report, measured by the server on what it returned.

    Attributes:
        tensors: By name, in the state_dict's order.
        zeros: Elements of all tensors that are zero.
        total: Elements of all tensors.
        sparsity: zeros / total.
        rules: The choices of each rule of the spec.
        input_blake3: Digest of the safetensors file that was sent.
        output_blake3: Digest of the safetensors file that was received.
        coverage: The part of the model that `tensors` are.
        warnings: What the caller of a prune may not have meant.
        shrinkage: What a shrunk model lost; else None. `tensors` are then the smaller ones.
    """

    tensors: Mapping[str, TensorReport]
    zeros: int
    total: int
    sparsity: float
    rules: tuple[Sequence[Choice], ...]
    input_blake3: str
    output_blake3: str
    coverage: Coverage
    warnings: tuple[ReportWarning, ...]
    shrinkage: Shrinkage | None = None

    def without(self, code: str) -> "Report":
        """Returns the report without its warnings of a code."""
        return replace(self, warnings=tuple(w for w in self.warnings if w.code != code))

    @property
    def is_pruned(self) -> bool:
        """Whether a tensor has a mask."""
        return any(tensor.is_pruned for tensor in self.tensors.values())

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain data, for JSON; `shrinkage` of a shrunk model only.

        The details of tensors, which are arrays, are left out.
        """
        tensors = {name: replace(tensor, details=None) for name, tensor in self.tensors.items()}
        rules = tuple(map(tuple, self.rules))
        found = asdict(replace(self, tensors=tensors, rules=rules))
        for tensor in found["tensors"].values():
            del tensor["details"]
        if self.shrinkage is None:
            del found["shrinkage"]
        return found

    def to_frame(self) -> "DataFrame":
        """Returns a row for each tensor, by its name, as a pandas.DataFrame.

        Raises:
            SecateurError: pandas is not installed.
        """
        tensors = self.tensors.values()
        columns = {
            name: (dtype, [getattr(tensor, name) for tensor in tensors])
            for name, dtype in _FRAME_DTYPES.items()
        }
        return frame_of(columns, list(self.tensors))

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draws the sparsity of each tensor as a bar.

        Args:
            ax: Axes of matplotlib; None makes a figure.

        Raises:
            SecateurError: matplotlib is not installed.
        """
        sparsities = {name: tensor.sparsity for name, tensor in self.tensors.items()}
        return bars(ax, sparsities, self.sparsity)

    def to_html(
        self,
        path: str | os.PathLike[str],
        title: str = "Sparsity report",
        gain: "Gain | None" = None,
    ) -> None:
        """Writes the report as a page: one HTML file that needs no network.

        Histograms and patterns are in reports that were asked for with details=True.

        Args:
            path: The file.
            title: The heading of the page.
            gain: What secateur.gain measured, to show operations and time before and after.

        Raises:
            InvalidSpec: The gain is not one.
            SecateurError: jinja2 is not installed: pip install 'secateur[html]'.
        """
        from secateur.page.rendering import write_page
        from secateur.page.reports import report_page

        write_page(report_page(self, title, gain), path)

    def table(self) -> Table:
        """Returns a row for each tensor, and lines on rules, coverage and warnings."""
        return table_of(self)
