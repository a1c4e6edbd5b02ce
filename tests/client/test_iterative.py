"""Repeated pruning: rule after rule, call after call, as PruningContainer does."""

import math
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import secateur
from tests.conftest import examples
from tests.reference import (
    Step,
    all_l1,
    assert_same_masks,
    by_torch,
    custom,
    distinct,
    identity,
    l1,
    ln,
    masks_of,
    module_of,
    place,
    prune,
    torch_masks,
)

SHAPES = {"a.weight": (6, 5, 4), "b": (8, 7)}
BOTH = list(SHAPES)


def model(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """No two elements have the same magnitude."""
    whole = distinct((120 + 56,), dtype, seed)
    return {"a.weight": whole[:120].view(6, 5, 4), "b": whole[120:].view(8, 7)}


SCORES = model(seed=1)
MASKS = {name: scores > -0.4 for name, scores in model(seed=2).items()}

DETERMINISTIC: dict[str, Step] = {
    "identity": identity(BOTH),
    "l1": l1(BOTH, 0.3),
    "l1 int": l1(BOTH, 7),
    "l1 scored": l1(BOTH, 0.3, SCORES),
    "l2 rows": ln(BOTH, 0.4, 2, 0),
    "l1 columns": ln(BOTH, 1, 1, -1),
    "max columns": ln(BOTH, 0.3, math.inf, 1),
    "rows scored": ln(BOTH, 2, 2, 0, SCORES),
    "global": all_l1(BOTH, 0.3),
    "global scored": all_l1(BOTH, 30, {"b": SCORES["b"]}),
    "custom": custom(MASKS),
}
RANDOM: dict[str, secateur.Spec] = {
    "random": secateur.random_unstructured("*", 0.3, seed=1),
    "random rows": secateur.random_structured("*", 0.4, dim=0, seed=2),
    "random columns": secateur.random_structured("*", 1, dim=-1, seed=2),
    "global random": secateur.global_unstructured("*", 0.3, importance="random", seed=3),
}
SPECS = {name: step.spec for name, step in DETERMINISTIC.items()} | RANDOM


def first_on_torch(client: secateur.Client, name: str) -> torch.nn.Module:
    """A module after the first step. Torch has no seeds for a call: it takes our masks."""
    if name in DETERMINISTIC:
        return by_torch(model(), DETERMINISTIC[name])
    return by_torch(model(), custom(client.prune(model(), RANDOM[name]).masks))


def four_ways(
    client: secateur.Client, first: str, second: str
) -> Mapping[str, Mapping[str, Tensor]]:
    """The masks after two steps, in one call and in two."""
    pair = client.prune(model(), SPECS[first], output="reparametrized").state_dict("reparametrized")
    module = module_of(model())
    client.prune(module, SPECS[first]).apply_to(module)
    torchs = first_on_torch(client, first)
    sources = {"a state_dict": pair, "a module": module, "a module of torch's": torchs}
    found = {name: client.prune(source, SPECS[second]).masks for name, source in sources.items()}
    return {"one spec": client.prune(model(), SPECS[first] + SPECS[second]).masks, **found}


@pytest.mark.parametrize("first", SPECS)
@pytest.mark.parametrize("second", DETERMINISTIC)
def test_two_steps_are_torchs_two_steps(client: secateur.Client, first: str, second: str) -> None:
    module = first_on_torch(client, first)
    DETERMINISTIC[second].on(module)
    for way, masks in four_ways(client, first, second).items():
        assert masks.keys() == masks_of(module).keys(), way
        for name, mask in masks_of(module).items():
            assert torch.equal(masks[name], mask), (way, name)


@pytest.mark.parametrize("first", SPECS)
@pytest.mark.parametrize("second", RANDOM)
def test_a_random_second_step_is_the_same_in_every_way(
    client: secateur.Client, first: str, second: str
) -> None:
    before = client.prune(model(), SPECS[first]).masks
    ways = four_ways(client, first, second)
    for masks in ways.values():
        assert_same_masks(masks, ways["one spec"])
        assert not any(bool((masks[name] & ~before[name]).any()) for name in BOTH)


def left(mask: Tensor, dim: int | None) -> int:
    """Units that have an element left."""
    return int((mask if dim is None else mask.movedim(dim, 0).flatten(1).any(1)).sum())


@pytest.mark.parametrize("first", SPECS)
@pytest.mark.parametrize(("second", "dim"), [("random", None), ("random rows", 0)])
def test_a_random_second_step_counts_unpruned_units(
    client: secateur.Client, first: str, second: str, dim: int | None
) -> None:
    before = client.prune(model(), SPECS[first]).masks
    result = client.prune(model(), SPECS[first] + SPECS[second])
    fraction = 0.3 if dim is None else 0.4
    for name, choice in zip(BOTH, result.report.rules[1], strict=True):
        units = left(before[name], dim)
        assert (choice.candidates, choice.pruned) == (units, round(fraction * units))
        assert left(result.masks[name], dim) == units - choice.pruned


@st.composite
def sequences(draw: st.DrawFn) -> list[Step]:
    fraction, dim = st.floats(0, 0.6), st.sampled_from([0, 1, -1, -2])
    names = st.lists(st.sampled_from(BOTH), min_size=1, unique=True)
    makers: list[Callable[[], Step]] = [
        lambda: l1(draw(names), draw(fraction)),
        lambda: l1(BOTH, draw(fraction), SCORES),
        lambda: ln(draw(names), draw(fraction), draw(st.sampled_from([1, 2, math.inf])), draw(dim)),
        lambda: all_l1(draw(names), draw(fraction)),
        lambda: custom({name: MASKS[name] for name in draw(names)}),
    ]
    return [draw(st.sampled_from(makers))() for _ in range(draw(st.integers(1, 5)))]


@examples(100)
@given(steps=sequences(), seed=st.integers(0, 1000))
def test_any_sequence_is_torchs(client: secateur.Client, steps: list[Step], seed: int) -> None:
    """In one spec, and in one call after another."""
    tensors = model(torch.float64, seed)
    expected = torch_masks(tensors, *steps)
    whole = steps[0].spec
    for step in steps[1:]:
        whole = whole + step.spec
    assert_same_masks(client.prune(tensors, whole).masks, expected)
    state: dict[str, Tensor] = tensors
    for step in steps:
        state = client.prune(state, step.spec).state_dict("reparametrized")
    found = {n.removesuffix("_mask"): t == 1 for n, t in state.items() if n.endswith("_mask")}
    assert_same_masks(found, expected)


@pytest.mark.parametrize(
    ("spec", "elements"),
    [
        (secateur.l1_unstructured("w", 0.5), 1),
        (secateur.random_unstructured("w", 0.5), 1),
        (secateur.global_unstructured("w", 0.5), 1),
        (secateur.ln_structured("w", 0.5, n=2, dim=0), 3),
        (secateur.random_structured("w", 0.5, dim=-2), 3),
    ],
    ids=["l1", "random", "global", "ln", "random slices"],
)
def test_half_and_half_again_of_ten_is_seven(
    client: secateur.Client, spec: secateur.Spec, elements: int
) -> None:
    tensors = {"w": distinct((10, elements) if elements > 1 else (10,))}
    in_one = client.prune(tensors, spec + spec)
    in_two = client.prune(client.prune(tensors, spec).state_dict("reparametrized"), spec)
    for result in (in_one, in_two):
        assert int((~result.masks["w"]).sum()) == 7 * elements
        assert result.report.rules[-1][0].candidates == 5


def test_pruned_slices_do_not_count(client: secateur.Client) -> None:
    mask = torch.ones(10, 3)
    mask[4] = 0  # an unstructured mask may prune a whole row
    mask[7, :2] = 0
    steps = custom({"w": mask}) + ln(["w"], 0.5, 2, 0)
    result = client.prune({"w": distinct((10, 3))}, steps.spec)
    assert result.report.rules[1][0].candidates == 9
    assert result.report.rules[1][0].pruned == 4  # half of 9, to the even count
    assert_same_masks(result.masks, torch_masks({"w": distinct((10, 3))}, steps))


@pytest.mark.parametrize(("n", "first"), [(1, 2), (2, 1), (0, 3), (-math.inf, 0)])
def test_pruned_elements_are_zero_in_the_norm_of_a_slice(
    client: secateur.Client, n: float, first: int
) -> None:
    weight = torch.tensor([[9.0, 9, 9, 9], [4, 4, 4, 4], [1, 1, 1, 8], [1, 7, 7, 7]])
    mask = torch.ones(4, 4)
    mask[0, 0] = 0  # the smallest magnitude of row 0 is now 0
    mask[2, 3] = 0 if n == 1 else 1  # without its 8, row 2 is the lightest
    mask[3, :3] = 0 if n == 0 else 1  # one element is left
    steps = custom({"w": mask}) + ln(["w"], 1, n, 0)
    masks = client.prune({"w": weight}, steps.spec).masks
    assert left(masks["w"], 0) == 3
    assert not bool(masks["w"][first].any())
    assert_same_masks(masks, torch_masks({"w": weight}, steps))


def test_scores_of_pruned_elements_count_in_the_norm_of_a_slice(client: secateur.Client) -> None:
    """As in torch, which takes the scores as they are."""
    mask, scores = torch.ones(2, 3), torch.ones(2, 3)
    mask[0, 0], scores[0, 0] = 0, 100
    steps = custom({"w": mask}) + ln(["w"], 1, 2, 0, {"w": scores})
    masks = client.prune({"w": torch.ones(2, 3)}, steps.spec).masks
    assert masks["w"].tolist() == [[False, True, True], [False, False, False]]
    assert_same_masks(masks, torch_masks({"w": torch.ones(2, 3)}, steps))


def test_a_nan_in_the_scores_of_a_slice_is_refused_even_where_it_is_pruned(
    client: secateur.Client,
) -> None:
    mask, scores = torch.ones(2, 3), torch.ones(2, 3)
    mask[0, 0], scores[0, 0] = 0, math.nan
    steps = custom({"w": mask}) + ln(["w"], 1, 2, 0, {"w": scores})
    with pytest.raises(secateur.InvalidSpec, match="NaN"):
        client.prune({"w": torch.ones(2, 3)}, steps.spec)


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int64, torch.float64], ids=str)
def test_a_prior_mask_may_have_any_dtype(client: secateur.Client, kind: torch.dtype) -> None:
    weight = distinct((8, 7))
    pair = {"w_orig": weight, "w_mask": (distinct((8, 7), seed=1) > 0).to(kind)}
    module = by_torch({"w": weight}, custom({"w": pair["w_mask"]}), l1(["w"], 0.5))
    assert_same_masks(
        client.prune(pair, secateur.l1_unstructured("w", 0.5)).masks, masks_of(module)
    )


def test_tensors_that_no_rule_names_keep_their_masks(client: secateur.Client) -> None:
    first = client.prune(model(), SPECS["l1"])
    result = client.prune(first.state_dict("reparametrized"), secateur.l1_unstructured("b", 0.5))
    assert result.masks.keys() == {"b"}
    state = result.state_dict("reparametrized")
    assert torch.equal(state["a.weight_mask"] == 1, first.masks["a.weight"])


def test_torch_prunes_the_servers_result_further(client: secateur.Client) -> None:
    module = module_of(model())
    client.prune(module, SPECS["l2 rows"]).apply_to(module)
    prune.l1_unstructured(*place(module, "b"), 0.3)
    expected = torch_masks(model(), DETERMINISTIC["l2 rows"], l1(["b"], 0.3))
    assert_same_masks(masks_of(module), expected)


def test_pruning_again_and_again_prunes_everything(client: secateur.Client) -> None:
    state = model()
    for _ in range(4):
        state = client.prune(state, secateur.global_unstructured("*", 1.0)).state_dict(
            "reparametrized"
        )
    result = client.prune(state, secateur.ln_structured("*", 0.5, n=2, dim=0))
    assert result.report.sparsity == 1
    assert all(choice.candidates == 0 for choice in result.report.rules[0])
