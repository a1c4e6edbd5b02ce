"""Random pruning: exact counts, reproducible masks, and uniform choices."""

import hashlib
import math

import pytest
import torch
from torch import Tensor

import secateur
from tests.reference import assert_same_masks, count_of, distinct

AMOUNTS = [0, 0.0, 0.137, 0.5, 1, 1.0]
SEEDS = [0, 1, 2, 1 << 32, (1 << 64) - 1]

amounts = pytest.mark.parametrize("amount", AMOUNTS)
seeds = pytest.mark.parametrize("seed", SEEDS)


def model() -> dict[str, Tensor]:
    return {"conv.weight": distinct((12, 5, 3, 3)), "fc.weight": distinct((20, 27), seed=1)}


def masks_of(client: secateur.Client, spec: secateur.Spec) -> dict[str, Tensor]:
    masks: dict[str, Tensor] = client.prune(model(), spec).masks
    return masks


def pruned(mask: Tensor) -> int:
    return int((~mask).sum())


@amounts
@seeds
def test_random_unstructured_prunes_the_exact_count(
    client: secateur.Client, amount: float, seed: int
) -> None:
    masks = masks_of(client, secateur.random_unstructured("*", amount, seed=seed))
    assert {n: pruned(mask) for n, mask in masks.items()} == {
        n: count_of(amount, t.numel()) for n, t in model().items()
    }


@amounts
@seeds
def test_global_random_prunes_the_exact_count_of_all_tensors(
    client: secateur.Client, amount: float, seed: int
) -> None:
    spec = secateur.global_unstructured("*", amount, importance="random", seed=seed)
    masks = masks_of(client, spec)
    assert sum(map(pruned, masks.values())) == count_of(amount, 540 + 540)
    if amount == 0.5:  # both tensors have a part of it
        assert all(200 < pruned(mask) < 340 for mask in masks.values())


@amounts
@pytest.mark.parametrize("dim", [0, 1, -1, -2])
def test_random_structured_prunes_whole_slices_of_the_exact_count(
    client: secateur.Client, amount: float, dim: int
) -> None:
    masks = masks_of(client, secateur.random_structured("*", amount, dim=dim, seed=3))
    for name, weight in model().items():
        rows = masks[name].movedim(dim, 0).flatten(1)
        assert torch.equal(rows.any(1), rows.all(1))
        assert pruned(rows.any(1)) == count_of(amount, weight.shape[dim])


def every_method(seed: int) -> list[secateur.Spec]:
    return [
        secateur.random_unstructured("*", 0.5, seed=seed),
        secateur.random_structured("*", 0.5, dim=0, seed=seed),
        secateur.global_unstructured("*", 0.5, importance="random", seed=seed),
    ]


@pytest.mark.parametrize("method", range(3))
def test_the_seed_decides_the_masks(client: secateur.Client, method: int) -> None:
    found = [masks_of(client, every_method(seed)[method])["fc.weight"] for seed in SEEDS]
    again = [masks_of(client, every_method(seed)[method])["fc.weight"] for seed in SEEDS]
    assert all(map(torch.equal, found, again))
    assert len({tuple(mask.flatten().tolist()) for mask in found}) == len(SEEDS)


def test_the_mask_does_not_depend_on_the_values(client: secateur.Client) -> None:
    spec = secateur.random_unstructured("*", 0.5, seed=5)
    masks = masks_of(client, spec)
    others = {n: torch.full_like(t, math.nan).bfloat16() for n, t in model().items()}
    assert_same_masks(client.prune(others, spec).masks, masks)


def test_the_mask_does_not_depend_on_other_tensors(client: secateur.Client) -> None:
    spec = secateur.random_unstructured("fc.weight", 0.5, seed=5)
    alone = client.prune({"fc.weight": model()["fc.weight"]}, spec).masks["fc.weight"]
    assert torch.equal(alone, masks_of(client, spec)["fc.weight"])


def test_tensors_of_one_shape_have_different_masks(client: secateur.Client) -> None:
    tensors = {"a": torch.ones(100), "b": torch.ones(100)}
    masks = client.prune(tensors, secateur.random_unstructured("*", 50, seed=0)).masks
    assert 10 < pruned(masks["a"] | masks["b"]) < 40  # 25 of 100 if they are unrelated


def test_the_mask_of_a_seed_never_changes(client: secateur.Client) -> None:
    """Another mask on another machine or version would change the runs of users."""
    spec = secateur.random_unstructured("w", 8, seed=7)
    mask = client.prune({"w": torch.ones(32)}, spec).masks["w"]
    assert (~mask).nonzero().flatten().tolist() == [3, 6, 9, 10, 13, 14, 21, 23]


POSITIONS, PRUNED = 64, 16


@pytest.fixture(scope="module", params=["seeds", "names"])
def draws(client: secateur.Client, request: pytest.FixtureRequest) -> Tensor:
    """Draws 16 of 64 positions with many seeds, or for many names of tensors.

    The seeds are fixed, so a bound of 5 standard deviations holds always or never.

    Returns:
        1 where a position is pruned, else 0, as [draw, position].
    """
    if request.param == "seeds":
        weight = {"w": torch.ones(POSITIONS)}
        specs = [secateur.random_unstructured("w", PRUNED, seed=seed) for seed in range(400)]
        masks = [client.prune(weight, spec).masks["w"] for spec in specs]
    else:
        tensors = {f"layers.{i}.weight": torch.ones(POSITIONS) for i in range(1000)}
        spec = secateur.random_unstructured("*", PRUNED, seed=0)
        masks = list(client.prune(tensors, spec).masks.values())
    return 1 - torch.stack(masks).double()


def test_each_position_is_equally_likely(draws: Tensor) -> None:
    p = PRUNED / POSITIONS
    spread = math.sqrt(p * (1 - p) / len(draws))
    assert bool(((draws.mean(0) - p).abs() < 5 * spread).all())


def test_neighbours_in_a_mask_are_independent(draws: Tensor) -> None:
    chance = PRUNED * (PRUNED - 1) / (POSITIONS * (POSITIONS - 1))
    both = (draws[:, 1:] * draws[:, :-1]).mean(0)
    assert bool(((both - chance).abs() < 5 * math.sqrt(chance / len(draws))).all())


def test_consecutive_draws_are_independent(draws: Tensor) -> None:
    expected = PRUNED * PRUNED / POSITIONS
    overlap = float((draws[1:] * draws[:-1]).sum(1).mean())
    assert abs(overlap - expected) < 5 * math.sqrt(expected / len(draws))


def test_each_slice_is_equally_likely(client: secateur.Client) -> None:
    tensors = {f"layers.{i}.weight": torch.ones(16, 2) for i in range(1000)}
    masks = client.prune(tensors, secateur.random_structured("*", 4, dim=0)).masks
    shares = 1 - torch.stack(list(masks.values()))[:, :, 0].double().mean(0)
    assert bool(((shares - 0.25).abs() < 5 * math.sqrt(0.25 * 0.75 / 1000)).all())


def random_key(seed: int, name: str, index: int) -> int:
    """The top 30 bits of SplitMix64, in Python's integers."""
    state = int.from_bytes(hashlib.sha256(seed.to_bytes(8, "little") + name.encode()).digest()[:8])
    state = int.from_bytes(state.to_bytes(8), "little")
    z = (state + (index + 1) * 0x9E3779B97F4A7C15) % (1 << 64)
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % (1 << 64)
    z = (z ^ z >> 27) * 0x94D049BB133111EB % (1 << 64)
    return (z ^ z >> 31) >> 34


@seeds
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 8)])
def test_random_n_m_keeps_random_elements_of_each_group(
    client: secateur.Client, seed: int, n: int, m: int
) -> None:
    spec = secateur.select(
        "fc.weight", 1.0, importance=secateur.random(seed), granularity=secateur.n_m(n, m)
    )
    mask = masks_of(client, spec)["fc.weight"]
    rows, columns = mask.shape
    for row in range(rows):
        keys = [random_key(seed, "fc.weight", row * columns + column) for column in range(columns)]
        for begin in range(0, columns, m):
            group = range(begin, min(begin + m, columns))
            expected = sorted(group, key=lambda column: (keys[column], column))[-n:]
            assert [c for c in group if mask[row, c]] == sorted(expected)


def test_a_plan_of_random_n_m_foretells_the_prune(client: secateur.Client) -> None:
    spec = secateur.select(
        "*", 0.5, importance=secateur.random(3), granularity=secateur.n_m(2, 4), scope="global"
    )
    planned = client.plan(model(), spec, [0.5]).amounts[0]
    masks = masks_of(client, spec)
    assert planned.pruned == sum(map(pruned, masks.values()))
    removed = sum(float(w[~masks[n]].double().square().sum()) for n, w in model().items())
    whole = sum(float(w.double().square().sum()) for w in model().values())
    assert planned.norm_removed == pytest.approx(math.sqrt(removed / whole))
