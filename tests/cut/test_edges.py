"""Edge cases of methods beyond torch's, each of which was once a defect."""

from typing import Any

import numpy as np
import pytest
import torch

import secateur

RNG = np.random.default_rng(0)


def normal(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def planned_and_pruned(
    client: secateur.Client, model: Any, spec: secateur.Spec, amount: float
) -> tuple[Any, Any]:
    (planned,) = client.plan(model, spec, [amount]).amounts
    return planned, client.prune(model, spec).report


def test_an_amount_of_1_prunes_every_n_m_group_by_any_allocation(client: secateur.Client) -> None:
    for allocation in ("lamp", "uniform", "rank"):
        spec = secateur.select("*", 1.0, granularity="n_m", scope="global", allocation=allocation)
        report = client.prune({"w": normal(4, 8), "v": normal(2, 4)}, spec).report
        assert report.sparsity == 0.5
        assert all("2:4" in tensor.patterns for tensor in report.tensors.values())


def test_a_plan_distinguishes_one_unit_from_all_units(client: secateur.Client) -> None:
    model, spec = {"w": normal(64, 64)}, secateur.n_m_structured("*", 2, 4)
    every, one = client.plan(model, spec, [1.0, 1]).amounts
    (alone,) = client.plan(model, spec, [1]).amounts
    assert (one.norm_removed, one.choices) == (alone.norm_removed, alone.choices)
    assert every.sparsity == 0.5


def test_means_of_small_and_negative_orders_do_not_overflow(client: secateur.Client) -> None:
    model = {name: normal(8, 4000) for name in "ab"}
    for p in (0.01, -0.01, 0.3):
        spec = secateur.global_structured("*", 4, p, 0)
        masks = client.prune(model, spec).masks
        # The logarithm of the mean over p: it does not overflow.
        mean = {
            (name, row): np.log(np.mean(np.abs(values[row].astype(float)) ** p)) / p
            for name, values in model.items()
            for row in range(8)
        }
        lowest = sorted(mean, key=lambda unit: mean[unit])[:4]
        pruned = {(name, row) for name in "ab" for row in range(8) if not masks[name][row].any()}
        assert pruned == set(lowest)


def test_rails_may_allow_a_single_count(client: secateur.Client) -> None:
    rails = secateur.guard_rails(max_sparsity=0.5, min_sparsity=0.5, keep_at_least=2)
    report = client.prune({"a": normal(1, 3)}, secateur.select("*", 1, guard_rails=rails)).report
    assert report.rules[0][0].pruned == 1


def test_macs_beyond_the_range_are_refused(client: secateur.Client) -> None:
    target = secateur.target_macs(0, {"a": 1e300})
    with pytest.raises(secateur.InvalidSpec, match=r"per_unit\['a'\]: 1e\+300 is not in"):
        client.prune({"a": normal(4, 8)}, secateur.select("*", target))


def test_a_sensitivity_with_overflowing_norms_is_between_0_and_1(client: secateur.Client) -> None:
    found = client.sensitivity({name: np.full((2, 2), 1e154) for name in "ab"})
    assert all(0 <= share <= 1 for shares in found.norm_removed.values() for share in shares)


def test_a_pattern_longer_than_its_rows(client: secateur.Client) -> None:
    """Each row is one group; it is not padded to a thousand elements."""
    weights = normal(200_000, 3)
    masks = client.prune({"w": weights}, secateur.n_m_structured("*", 1, 1024)).masks["w"]
    assert np.array_equal(masks.sum(1), np.ones(200_000))
    assert np.array_equal(np.abs(weights[masks]), np.abs(weights).max(1))
    kept = client.prune({"w": weights}, secateur.n_m_structured("*", 3, 1024)).masks["w"]
    assert kept.all()


def test_norm_removed_is_0_beside_a_kept_infinity(client: secateur.Client) -> None:
    weights = normal(4, 4)
    weights[3, 3] = np.inf
    group = secateur.group("g", secateur.member("w"))
    spec = secateur.grouped([group], 1)
    planned, report = planned_and_pruned(client, {"w": weights}, spec, 1)
    assert planned.tensors["w"].pruned == report.tensors["w"].pruned == 4
    assert planned.norm_removed == 0.0


def test_errors_of_the_client_name_the_field() -> None:
    wrong: Any = {1: "a"}
    zero: Any = 0
    for make, said in (
        (lambda: secateur.threshold(10**400), "value: "),
        (lambda: secateur.magnitude(10**400), "p: "),
        (lambda: secateur.select("*", 0.5, scales=wrong), "scales: "),
        (lambda: secateur.select("*", 0.5, importance_scores=wrong), "importance_scores: "),
        (lambda: secateur.guard_rails(exclude=zero), "exclude: "),
    ):
        with pytest.raises(secateur.InvalidSpec, match=f"^{said}"):
            make()


def test_an_amount_of_a_plan_that_is_too_large_is_named(client: secateur.Client) -> None:
    with pytest.raises(secateur.InvalidSpec, match=r"header\.amounts\[1\]\.count: 1000 is more"):
        client.plan({"w": normal(4, 4)}, secateur.global_unstructured("*", 0.5), [0.5, 1000])


def test_scores_may_be_given_for_the_units_of_a_group(client: secateur.Client) -> None:
    model = {"conv.weight": normal(4, 3), "next.weight": normal(5, 4)}
    members = [secateur.member("conv.weight"), secateur.member("next.weight", dim=1)]
    group, scores = secateur.group("g", *members), np.array([3, -1, 2, 0.5], np.float32)
    spec = secateur.grouped([group], 2, importance_scores={"g": scores})
    masks = client.prune(model, spec).masks
    assert masks["conv.weight"].all(1).tolist() == [True, False, True, False]
    assert masks["next.weight"].all(0).tolist() == [True, False, True, False]
    for wrong, said in (
        ({"h": scores}, "does not prune this group"),
        ({"g": scores[:3]}, r"must have shape \[4\]"),
    ):
        with pytest.raises(secateur.InvalidSpec, match=said):
            client.prune(model, secateur.grouped([group], 2, importance_scores=wrong))


def test_partly_pruned_rows_shorter_than_a_pattern(client: secateur.Client) -> None:
    model = {"w_orig": torch.tensor([[3.0, -1.0, 2.0]]), "w_mask": torch.tensor([[1.0, 1.0, 0.0]])}
    masks = client.prune(model, secateur.n_m_structured("*", 1, 8)).masks["w"]
    assert masks.tolist() == [[True, False, False]]
