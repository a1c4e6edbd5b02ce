"""What a prune by many amounts would do."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from secateur.display.frames import amount_column, frame_of
from secateur.display.notebook import Displayed
from secateur.display.plots import curves, heat_map
from secateur.report import Choice
from secateur.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame


@dataclass(frozen=True)
class PlannedTensor:
    """What one amount would do to a tensor.

    Attributes:
        pruned: Elements that would be pruned in all, prior pruning included.
        total: All elements.
        sparsity: pruned / total.
        norm_removed: The Euclidean norm of what the amount would prune, over the norm of all that
            is unpruned before.
    """

    pruned: int
    total: int
    sparsity: float
    norm_removed: float


@dataclass(frozen=True)
class PlannedAmount:
    """What one amount would do.

    Attributes:
        amount: As requested; None for an amount that is neither a fraction nor a count.
        choices: Like those of a rule in a report.
        tensors: By name, in the state_dict's order.
        pruned: See PlannedTensor; over all tensors.
        total: See PlannedTensor; over all tensors.
        sparsity: See PlannedTensor; over all tensors.
        norm_removed: See PlannedTensor; over all tensors.
        kept_bytes: Bytes of the values that would be kept, without masks. No file has this size: a
            dense file keeps its own, `Plan.dense_bytes`.
    """

    amount: float | None
    choices: Sequence[Choice]
    tensors: Mapping[str, PlannedTensor]
    pruned: int
    total: int
    sparsity: float
    norm_removed: float
    kept_bytes: int


@dataclass(frozen=True)
class Plan(Displayed):
    """What a prune by each of several amounts does, exactly.

    Attributes:
        amounts: One for each amount.
        masks_bytes: The size of a prune's answer with output="masks".
        reparametrized_bytes: The size of a prune's answer with output="reparametrized".
        dense_bytes: The size of a prune's answer with output="dense".
        input_blake3: Digest of the safetensors file that was sent.
        method: How units are ranked, for a person. If the spec has several rules, also that the
            last is planned, after the others.
    """

    amounts: tuple[PlannedAmount, ...]
    masks_bytes: int
    reparametrized_bytes: int
    dense_bytes: int
    input_blake3: str
    method: str

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as plain data, for JSON."""
        amounts = (
            replace(of, tensors=dict(of.tensors), choices=tuple(of.choices)) for of in self.amounts
        )
        return asdict(replace(self, amounts=tuple(amounts)))

    def to_frame(self) -> "DataFrame":
        """Returns a row for each amount and tensor as a pandas.DataFrame, by the tensors' names.

        Raises:
            SecateurError: pandas is not installed.
        """
        rows = [(of, name, tensor) for of in self.amounts for name, tensor in of.tensors.items()]
        columns = {
            "amount": amount_column([of.amount for of, _, _ in rows]),
            "pruned": ("int64", [tensor.pruned for _, _, tensor in rows]),
            "total": ("int64", [tensor.total for _, _, tensor in rows]),
            "sparsity": ("float64", [tensor.sparsity for _, _, tensor in rows]),
            "norm_removed": ("float64", [tensor.norm_removed for _, _, tensor in rows]),
        }
        return frame_of(columns, [name for _, name, _ in rows])

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draws the share of the norm that each amount removes against its sparsity.

        Args:
            ax: Axes of matplotlib; None makes a figure.

        Raises:
            SecateurError: matplotlib is not installed.
        """
        shares = [planned.norm_removed for planned in self.amounts]
        return curves(ax, [planned.sparsity for planned in self.amounts], {"norm removed": shares})

    def to_html(
        self, path: str | os.PathLike[str], title: str = "Plan", amount: float | None = None
    ) -> None:
        """Writes the plan as a page: one HTML file that needs no network.

        Args:
            path: The file.
            title: The heading of the page.
            amount: The planned amount that the page marks first; None is the middle one.

        Raises:
            InvalidSpec: The amount was not planned.
            SecateurError: jinja2 is not installed: pip install 'secateur[html]'.
        """
        from secateur.page.plans import plan_page
        from secateur.page.rendering import write_page

        write_page(plan_page(self, title, amount), path)

    def table(self) -> Table:
        """Returns a row for each amount."""
        return Table(self._rows(), above=(self._legend(),), below=(self._note(),))

    def _legend(self) -> str:
        return (
            f"Pruning by {self.method}. A row is an amount: a fraction of the units, or their "
            "number; norm removed is the share of the norm that would be pruned."
        )

    def _note(self) -> str:
        size = f"{self.dense_bytes:,} bytes"
        return (
            f"A dense file keeps its size, {size} at every amount: pruned values are zeros in it."
        )

    def _rows(self) -> list[tuple[str, ...]]:
        head = ("amount", "pruned", "sparsity", "threshold", "norm removed", "bytes of kept values")
        return [head, *map(_row, self.amounts)]


@dataclass(frozen=True)
class Sensitivity(Displayed):
    """How much each tensor would lose, pruned by itself.

    Attributes:
        amounts: See PlannedAmount.
        norm_removed: See PlannedTensor; for each amount, by the tensors' names.
        method: See Plan.
    """

    amounts: tuple[float | None, ...]
    norm_removed: Mapping[str, tuple[float, ...]]
    method: str

    def to_dict(self) -> dict[str, Any]:
        """Returns the sensitivity as plain data, for JSON."""
        return asdict(self)

    def to_frame(self) -> "DataFrame":
        """Returns a row for each tensor and amount as a pandas.DataFrame, by the tensors' names.

        Raises:
            SecateurError: pandas is not installed.
        """
        names = list(self.norm_removed)
        columns = {
            "amount": amount_column(self.amounts * len(names)),
            "norm_removed": ("float64", [s for name in names for s in self.norm_removed[name]]),
        }
        return frame_of(columns, [name for name in names for _ in self.amounts])

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draws a map of the tensors and amounts: the share of the norm that would be removed.

        Args:
            ax: Axes of matplotlib; None makes a figure.

        Raises:
            SecateurError: matplotlib is not installed.
        """
        amounts = [amount_text(amount) for amount in self.amounts]
        return heat_map(ax, list(self.norm_removed), amounts, [*self.norm_removed.values()])

    def to_html(self, path: str | os.PathLike[str], title: str = "Sensitivity") -> None:
        """Writes the sensitivity as a page with a heat map: one HTML file that needs no network.

        Args:
            path: The file.
            title: The heading of the page.

        Raises:
            SecateurError: jinja2 is not installed: pip install 'secateur[html]'.
        """
        from secateur.page.plans import sensitivity_page
        from secateur.page.rendering import write_page

        write_page(sensitivity_page(self, title), path)

    def table(self) -> Table:
        """Returns a row for each tensor, and a column for each amount."""
        return Table(self._rows(), above=(self._legend(),))

    def _legend(self) -> str:
        return (
            f"Pruning by {self.method}. A column is an amount: a fraction of the units, or their "
            "number; a cell is the share of the tensor's norm that would be pruned."
        )

    def _rows(self) -> list[tuple[str, ...]]:
        rows = [("tensor", *map(amount_text, self.amounts))]
        for name, shares in self.norm_removed.items():
            rows.append((name, *(f"{share:.2%}" for share in shares)))
        return rows


def sensitivity_of(plan: Plan) -> Sensitivity:
    """Turns a plan into a table of tensors and amounts."""
    return Sensitivity(
        amounts=tuple(planned.amount for planned in plan.amounts),
        norm_removed={
            name: tuple(planned.tensors[name].norm_removed for planned in plan.amounts)
            for name in plan.amounts[0].tensors
        },
        method=plan.method,
    )


def _row(planned: PlannedAmount) -> tuple[str, ...]:
    thresholds = [choice.threshold for choice in planned.choices]
    # Tensors that are ranked one by one have thresholds of their own.
    is_one = len(thresholds) == 1 and thresholds[0] is not None
    return (
        amount_text(planned.amount),
        f"{planned.pruned:,}",
        f"{planned.sparsity:.2%}",
        f"{thresholds[0]:.6g}" if is_one else "-",
        f"{planned.norm_removed:.2%}",
        f"{planned.kept_bytes:,}",
    )


def is_amount(one: float | None, other: float | None) -> bool:
    """Returns whether two amounts are the same: 1 is one unit, and 1.0 is all."""
    return one == other and type(one) is type(other)


def amount_text(amount: float | None) -> str:
    """Returns an amount as Python spells it: 1 is one unit, 1.0 is all."""
    if amount is None:
        return "-"
    return f"{amount:,}" if isinstance(amount, int) else str(round(amount, 6))
