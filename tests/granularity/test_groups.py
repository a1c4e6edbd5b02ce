"""Groups: slices of several tensors that are pruned as one, against a plain definition."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import grpc
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from secateur_proto import pruner_pb2, spec_pb2
from secateur_server.errors import InvalidSpec, NanScores
from secateur_server.granularity.group import Group, Member
from secateur_server.importance.magnitude import Magnitude
from secateur_server.importance.random import Random
from secateur_server.spec.rules import GuardRails, Rail
from secateur_server.state_dict.parameter import Parameter
from tests.conftest import examples
from tests.contract import raw
from tests.definition import (
    DTYPES,
    Ranked,
    applied,
    choose,
    elements,
    grouped,
    kept_of,
    member,
    parameter,
    resolved,
)
from tests.masks import packed

many = examples(25)


def units_of(part: Member, shape: Sequence[int], units: int) -> list[list[int]]:
    """Returns the flat indices of the elements of each unit."""
    lines = np.moveaxis(np.arange(math.prod(shape)).reshape(tuple(shape)), part.dim, 0)
    each = len(part.indices) // units if part.indices else part.stride
    slices = part.indices or range(part.offset, part.offset + units * each)
    return [lines[list(slices[u * each : (u + 1) * each])].flatten().tolist() for u in range(units)]


def definition(model: Mapping[str, Parameter], group: Group, combination: str) -> Ranked:
    """Scores the units of a group by the mean, sum or maximum of their members' means of |w|."""
    units = group.members[0].units
    scores: list[list[Fraction]] = [[] for _ in range(units)]
    candidates = [False] * units
    for part in group.members:
        ranked = elements(model[part.tensor])
        for unit, at in enumerate(units_of(part, model[part.tensor].weight.shape, units)):
            candidates[unit] |= any(ranked.candidates[i] for i in at)
            if part.is_scored:
                total = sum((ranked.scores[i] for i in at if ranked.candidates[i]), Fraction(0))
                scores[unit].append(total / len(at))
    found: dict[str, Iterable[Fraction | int]]
    found = {"sum": map(sum, scores), "max": map(max, scores)}
    found["mean"] = (Fraction(sum(s)) / len(s) for s in scores)
    return Ranked([Fraction(score) for score in found[combination]], candidates)


def assert_pruned(
    model: Mapping[str, Parameter],
    masks: Mapping[str, Tensor],
    groups: Sequence[Group],
    pruned: Sequence[Sequence[int]],
) -> None:
    """Checks that exactly the slices of the pruned units are masked, in every member."""
    named = {part.tensor for group in groups for part in group.members}
    assert masks.keys() == named
    expected = {name: kept_of(model[name]).flatten() for name in named}
    for group, units in zip(groups, pruned, strict=True):
        for part in group.members:
            shape = model[part.tensor].weight.shape
            of_units = units_of(part, shape, group.members[0].units)
            for unit in units:
                expected[part.tensor][of_units[unit]] = False
    for name, mask in masks.items():
        assert torch.equal(mask.flatten(), expected[name]), name


@st.composite
def networks(draw: st.DrawFn) -> tuple[dict[str, Parameter], Group]:
    """Draws a group whose units have 1, 2, 4 or 8 elements in each member, so means are exact."""
    units = draw(st.integers(1, 5))
    spare = draw(st.integers(0, 3))
    order = draw(st.permutations(range(2 * units + spare)))
    every = [
        ((units, 2, 2), member("conv.weight")),
        ((units,), member("conv.bias")),
        ((2, 2 * units), member("fc.weight", -1, stride=2)),
        ((spare + units + 1, 2), member("rows", offset=spare, units=units)),
        ((2, len(order), 2), member("any", 1, indices=tuple(order[: 2 * units]), units=units)),
        ((1, len(order)), member("some", 1, indices=tuple(order[:units]))),
    ]
    chosen = draw(st.lists(st.sampled_from(every), min_size=1, unique_by=lambda m: m[1].tensor))
    flags = [True, *(draw(st.booleans()) for _ in chosen[1:])]
    parts = [replace(part, is_scored=flag) for (_, part), flag in zip(chosen, flags, strict=True)]
    seed, kept = draw(st.integers(0, 1 << 32)), st.sampled_from([None, 0.1, 0.5])
    model = {
        part.tensor: parameter(seed + i, shape, draw(st.sampled_from(DTYPES)), draw(kept))
        for i, (shape, part) in enumerate(chosen)
    }
    return model, Group("group", tuple(draw(st.permutations(parts))))


@many
@given(
    network=networks(),
    combination=st.sampled_from(["mean", "sum", "max"]),
    amount=st.floats(0, 1),
    scope=st.sampled_from(["tensor", "global", "isomorphic"]),
)
def test_units_of_a_group_are_pruned_from_all_members(
    network: tuple[dict[str, Parameter], Group], combination: str, amount: float, scope: str
) -> None:
    model, group = network
    rule = resolved(model, [group], combination=combination, amount=amount, scope=scope)
    masks, (choice,) = applied(model, rule)
    ranked = definition(model, rule.groups[0], combination)
    count = round(amount * len(ranked.order))
    chosen = choose([ranked], lambda counts: counts == [count])
    assert_pruned(model, masks, rule.groups, chosen.pruned)
    assert choice.tensors == ("group",)
    assert (choice.candidates, choice.requested) == (len(ranked.order), count)
    assert choice.pruned == count
    assert choice.threshold == (None if chosen.last is None else float(chosen.last))
    ties = [i for i in ranked.order if ranked.scores[i] == chosen.last]
    ties_pruned = [i for i in ties if i in chosen.pruned[0]]
    assert (choice.ties, choice.ties_pruned) == (len(ties), len(ties_pruned))


@many
@given(seed=st.integers(0, 1 << 32), count=st.integers(0, 8), kept=st.sampled_from([None, 0.3]))
def test_groups_that_share_a_tensor_are_compared(seed: int, count: int, kept: float) -> None:
    """Two halves of one projection, and a tensor that is a member of both groups."""
    shapes = {"in": (12, 4), "left": (4, 2), "right": (8,), "out": (4, 12)}
    model = {
        name: parameter(seed + i, shape, torch.float32, kept)
        for i, (name, shape) in enumerate(shapes.items())
    }
    groups = [
        Group("a", (member("in", units=4), member("left"), member("out", 1, units=4))),
        Group("b", (member("in", offset=4), member("right"), member("out", 1, offset=4))),
    ]
    rule = resolved(model, groups, amount=count)
    ranked = [definition(model, group, "mean") for group in rule.groups]
    assume(count <= sum(len(r.order) for r in ranked))
    masks, (choice,) = applied(model, rule)
    chosen = choose(ranked, lambda counts: sum(counts) == count)
    assert_pruned(model, masks, rule.groups, chosen.pruned)
    assert choice.tensors == ("a", "b")
    assert choice.pruned == count


def test_a_shared_unit_is_pruned_if_either_group_prunes_it() -> None:
    weight = torch.tensor([[4.0], [3.0], [2.0], [1.0]])
    model = {"shared": Parameter(weight), "own": Parameter(weight.flip(0).clone())}
    groups = [
        Group("a", (member("shared"),)),
        Group("b", (member("own"), member("shared", is_scored=False))),
    ]
    masks, choices = grouped(model, groups, amount=1, scope="tensor")
    assert masks["shared"].flatten().tolist() == [False, True, True, False]
    assert masks["own"].flatten().tolist() == [False, True, True, True]
    assert [choice.pruned for choice in choices] == [1, 1]


def test_grouped_query_heads_are_pruned_with_their_keys_and_values() -> None:
    """8 query heads of 3 in 4 groups: a unit is 6 rows of q, 3 of k and v, 6 columns of o."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (24, 10), "k": (12, 10), "v": (12, 10), "o": (10, 24)}
    model = {n: Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()}
    parts = (
        member("q", stride=6),
        member("k", stride=3),
        member("v", stride=3),
        member("o", 1, stride=6),
    )
    choices: dict[str, Any] = {"amount": 0.5, "importance": Magnitude(2.0)}
    masks, (choice,) = grouped(model, [Group("heads", parts)], **choices)
    means = torch.zeros(4, dtype=torch.float64)
    for part in parts:
        rows = model[part.tensor].weight.double().movedim(part.dim, 0)
        means += rows.reshape(4, -1).square().mean(1).sqrt() / 4
    kept = torch.ones(4, dtype=torch.bool)
    kept[means.argsort()[:2]] = False
    assert choice.pruned == 2
    assert choice.threshold == pytest.approx(float(means.sort().values[1]), rel=1e-12)
    for part in parts:
        along = masks[part.tensor].movedim(part.dim, 0)
        expected = kept.repeat_interleave(len(along) // 4).view(-1, 1)
        assert torch.equal(along, expected.expand(along.shape)), part.tensor


@pytest.mark.parametrize("p", [0.5, 2.0, 3.0, math.inf, -math.inf, 0.0])
@pytest.mark.parametrize("combination", ["mean", "sum", "max"])
def test_scores_of_members_are_norms_divided_by_their_size(p: float, combination: str) -> None:
    generator = torch.Generator().manual_seed(1)
    conv = torch.randn(6, 3, 2, generator=generator, dtype=torch.float64)
    conv[conv.abs() < 0.3] = 0.0
    fc = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    model = {"conv": Parameter(conv), "fc": Parameter(fc)}
    group = Group("g", (member("conv"), member("fc", 1, stride=2)))
    _, (choice,) = grouped(
        model, [group], amount=3, importance=Magnitude(p), combination=combination
    )
    rows = [conv.flatten(1), fc.view(5, 6, 2).transpose(0, 1).flatten(1)]
    norms = torch.stack([torch.linalg.vector_norm(r, p, 1) for r in rows])
    if not math.isinf(p):
        sizes = torch.tensor([[float(r.shape[1])] for r in rows], dtype=torch.float64)
        norms = norms / (sizes if p == 0 else sizes ** (1 / p))
    found = {"mean": norms.mean(0), "sum": norms.sum(0), "max": norms.amax(0)}[combination]
    assert choice.threshold == pytest.approx(float(found.sort().values[2]), rel=1e-12)
    assert choice.pruned == 3


@many
@given(
    seed=st.integers(0, 1 << 32),
    kind=st.sampled_from(["mean", "norm", "z_score"]),
    combination=st.sampled_from(["mean", "sum", "max"]),
    count=st.integers(0, 7),
    kept=st.sampled_from([None, 0.2]),
)
def test_each_member_is_normalized_by_itself(
    seed: int, kind: str, combination: str, count: int, kept: float | None
) -> None:
    shapes = {"conv": (7, 4), "bn": (7,), "next": (3, 7)}
    model = {
        name: parameter(seed + i, shape, torch.float64, kept)
        for i, (name, shape) in enumerate(shapes.items())
    }
    group = Group("g", (member("conv"), member("bn"), member("next", 1)))
    masks = [kept_of(model["conv"]), kept_of(model["bn"])[:, None], kept_of(model["next"]).T]
    weights = [model["conv"].weight, model["bn"].weight[:, None], model["next"].weight.T]
    candidates = torch.cat(masks, 1).any(1).numpy()
    count = min(count, int(candidates.sum()))
    scores = []
    for weight, mask in zip(weights, masks, strict=True):
        means = (weight.abs() * mask).mean(1).numpy()
        unpruned = means[candidates] if candidates.any() else np.zeros(1)
        shift = unpruned.mean() if kind == "z_score" else 0.0
        spreads = {
            "mean": unpruned.mean(),
            "norm": np.linalg.norm(unpruned),
            "z_score": unpruned.std(),
        }
        scores.append((means - shift) / (float(spreads[kind]) or 1.0))
    stacked = np.stack(scores)
    of_all = {"mean": stacked.mean(0), "sum": stacked.sum(0), "max": stacked.max(0)}
    total = of_all[combination]
    pruned, (choice,) = grouped(
        model, [group], amount=count, combination=combination, normalization=kind
    )
    is_kept = torch.cat([pruned["conv"], pruned["bn"][:, None], pruned["next"].T], 1).any(1).numpy()
    lost, left = total[candidates & ~is_kept], total[candidates & is_kept]
    assert len(lost) == choice.pruned == count
    if count:
        assert choice.threshold == pytest.approx(lost.max(), rel=1e-9, abs=1e-9)
        assert lost.max() <= min(left, default=math.inf) + 1e-9


def test_nan_is_an_error_only_in_scored_unpruned_elements() -> None:
    nan = Parameter(torch.tensor([1.0, math.nan]))
    model = {"w": Parameter(torch.tensor([1.0, 2.0])), "nan": nan}
    with pytest.raises(NanScores) as caught:
        grouped(model, [Group("g", (member("w"), member("nan")))], amount=1)
    assert caught.value.field == "data['nan']"
    group = Group("g", (member("w"), member("nan", is_scored=False)))
    masks, _ = grouped(model, [group], amount=1)
    assert masks["nan"].tolist() == [False, True]
    pruned = {**model, "nan": nan._replace(mask=packed(torch.tensor([True, False])))}
    masks, _ = grouped(pruned, [Group("g", (member("w"), member("nan")))], amount=1)
    assert masks["w"].tolist() in ([False, True], [True, False])


def test_random_units_have_the_exact_count_and_depend_on_the_name() -> None:
    model = {"w": Parameter(torch.rand(300, 2)), "b": Parameter(torch.rand(300))}
    masks = {}
    for name, seed in (("a", 1), ("b", 1), ("a", 2)):
        group = Group(name, (member("w"), member("b", is_scored=False)))
        found, (choice,) = grouped(model, [group], amount=0.4, importance=Random(seed))
        assert choice.pruned == 120 == int((~found["b"]).sum())
        assert choice.threshold is None
        assert torch.equal(found["w"], found["b"][:, None].expand(300, 2))
        masks[name, seed] = tuple(found["b"].tolist())
    assert len(set(masks.values())) == 3


def test_guard_rails_count_units_of_groups() -> None:
    model = {"a": Parameter(torch.arange(1.0, 7)), "b": Parameter(torch.arange(7.0, 13))}
    groups = [Group("one", (member("a"),)), Group("two", (member("b"),))]
    bounds = GuardRails((Rail("rail", ("o*",), keep_at_least=4),))
    masks, (choice,) = grouped(model, groups, amount=5, guard_rails=bounds)
    assert [int((~mask).sum()) for mask in masks.values()] == [2, 3]
    assert [(b.tensor, b.rail, b.pruned) for b in choice.bounds] == [("one", "keep_at_least", 2)]
    masks, _ = grouped(model, groups, amount=3, guard_rails=GuardRails(exclude=("one",)))
    assert masks.keys() == {"b"}
    assert int((~masks["b"]).sum()) == 3


SHAPES = {"w": (6, 4), "v": (4,), "scalar": (), "empty": (0, 3)}


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        ((member("w"), member("v")), "member.units"),  # 6 and 4
        ((member("w", units=7),), "member.units"),
        ((member("w", offset=5, stride=2),), "member.units"),
        ((member("w", offset=6),), "member.units"),
        ((member("w", 2),), "member.dim"),
        ((member("w", -3),), "member.dim"),
        ((member("scalar"),), "member.dim"),
        ((member("x"),), "member.tensor"),
        ((member("empty", 1),), "member.tensor"),
        ((member("w", indices=(0, 6)),), "member.indices"),
        ((member("w", indices=(0, 1, 2), units=2),), "member.indices"),
    ],
)
def test_wrong_members_are_an_error_with_the_field(parts: tuple[Member, ...], field: str) -> None:
    model = {name: Parameter(torch.ones(shape)) for name, shape in SHAPES.items()}
    with pytest.raises(InvalidSpec) as caught:
        resolved(model, [Group("g", parts)])
    assert caught.value.field == field


def test_the_default_of_units_is_the_most_that_fit() -> None:
    model = {"w": Parameter(torch.ones(7, 4))}
    for part, units in (
        (member("w"), 7),
        (member("w", offset=2), 5),
        (member("w", stride=3), 2),
        (member("w", 1, indices=(3, 0)), 2),
    ):
        assert resolved(model, [Group("g", (part,))]).groups[0].members[0].units == units


def test_channels_are_pruned_with_their_batch_norm_and_the_next_input(
    channel: grpc.Channel,
) -> None:
    """Over the wire: a channel before a flatten of 4 is 4 columns after it."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "conv.weight": (8, 3, 3, 3),
        "bn.weight": (8,),
        "bn.bias": (8,),
        "fc.weight": (5, 32),
        "fc.bias": (5,),
    }
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    parts = [
        spec_pb2.Member(tensor="conv.weight"),
        spec_pb2.Member(tensor="bn.weight", unscored=True),
        spec_pb2.Member(tensor="bn.bias", unscored=True),
        spec_pb2.Member(tensor="fc.weight", dim=1, stride=4, unscored=True),
    ]
    spec = raw.spec(
        granularity=spec_pb2.GRANULARITY_GROUP,
        scope=spec_pb2.SCOPE_GLOBAL,
        magnitude=spec_pb2.Magnitude(p=2),
        count=3,
        groups=[spec_pb2.Group(members=parts)],
    )
    data = safetensors.torch.save(tensors)
    first = raw.header("Prune", len(data), spec=spec, output=pruner_pb2.OUTPUT_DENSE)
    answer = raw.send(channel, "Prune", [raw.message("Prune", header=first, data=data)])
    (choice,) = answer[0].result.report.rules[0].choices
    found = safetensors.torch.load(b"".join(message.data for message in answer))
    norms = torch.linalg.vector_norm(tensors["conv.weight"].double(), dim=(1, 2, 3))
    kept = torch.ones(8)
    kept[norms.argsort()[:3]] = 0.0
    expected = {
        "conv.weight": kept.view(8, 1, 1, 1),
        "bn.weight": kept,
        "bn.bias": kept,
        "fc.weight": kept.repeat_interleave(4),
        "fc.bias": torch.ones(5),
    }
    assert list(choice.tensors) == ["groups[0]"]
    assert (choice.candidates, choice.requested, choice.pruned) == (8, 3, 3)
    assert choice.threshold == pytest.approx(float(norms.sort().values[2]) / math.sqrt(27))
    for name, mask in expected.items():
        assert torch.equal(found[name], tensors[name] * mask), name
