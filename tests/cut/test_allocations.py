"""Allocation of a total to tensors: uniform, ERK, LAMP, and normalized scores."""

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur_server.importance.random import Random
from secateur_server.state_dict.parameter import Parameter
from tests.conftest import examples
from tests.definition import (
    NAMES,
    SCOPES,
    SHAPES,
    Ranked,
    applied,
    assert_pruned,
    at_least,
    choose,
    elements,
    kept_of,
    models,
    rule,
    sizes,
    without,
)

many = examples(50)
MODELS = models()
Flat = np.ndarray[Any, np.dtype[Any]]


def shared(shares: Sequence[float], highs: Sequence[int], total: int) -> list[float]:
    """Divides a total in proportion to shares, where no number exceeds its maximum.

    Tries which numbers are at their maximum.
    """
    for full in itertools.product([False, True], repeat=len(shares)):
        rest = total - sum(high for high, at in zip(highs, full, strict=True) if at)
        free = sum(share for share, at in zip(shares, full, strict=True) if not at)
        scale = rest / free if free else 0.0
        fits = all(
            (share * scale >= high - 1e-9) if at else (share * scale <= high + 1e-9)
            for share, high, at in zip(shares, highs, full, strict=True)
        )
        if rest >= -1e-9 and fits and (free or abs(rest) < 1e-9):
            return [h if at else s * scale for s, h, at in zip(shares, highs, full, strict=True)]
    raise AssertionError("no case fits")


def assert_rounded(counts: Sequence[int], numbers: Sequence[float]) -> None:
    """Checks largest-remainder rounding: no number rounded down has a larger remainder."""
    assert all(abs(c - x) < 1 + 1e-9 for c, x in zip(counts, numbers, strict=True))
    whole = [round(x) for x in numbers]
    parts = [
        (c > x, x - math.floor(x))
        for c, x, w in zip(counts, numbers, whole, strict=True)
        if abs(x - w) > 1e-9
    ]
    up = [part for is_up, part in parts if is_up]
    down = [part for is_up, part in parts if not is_up]
    assert not up or not down or min(up) >= max(down) - 1e-9


@many
@given(model=models(), allocation=st.sampled_from(["uniform", "erk"]), data=st.data())
def test_allocated_totals_are_exact(
    model: dict[str, Parameter], allocation: str, data: st.DataObject
) -> None:
    of_all, amount = data.draw(st.booleans()), data.draw(st.floats(0, 1))
    selection = rule(list(model), amount, of_all=of_all, allocation=allocation)
    masks, (choice,) = applied(model, selection)
    ranked = [elements(parameter) for parameter in model.values()]
    units, candidates = sizes(ranked)
    count = max(
        0, round(amount * units) - (units - candidates) if of_all else round(amount * candidates)
    )
    assert choice.requested == choice.pruned == count
    kept = [int(masks[name].sum()) for name in model]
    assert sum(kept) == candidates - count
    shares = [float(len(r.candidates if of_all else r.order)) for r in ranked]
    if allocation == "erk":
        shares = [float(sum(parameter.weight.shape)) for parameter in model.values()]
    assert_rounded(kept, shared(shares, [len(r.order) for r in ranked], candidates - count))
    for (name, parameter), units_of_one in zip(model.items(), ranked, strict=True):
        pruned = units_of_one.order[: len(units_of_one.order) - int(masks[name].sum())]
        assert torch.equal(masks[name], without(parameter, pruned)), name


@examples(50)
@given(shapes=st.lists(SHAPES, min_size=2, max_size=4), sparsity=st.floats(0, 1))
def test_erk_densities_are_those_of_rigl(shapes: list[list[int]], sparsity: float) -> None:
    model = {name: Parameter(torch.rand(shape)) for name, shape in zip(NAMES, shapes, strict=False)}
    total = sum(math.prod(shape) for shape in shapes)
    count = round(sparsity * total)
    masks, _ = applied(model, rule(list(model), count, allocation="erk"))
    densities = rigl_densities(shapes, count / total)
    numbers = [d * math.prod(shape) for d, shape in zip(densities, shapes, strict=True)]
    assert_rounded([int(mask.sum()) for mask in masks.values()], numbers)


def rigl_densities(shapes: list[list[int]], sparsity: float) -> list[float]:
    """get_sparsities_erdos_renyi of RigL (Evci et al. 2020), with erk_power_scale 1."""
    dense: set[int] = set()
    while len(dense) < len(shapes):
        divisor, rhs, raw = 0.0, 0.0, {}
        for layer, shape in enumerate(shapes):
            parameters = math.prod(shape)
            if layer in dense:
                rhs -= parameters * sparsity
            else:
                rhs += parameters * (1 - sparsity)
                raw[layer] = sum(shape) / parameters
                divisor += raw[layer] * parameters
        epsilon, largest = rhs / divisor, max(raw.values())
        if largest * epsilon <= 1:
            return [1.0 if n in dense else epsilon * raw[n] for n in range(len(shapes))]
        dense |= {layer for layer, value in raw.items() if value == largest}
    return [1.0] * len(shapes)


def lamp(ranked: Ranked) -> Ranked:
    """Lee et al. 2021: w_u^2 over the sum of w_v^2 of all v from u on, in ascending order."""
    scores = [Fraction(0)] * len(ranked.candidates)
    for place, unit in enumerate(ranked.order):
        rest = sum((ranked.scores[v] ** 2 for v in ranked.order[place:]), Fraction(0))
        scores[unit] = ranked.scores[unit] ** 2 / rest if rest else Fraction(0)
    return Ranked(scores, ranked.candidates)


@many
@given(model=MODELS, amount=st.floats(0, 1), scope=st.sampled_from(["global", "isomorphic"]))
def test_lamp_selects_by_the_scores_of_the_paper(
    model: dict[str, Parameter], amount: float, scope: str
) -> None:
    masks, choices = applied(model, rule(list(model), amount, scope=scope, allocation="lamp"))
    for names, choice in zip(SCOPES[scope](list(model)), choices, strict=True):
        ranked = [lamp(elements(model[name])) for name in names]
        count = round(amount * sizes(ranked)[1])
        assert choice.requested == choice.pruned == count
        assert_pruned(model, masks, names, choose(ranked, at_least(count)))


@many
@given(
    model=models(dtypes=[torch.float64, torch.float32], most=3),
    kind=st.sampled_from(["mean", "norm", "z_score"]),
    data=st.data(),
)
def test_normalized_scores_are_those_of_numpy(
    model: dict[str, Parameter], kind: str, data: st.DataObject
) -> None:
    weights = [p.weight.flatten().double().abs().numpy() for p in model.values()]
    kept = [kept_of(parameter).flatten().numpy() for parameter in model.values()]
    scores = [normalized(w, k, kind) for w, k in zip(weights, kept, strict=True)]
    candidates = np.concatenate([s[k] for s, k in zip(scores, kept, strict=True)])
    count = data.draw(st.integers(0, len(candidates)))
    masks, (choice,) = applied(model, rule(list(model), count, normalization=kind))
    lost, left = [], []
    for mask, score, was_kept in zip(masks.values(), scores, kept, strict=True):
        is_kept = mask.flatten().numpy()
        lost += score[was_kept & ~is_kept].tolist()
        left += score[was_kept & is_kept].tolist()
    assert len(lost) == choice.pruned == count
    # Scores of float32 weights are rounded to float32.
    slack = 1e-6 * max(1.0, *np.abs(candidates)) if len(candidates) else 0.0
    assert max(lost, default=-math.inf) <= min(left, default=math.inf) + slack
    if lost:
        assert choice.threshold == pytest.approx(max(lost), abs=slack)


def normalized(values: Flat, kept: Flat, kind: str) -> Flat:
    candidates = values[kept] if kept.any() else np.zeros(1)
    shift = candidates.mean() if kind == "z_score" else 0.0
    spreads = {
        "mean": candidates.mean(),
        "norm": np.linalg.norm(candidates),
        "z_score": candidates.std(),
    }
    return (values - shift) / (float(spreads[kind]) or 1.0)


def test_random_units_come_from_all_tensors() -> None:
    model = {name: Parameter(torch.rand(40, 50)) for name in NAMES[:3]}
    masks, (choice,) = applied(model, rule(list(model), 0.3, importance=Random(1)))
    assert choice.pruned == sum(int((~mask).sum()) for mask in masks.values()) == 1800
    assert choice.threshold is None
    assert all(500 < int((~mask).sum()) < 700 for mask in masks.values())
