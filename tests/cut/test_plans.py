"""A plan equals the prunes by each of its amounts."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import grpc
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur_proto import plan_pb2, pruner_pb2, spec_pb2
from secateur_proto.pruner_pb2_grpc import PrunerStub
from secateur_server.cut import energy
from secateur_server.cut.choice import Choice
from secateur_server.cut.plan import plan
from secateur_server.cut.removed import Outcome, Removed
from secateur_server.errors import AmountOutOfRange
from secateur_server.granularity.block import Block
from secateur_server.granularity.element import Element
from secateur_server.granularity.group import Group, Member
from secateur_server.granularity.n_m import NM
from secateur_server.granularity.slice import Slice
from secateur_server.importance.magnitude import Magnitude
from secateur_server.importance.random import Random
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.amounts import Amount, Macs, Table, Threshold
from secateur_server.spec.rules import GuardRails, Rail, Selection
from secateur_server.state_dict.parameter import Parameter
from tests.conftest import examples
from tests.contract import raw
from tests.definition import (
    DTYPES,
    NAMES,
    amount_of,
    applied,
    kept_of,
    models,
    parameter,
    rule,
)
from tests.masks import packed

many = examples(100)
EVERY = (*DTYPES, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int64)
MATRICES = models(st.lists(st.integers(1, 6), min_size=2, max_size=2), EVERY)
GRANULARITIES = [
    Element(),
    Slice(0),
    Slice(-1),
    Block((2, 3), True),
    Block((1, 0), False),
    NM(1, 2, 1),
]
BOUNDS = [
    Rail("rail", NAMES[:1], max_sparsity=0.4),
    Rail("rail", NAMES[1:3], min_sparsity=0.21, max_sparsity=0.8),
    Rail("rail", NAMES[:2], keep_at_least=2),
]


@st.composite
def rules(draw: st.DrawFn) -> Selection:
    """Draws a rule of compatible granularity, scope, importance, allocation and guard rails."""
    scope = draw(st.sampled_from(["tensor", "global", "isomorphic"]))
    importance = draw(st.sampled_from([Magnitude(1.0), Magnitude(2.0), Random(7)]))
    is_random = isinstance(importance, Random)
    allocations = ["rank"] if scope == "tensor" else ["rank", "uniform", "erk", "lamp"]
    return rule(
        NAMES,
        granularity=draw(st.sampled_from(GRANULARITIES)),
        scope=scope,
        importance=importance,
        allocation=draw(st.sampled_from([a for a in allocations if a != "lamp" or not is_random])),
        normalization=draw(st.sampled_from([None, None if is_random else "z_score"])),
        of_all=draw(st.booleans()),
        guard_rails=GuardRails(tuple(draw(st.lists(st.sampled_from(BOUNDS), max_size=2)))),
    )


def fitted(selection: Selection, model: dict[str, Parameter]) -> Selection:
    """Restricts the names in a rule to the tensors of a model."""
    rails = tuple(
        replace(bound, tensors=tuple(name for name in bound.tensors if name in model))
        for bound in selection.guard_rails.rails
    )
    return replace(selection, tensors=tuple(model), guard_rails=GuardRails(rails))


def pruned_or_refused(
    selection: Selection, model: dict[str, Parameter]
) -> tuple[dict[str, Tensor], Sequence[Choice]] | str:
    """Prunes. Returns the masks and choices, or the message of the error."""
    try:
        return applied(model, selection)
    except AmountOutOfRange as error:
        return str(error)


def assert_planned(
    selection: Selection, given: Sequence[Any], model: dict[str, Parameter]
) -> Sequence[Outcome]:
    """Checks that a plan has the choices of prunes, and their effect on every tensor.

    The plan must refuse an amount that a prune refuses, with the same message.

    Returns:
        The outcomes of the other amounts.
    """
    possible = []
    for amount in map(amount_of, given):
        found = pruned_or_refused(replace(selection, amount=amount), model)
        if isinstance(found, str):
            with pytest.raises(AmountOutOfRange, match=re.escape(found)):
                plan(RequestContext(), selection, [amount], model, {})
        else:
            possible.append((amount, found))
    if not possible:
        return []
    outcomes = plan(RequestContext(), selection, [amount for amount, _ in possible], model, {})
    assert len(outcomes) == len(possible)
    for outcome, (_, (masks, choices)) in zip(outcomes, possible, strict=True):
        assert outcome.choices == choices
        assert outcome.removed.keys() == masks.keys()
        for name, removed in outcome.removed.items():
            assert_removed(removed, model[name], masks[name])
    return outcomes


def assert_removed(removed: Removed, before: Parameter, mask: Tensor) -> None:
    weight, kept = before.weight.double(), kept_of(before)
    pruned = kept & ~mask
    assert removed.elements == int(pruned.sum())
    norm, whole = (float(torch.linalg.vector_norm(weight[of])) for of in (pruned, kept))
    assert math.sqrt(removed.whole) == pytest.approx(whole, rel=1e-9)
    assert math.sqrt(max(0.0, removed.energy)) == pytest.approx(norm, rel=1e-9, abs=1e-9 * whole)


AMOUNT = st.floats(0, 1) | st.integers(0, 12)
AMOUNTS, FEW = (st.lists(AMOUNT, min_size=1, max_size=most) for most in (6, 2))


@many
@given(model=MATRICES, selection=rules(), amounts=AMOUNTS)
def test_a_plan_of_amounts_equals_the_prunes(
    model: dict[str, Parameter], selection: Selection, amounts: list[float | int]
) -> None:
    assert_planned(fitted(selection, model), amounts, model)


@examples(40)
@given(model=MATRICES, selection=rules(), share=st.floats(0, 1), data=st.data())
def test_a_plan_of_other_kinds_of_amounts_equals_the_prune(
    model: dict[str, Parameter], selection: Selection, share: float, data: st.DataObject
) -> None:
    selection = replace(fitted(selection, model), allocation="rank", of_all=False)
    amounts: list[Amount] = [Threshold(share * 2), Macs(share * 50, dict.fromkeys(model, 1.5))]
    if selection.scope == "tensor":
        amounts.append(Table(dict.fromkeys(list(model)[:2], share)))
    amount = data.draw(st.sampled_from(amounts))
    if isinstance(selection.importance, Random) and isinstance(amount, Threshold):
        selection = replace(selection, importance=Magnitude(1.0))
    assert_planned(replace(selection, amount=amount), [amount], model)


@examples(20)
@given(seed=st.integers(0, 1 << 32), amounts=FEW, kept=st.sampled_from([None, 0.4]))
def test_a_plan_of_overlapping_groups_equals_the_prunes(
    seed: int, amounts: list[float | int], kept: float | None
) -> None:
    shapes = {"a": (6, 4), "b": (6,), "c": (4, 6)}
    model = {
        name: parameter(seed + i, shape, torch.float32, kept)
        for i, (name, shape) in enumerate(shapes.items())
    }
    members = [Member("m", name, dim, 0, 1, 6, (), True) for name, dim in (("a", 0), ("c", 1))]
    shared = Member("m", "b", 0, 0, 1, 6, (), False)
    groups = tuple(Group(m.tensor, (m, shared)) for m in members)
    selection = rule(list(model), granularity=None, groups=groups, importance=Magnitude(2.0))
    assert_planned(selection, amounts, model)


def test_a_plan_with_ties_across_partial_sums_equals_the_prunes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(energy, "PART", 1024)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-4, 5, (20_000,), generator=generator) / 8
    kept = torch.rand(len(weight), generator=generator) < 0.9
    model = {"w": Parameter(weight, packed(kept)), "v": Parameter(torch.randn(1000))}
    amounts = [0.0, 0.001, 0.3, 0.5, 0.50001, 0.9, 1.0]
    selection = rule(["w", "v"], guard_rails=GuardRails((Rail("r", ("v",), max_sparsity=0.7),)))
    outcomes = assert_planned(selection, amounts, model)
    assert len(outcomes) == len(amounts) - 1  # the rail forbids the last one


def planned(
    channel: grpc.Channel, tensors: dict[str, Tensor], spec: spec_pb2.PruningSpec, *amounts: Any
) -> plan_pb2.PruningPlan:
    data = safetensors.torch.save(tensors)
    header = pruner_pb2.PlanHeader(data_bytes=len(data), spec=spec, amounts=amounts)
    request = pruner_pb2.PlanRequest(header=header, data=data)
    return PrunerStub(channel).Plan(iter([request]), timeout=raw.TIMEOUT).plan


def pruned(
    channel: grpc.Channel, tensors: dict[str, Tensor], spec: spec_pb2.PruningSpec, output: int
) -> pruner_pb2.PruneResult:
    data = safetensors.torch.save(tensors)
    header = raw.header("Prune", len(data), spec=spec, output=output)
    result = raw.send(channel, "Prune", [raw.message("Prune", header=header, data=data)])[0].result
    assert isinstance(result, pruner_pb2.PruneResult)
    return result


TENSORS = {
    "a.weight": torch.linspace(-1, 1, 60).view(6, 10),
    "b.weight": torch.linspace(-2, 3, 40).view(8, 5).half(),
    "b.bias": torch.ones(8),
}


def test_a_plan_over_the_wire_equals_the_prunes(channel: grpc.Channel) -> None:
    """The plan is of the last rule; the rules before it are applied."""
    first = raw.spec("a.weight", fraction=0.25).rules[0]
    last = raw.spec("*.weight", scope=spec_pb2.SCOPE_GLOBAL).rules[0]
    fractions = [0.9, 0.1, 0.5]
    amounts = [plan_pb2.Amount(fraction=f) for f in fractions] + [plan_pb2.Amount(count=7)]
    spec = spec_pb2.PruningSpec(rules=[first, last])
    found = planned(channel, TENSORS, spec, *amounts)
    for amount, of in zip(amounts, found.amounts, strict=True):
        chosen = amount.WhichOneof("amount")
        assert chosen is not None
        last.selection.ClearField("fraction")
        setattr(last.selection, chosen, getattr(amount, chosen))
        result = pruned(
            channel, TENSORS, spec_pb2.PruningSpec(rules=[first, last]), pruner_pb2.OUTPUT_NONE
        )
        report = result.report
        assert list(of.choices) == list(report.rules[1].choices)
        assert [t.name for t in of.tensors] == [t.name for t in report.tensors]
        assert [(t.pruned, t.total) for t in of.tensors] == [
            (t.pruned, t.total) for t in report.tensors
        ]
        assert [t.sparsity for t in of.tensors] == [t.pruned / t.total for t in report.tensors]
        assert (of.pruned, of.total) == (sum(t.pruned for t in of.tensors), 100)
        assert of.sparsity == of.pruned / 100
        sizes = {"a.weight": 4, "b.weight": 2}
        assert of.kept_bytes == sum((t.total - t.pruned) * sizes[t.name] for t in of.tensors)
        assert found.input_blake3 == report.input_blake3
    for output, size in (
        (pruner_pb2.OUTPUT_MASKS, found.masks_bytes),
        (pruner_pb2.OUTPUT_REPARAMETRIZED, found.reparametrized_bytes),
        (pruner_pb2.OUTPUT_DENSE, found.dense_bytes),
    ):
        assert pruned(channel, TENSORS, spec, output).data_bytes == size


def test_norm_removed_is_relative_to_the_unpruned_weights(channel: grpc.Channel) -> None:
    weight = torch.tensor([3.0, 0.0, 4.0, 12.0])
    tensors = {"a_orig": weight, "a_mask": torch.tensor([1.0, 1.0, 1.0, 0.0]), "b": weight * 2}
    found = planned(channel, tensors, raw.spec("*", count=2))
    (of,) = found.amounts  # the amount of the rule, because the request has none
    assert [t.name for t in of.tensors] == ["a", "b"]
    assert [t.pruned for t in of.tensors] == [3, 2]
    expected = [3 / 5, 6 / 26]
    assert [t.norm_removed for t in of.tensors] == pytest.approx(expected, rel=1e-12)
    assert of.norm_removed == pytest.approx(math.sqrt((9 + 36) / (25 + 676)), rel=1e-12)
    nothing = planned(channel, {"w": torch.zeros(4)}, raw.spec("w", count=2)).amounts[0]
    assert nothing.norm_removed == nothing.tensors[0].norm_removed == 0.0


LAST_MASKS = spec_pb2.PruningSpec(rules=[*raw.spec("*").rules, *raw.masks(v="m").rules])


@pytest.mark.parametrize(
    ("spec", "amounts", "reason", "field"),
    [
        (LAST_MASKS, [], "INVALID_SPEC", "spec.rules[1]"),
        (raw.spec("*"), [plan_pb2.Amount()] * 1001, "INVALID_REQUEST", "header.amounts"),
        (raw.spec("*"), [plan_pb2.Amount()], "INVALID_REQUEST", "header.amounts[0].amount"),
        (
            raw.spec("*"),
            [plan_pb2.Amount(count=1), plan_pb2.Amount(fraction=1.5)],
            "INVALID_SPEC",
            "header.amounts[1].fraction",
        ),
        (
            raw.spec("*", allocation=spec_pb2.ALLOCATION_OWL),
            [plan_pb2.Amount(count=1)],
            "INVALID_REQUEST",
            "header.amounts[0].count",
        ),
        (raw.spec(), [], "INVALID_SPEC", "spec.rules[0].selection.tensors"),
    ],
)
def test_wrong_plans_are_refused_with_the_field(
    channel: grpc.Channel,
    spec: spec_pb2.PruningSpec,
    amounts: list[plan_pb2.Amount],
    reason: str,
    field: str,
) -> None:
    tensors = {"v": torch.ones(4), "m": torch.ones(4)}
    found = raw.failure(planned, channel, tensors, spec, *amounts)
    raw.check_invalid(found, reason, field, [])
