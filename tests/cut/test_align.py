"""Groups that keep a multiple of units: bounds, the total, and which units are kept."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import secateur
from tests.conftest import examples


def model_of(sizes: Sequence[int], seed: int) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Vectors of random scores, each of which is a group."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"g{i}": torch.rand(size, generator=generator) for i, size in enumerate(sizes)}
    return tensors, [secateur.group(name, secateur.member(name)) for name in tensors]


def kept_of(client: secateur.Client, tensors: dict[str, torch.Tensor], spec: Any) -> list[int]:
    """How many units of each group are kept; they must be the most important ones."""
    masks = client.prune(tensors, spec).masks
    for name, mask in masks.items():
        if mask.any() and not mask.all():
            assert tensors[name][mask].min() >= tensors[name][~mask].max()
    return [int(masks[name].sum()) for name in tensors]


@examples(100)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.integers(2, 9),
    st.floats(0, 1),
    st.sampled_from(["global", "tensor"]),
    st.integers(0, 2**32),
)
def test_groups_keep_multiples(
    client: secateur.Client, sizes: list[int], align: int, fraction: float, scope: Any, seed: int
) -> None:
    tensors, groups = model_of(sizes, seed)
    decided = kept_of(client, tensors, secateur.grouped(groups, fraction, scope=scope))
    aligned = kept_of(client, tensors, secateur.grouped(groups, fraction, scope=scope, align=align))
    free = []
    for size, before, now in zip(sizes, decided, aligned, strict=True):
        if before in (0, size) or size < align:
            assert now == before
        else:
            assert now % align == 0
            assert 0 < now <= size
            assert abs(now - before) < align
            if before % align and align < before < size - size % align:
                free.append((before, now))
    if scope == "tensor":
        assert all(2 * abs(now - before) <= align for before, now in free)
    elif len(free) == sum(map(bool, decided)):  # each may be rounded either way
        assert 2 * abs(sum(aligned) - sum(decided)) <= align
    if scope == "tensor":
        return
    # Those that are nearest to the next multiple are rounded up.
    up = [align - before % align for before, now in free if now > before]
    down = [align - before % align for before, now in free if now < before]
    assert not up or not down or max(up) <= min(down)


@pytest.mark.parametrize(
    ("units", "stride", "step"),
    [
        (3, 1, 1),
        (8, 1, 2),
        (16, 1, 4),
        (32, 1, 8),
        (64, 1, 16),
        (99, 1, 16),
        (64, 4, 4),
        (9, 64, 1),
    ],
)
def test_the_default_suits_the_size_of_a_group(
    client: secateur.Client, units: int, stride: int, step: int
) -> None:
    """A quarter of the units at most, and of slices 16 at most."""
    tensors = {"w": torch.arange(units * stride) + 1.0, "wide": torch.ones(2, units * 64)}
    members = [secateur.member("w", stride=stride)]
    members.append(secateur.member("wide", 1, stride=64, scored=False))
    groups = [secateur.group("g", *members)]
    kept = set()
    for count in range(1, units):
        spec = secateur.grouped(groups, count)
        shrinkage = client.prune(tensors, spec, "shrunk").report.shrinkage
        assert shrinkage is not None
        kept.add(len(shrinkage.groups["g"].kept))
    up = {units} if step > 1 and units % step == 0 else set()
    assert kept == set(range(step, units, step)) | up
    one = client.prune(tensors, secateur.grouped(groups, 1)).report.rules[0][0]
    assert one.pruned == 1  # other outputs do not align by default


def test_guard_rails_hold(client: secateur.Client) -> None:
    tensors, groups = model_of([32, 32], 0)
    rails = secateur.guard_rails(per_tensor={"g0": secateur.rail(min_sparsity=0.6)})
    spec = secateur.grouped(groups, 24, guard_rails=rails, align=8)
    decided = secateur.grouped(groups, 24, guard_rails=rails)
    assert kept_of(client, tensors, decided)[0] == 12  # 13 would be less than 0.6 pruned
    assert kept_of(client, tensors, spec)[0] == 8
    tight = secateur.guard_rails(min_sparsity=0.6, max_sparsity=0.7)
    with pytest.raises(secateur.InvalidSpec) as error:
        client.prune(tensors, secateur.grouped(groups, 42, guard_rails=tight, align=8))
    assert str(error.value) == (
        "spec.rules[0].selection.align: 'g0' may keep 10 to 12 of 32 units, and neither 8 nor 16; "
        "change the guard rails, or align=8"
    )
    default = client.prune(tensors, secateur.grouped(groups, 42, guard_rails=tight), "shrunk")
    assert default.report.shrinkage is not None
    assert sum(len(group.kept) for group in default.report.shrinkage.groups.values()) == 22


def test_a_target_of_operations_is_met(client: secateur.Client) -> None:
    tensors, groups = model_of([32, 32], 1)
    for target in (200, 333, 450):
        amount = secateur.target_macs(target, {"g0": 10, "g1": 5})
        kept = kept_of(client, tensors, secateur.grouped(groups, amount, align=4))
        assert all(count % 4 == 0 for count in kept)
        spent = 10 * kept[0] + 5 * kept[1]
        assert spent <= target
        assert min(10, 5) * 4 > target - spent  # no further multiple fits, unless it is dearer
    amount = secateur.target_macs(100, {"g0": 10, "g1": 5})
    spec = secateur.grouped(groups, amount, align=16)
    with pytest.raises(secateur.InvalidSpec, match="above the target of 100"):
        client.prune(tensors, spec)


def test_plans_align(client: secateur.Client) -> None:
    tensors, groups = model_of([30, 20, 9], 2)
    spec = secateur.grouped(groups, 0.5, align=4)
    plan = client.plan(tensors, spec, [0.2, 0.5, 0.8])
    for entry, fraction in zip(plan.amounts, [0.2, 0.5, 0.8], strict=True):
        kept = kept_of(client, tensors, secateur.grouped(groups, fraction, align=4))
        pruned = [entry.tensors[name].pruned for name in tensors]
        assert pruned == [t.numel() - k for t, k in zip(tensors.values(), kept, strict=True)]


def test_align_needs_groups(client: secateur.Client) -> None:
    spec = secateur.l1_unstructured("w", 1)
    spec.rules[0].message.selection.align = 2
    with pytest.raises(secateur.InvalidSpec, match=r"selection\.align: 2: needs groups"):
        client.prune({"w": torch.ones(4)}, spec)
