"""What pruning by many amounts would do."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from secateur.choices import units_of
from secateur.errors import InvalidSpec
from secateur.lazy import LazyMapping, LazySequence
from secateur.report import Choice, decode_choice
from secateur.tables import html_table, text_table
from secateur_proto import plan_pb2 as pb
from secateur_proto import spec_pb2
from secateur_proto.pruner_pb2 import PlanHeader
from secateur_proto.spec_pb2 import Selection


@dataclass(frozen=True)
class PlannedTensor:
    """What would be left of a tensor.

    pruned, total: elements; prior pruning is among them.  norm_removed: the Euclidean norm of what
    would be pruned, over that of all that is unpruned before it.
    """

    pruned: int
    total: int
    sparsity: float
    norm_removed: float


@dataclass(frozen=True)
class PlannedAmount:
    """What one amount would do.

    amount: as it was asked for; None for one that is neither a fraction nor a count.
    choices: as of a report's rule.  tensors: by name, in the state_dict's order.
    pruned, total, sparsity, norm_removed: as of a tensor, over all.
    kept_bytes: of the values that would be kept, without masks. No file has this size: a dense file
        keeps its own, `Plan.dense_bytes`.
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
class Plan:
    """What a prune by each of some amounts does, exactly.

    masks_bytes, reparametrized_bytes, dense_bytes: of its answer in each form.
    input_blake3: of the safetensors file that went up.
    method: how units are ranked, for a person.
    """

    amounts: tuple[PlannedAmount, ...]
    masks_bytes: int
    reparametrized_bytes: int
    dense_bytes: int
    input_blake3: str
    method: str

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, for JSON."""
        amounts = (
            replace(of, tensors=dict(of.tensors), choices=tuple(of.choices)) for of in self.amounts
        )
        return asdict(replace(self, amounts=tuple(amounts)))

    def __str__(self) -> str:
        return f"{self._legend()}\n{text_table(self._rows())}\n{self._note()}"

    def _repr_html_(self) -> str:
        return f"<p>{self._legend()}</p>{html_table(self._rows())}<p>{self._note()}</p>"

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
class Sensitivity:
    """How much each tensor loses by each amount, pruned by itself.

    norm_removed: by the tensors' names, for each of `amounts` what PlannedTensor says.
    method: as of a plan.
    """

    amounts: tuple[float | None, ...]
    norm_removed: Mapping[str, tuple[float, ...]]
    method: str

    def to_dict(self) -> dict[str, Any]:
        """As Plan.to_dict."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self._legend()}\n{text_table(self._rows())}"

    def _repr_html_(self) -> str:
        return f"<p>{self._legend()}</p>{html_table(self._rows())}"

    def _legend(self) -> str:
        return (
            f"Pruning by {self.method}. A column is an amount: a fraction of the units, or their "
            "number; a cell is the share of the tensor's norm that would be pruned."
        )

    def _rows(self) -> list[tuple[str, ...]]:
        rows = [("tensor", *map(_shown, self.amounts))]
        for name, shares in self.norm_removed.items():
            rows.append((name, *(f"{share:.2%}" for share in shares)))
        return rows


def sensitivity_of(plan: Plan) -> Sensitivity:
    """A plan, tensor by tensor."""
    return Sensitivity(
        amounts=tuple(planned.amount for planned in plan.amounts),
        norm_removed={
            name: tuple(planned.tensors[name].norm_removed for planned in plan.amounts)
            for name in plan.amounts[0].tensors
        },
        method=plan.method,
    )


def encode_amounts(amounts: Any) -> list[pb.Amount]:
    """Ints and floats for the wire.  Errors: InvalidSpec."""
    if isinstance(amounts, str) or not isinstance(amounts, Iterable):
        raise InvalidSpec(f"amounts: {amounts!r} is no list of ints and floats")
    found = [pb.Amount(**units_of(f"amounts[{i}]", amount)) for i, amount in enumerate(amounts)]
    if not found:
        raise InvalidSpec("amounts: at least one is needed")
    return found


def decode_plan(message: pb.PruningPlan, header: PlanHeader) -> Plan:
    """A plan from the wire.  header: what was asked."""
    asked = header.amounts or [header.spec.rules[-1].selection]
    return Plan(
        amounts=tuple(map(_planned, asked, message.amounts)),
        masks_bytes=message.masks_bytes,
        reparametrized_bytes=message.reparametrized_bytes,
        dense_bytes=message.dense_bytes,
        input_blake3=message.input_blake3,
        method=_method(header.spec.rules[-1].selection),
    )


_SCOPES = {
    spec_pb2.SCOPE_PER_ROW: "each output row by itself",
    spec_pb2.SCOPE_PER_TENSOR: "each tensor by itself",
    spec_pb2.SCOPE_GLOBAL: "all tensors together",
    spec_pb2.SCOPE_ISOMORPHIC: "tensors of like names together",
}


def _method(selection: Selection) -> str:
    """How a rule ranks units."""
    importance = str(selection.WhichOneof("importance"))
    for other in ("scales", "importance_scores"):
        importance = other if getattr(selection, other) else importance
    unit = spec_pb2.Granularity.Name(selection.granularity).removeprefix("GRANULARITY_").lower()
    allocation = spec_pb2.Allocation.Name(selection.allocation).removeprefix("ALLOCATION_").lower()
    by = f", allocation {allocation}" if selection.allocation else ""
    return f"{importance}, {_SCOPES[selection.scope]}{by}; a unit is 1 {unit}"


def _planned(asked: pb.Amount | Selection, message: pb.PlannedAmount) -> PlannedAmount:
    kind = asked.WhichOneof("amount")
    return PlannedAmount(
        amount=getattr(asked, kind) if kind in ("fraction", "count") else None,
        choices=LazySequence(message.choices, decode_choice),
        tensors=LazyMapping(message.tensors, _tensor),
        pruned=message.pruned,
        total=message.total,
        sparsity=message.sparsity,
        norm_removed=message.norm_removed,
        kept_bytes=message.kept_bytes,
    )


def _tensor(message: pb.PlannedTensor) -> PlannedTensor:
    return PlannedTensor(
        pruned=message.pruned,
        total=message.total,
        sparsity=message.sparsity,
        norm_removed=message.norm_removed,
    )


def _row(planned: PlannedAmount) -> tuple[str, ...]:
    thresholds = [choice.threshold for choice in planned.choices]
    is_one = len(thresholds) == 1 and thresholds[0] is not None  # else each tensor has its own
    return (
        _shown(planned.amount),
        f"{planned.pruned:,}",
        f"{planned.sparsity:.2%}",
        f"{thresholds[0]:.6g}" if is_one else "-",
        f"{planned.norm_removed:.2%}",
        f"{planned.kept_bytes:,}",
    )


def _shown(amount: float | None) -> str:
    """An amount as Python spells it: 1 is one unit, 1.0 is all."""
    if amount is None:
        return "-"
    return f"{amount:,}" if isinstance(amount, int) else str(round(amount, 6))
