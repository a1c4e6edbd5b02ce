"""Permuted channels: masks keep more, and the model computes the same."""

from itertools import permutations
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import secateur
from secateur.units.channel_search import found_order, kept_importance
from tests.shrinking.tiny_transformers import outputs, tiny

Floats = npt.NDArray[np.float64]


def naive_kept(rows: Floats, order: Any, n: int, m: int) -> float:
    """What N:M masks keep of rows whose columns are put in an order, in loops."""
    total = 0.0
    for row in rows:
        for begin in range(0, len(row), m):
            block = sorted(float(row[column]) for column in order[begin : begin + m])
            total += sum(block[-n:])
    return total


def uneven(rows: int, columns: int, seed: int = 0) -> Floats:
    """Columns of very different sizes, in the order of their sizes."""
    rng = np.random.default_rng(seed)
    return np.abs(rng.standard_normal((rows, columns))) * np.exp(np.linspace(0, 3, columns))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8)])
def test_the_kept_importance(n: int, m: int) -> None:
    rows = uneven(5, 16)
    order = np.random.default_rng(1).permutation(16)
    found = kept_importance(rows.T, order.reshape(-1, m), n)
    assert found == pytest.approx(naive_kept(rows, order, n, m), rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8)])
def test_a_search_finds_a_better_order(n: int, m: int) -> None:
    rows = uneven(20, 64)
    order = found_order(rows.T.astype(np.float32), n, m, 0)
    assert sorted(order.ravel()) == list(range(64))
    before = naive_kept(rows, range(64), n, m)
    assert naive_kept(rows, order.ravel(), n, m) > before + 0.01 * rows.sum()


def test_the_best_order_of_few_channels() -> None:
    """Of eight channels all orders are tried."""
    for seed in range(4):
        rows = uneven(3, 8, seed)
        order = found_order(rows.T.astype(np.float32), 2, 4, 0).ravel()
        best = max(
            naive_kept(rows, (0, *rest, *(c for c in range(1, 8) if c not in rest)), 2, 4)
            for rest in permutations(range(1, 8), 3)
        )
        start = naive_kept(rows, range(8), 2, 4)
        assert naive_kept(rows, order, 2, 4) >= start + 0.8 * (best - start)


def mlp() -> Any:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 5)).double()
    with torch.no_grad():
        model[2].weight *= torch.linspace(0, 3, 32).exp()
    return model


HIDDEN = secateur.group(
    "hidden", secateur.member("0.weight"), secateur.member("0.bias"), secateur.member("2.weight", 1)
)


def test_an_mlp(client: secateur.Client) -> None:
    model, data = mlp(), torch.randn(4, 6, dtype=torch.float64)
    plan = secateur.channel_permutation(model, [HIDDEN])
    found = plan.groups["hidden"]
    rows = model[2].weight.detach().abs().numpy()
    assert found.readers == ("2.weight",)
    assert found.before == pytest.approx(naive_kept(rows, range(32), 2, 4))
    assert found.after == pytest.approx(naive_kept(rows, found.permutation, 2, 4))
    assert found.total == pytest.approx(rows.sum())
    assert plan.gain == found.gain == pytest.approx((found.after - found.before) / found.total)
    assert plan.gain > 0.01
    assert (plan.permutations["hidden"] == found.permutation).all()
    permuted = plan.apply(model)
    assert list(permuted) == list(model.state_dict())
    expected = model(data)
    spec = secateur.n_m_structured("2.weight")
    kept = [
        float(client.prune(source, spec).state_dict("dense")["2.weight"].abs().sum())
        for source in (model, permuted)
    ]
    np.testing.assert_allclose(kept, [found.before, found.after], rtol=1e-12)
    model.load_state_dict(permuted)
    torch.testing.assert_close(model(data), expected, rtol=1e-12, atol=1e-12)
    again = secateur.channel_permutation(mlp(), [HIDDEN])
    assert (again.permutations["hidden"] == found.permutation).all()


class ConvNet(nn.Module):
    """Batch norms, a skip, a grouped and a depthwise convolution, and a flat layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.inner = nn.Conv2d(16, 8, 3, padding=1, groups=2)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.full, self.back = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 16, 1)
        self.last = nn.Linear(16 * 16, 4)

    def forward(self, images: Tensor) -> Any:
        states = self.norm(self.first(images)).relu()
        states = states + self.back(self.full(self.deep(self.inner(states))).relu())
        return self.last(states.flatten(1))


def assert_same(model: Any, groups: Any, data: Tensor) -> Any:
    plan = secateur.channel_permutation(model, groups)
    expected = model(data)
    model.load_state_dict(plan.apply(model))
    torch.testing.assert_close(model(data), expected, rtol=1e-10, atol=1e-10)
    return plan


def test_a_convolutional_net() -> None:
    torch.manual_seed(0)
    model: Any = ConvNet().double()
    images = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for _ in range(3):
        model(images + torch.randn(1, dtype=torch.float64))
    model.eval()
    with torch.no_grad():
        model.back.weight *= torch.linspace(0, 3, 8).exp()[None, :, None, None]
    groups = secateur.groups(model, images)
    names = {member.tensor for group in groups for member in group.members}
    assert {"norm.running_mean", "deep.weight", "last.weight", "back.weight"} <= names
    plan = assert_same(model, groups, images)
    readers = {name for group in plan.groups.values() for name in group.readers}
    assert "back.weight" in readers
    moved = [one for one in plan.groups.values() if (np.diff(one.permutation) != 1).any()]
    assert moved
    assert plan.gain > 0


def test_slices_of_a_stride_and_buffers_move_with_their_unit() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1, bias=False), nn.Flatten()
    )
    model.append(nn.Linear(8 * 4, 3))
    model = model.double()
    images = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    model(images)
    model.eval()
    with torch.no_grad():
        model[2].weight *= torch.linspace(0, 3, 8).exp()[None, :, None, None]
    members = [secateur.member(f"0.{part}") for part in ("weight", "bias")]
    members += [secateur.member(f"1.{part}") for part in ("weight", "bias")]
    members += [
        secateur.member(f"1.{part}", masked=False) for part in ("running_mean", "running_var")
    ]
    first = secateur.group("first", *members, secateur.member("2.weight", 1))
    flat = secateur.group(
        "flat", secateur.member("2.weight"), secateur.member("4.weight", 1, stride=4)
    )
    mean = model[1].running_mean.clone()
    plan = assert_same(model, [first, flat], images)
    permutation = plan.permutations["first"]
    assert (np.diff(permutation) != 1).any()
    assert torch.equal(model[1].running_mean, mean[permutation])
    assert plan.groups["flat"].readers == ()
    assert (plan.permutations["flat"] == np.arange(8)).all()


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_a_transformer(name: str) -> None:
    model = tiny(name)
    config = model.config.to_dict() | {"model_type": name}
    groups = secateur.transformer_groups(config, ["intermediate", "kv_heads"], source=model)
    expected = outputs(model)
    plan = secateur.channel_permutation(model, groups)
    assert plan.gain > 0
    model.load_state_dict(plan.apply(model))
    torch.testing.assert_close(outputs(model), expected, rtol=1e-10, atol=1e-10)


def test_channels_of_values_within_heads() -> None:
    """A channel of a KV head is read by each of its query heads."""
    model = tiny("llama")
    groups = [
        secateur.group(
            f"{layer} {head}",
            *(
                secateur.member(
                    f"model.layers.{layer}.self_attn.v_proj.{part}", 0, 8 * head, units=8
                )
                for part in ("weight", "bias")
            ),
            *(
                secateur.member(
                    f"model.layers.{layer}.self_attn.o_proj.weight", 1, 8 * query, units=8
                )
                for query in (2 * head, 2 * head + 1)
            ),
        )
        for layer in range(3)
        for head in range(2)
    ]
    expected = outputs(model)
    plan = secateur.channel_permutation(model, groups)
    assert plan.gain > 0
    assert plan.groups["0 0"].readers == ("model.layers.0.self_attn.o_proj.weight",)
    model.load_state_dict(plan.apply(model))
    torch.testing.assert_close(outputs(model), expected, rtol=1e-10, atol=1e-10)


def test_importances() -> None:
    model = mlp()
    data = torch.randn(50, 6, dtype=torch.float64)
    statistics = secateur.calibrate(model, [data])
    with torch.no_grad():
        rms = model[:2](data).square().mean(0).sqrt().numpy()
    weight = model[2].weight.detach().abs().numpy()
    ria = (weight / weight.sum(0) + weight / weight.sum(1)[:, None]) * np.sqrt(rms)
    for kind, rows in {"wanda": weight * rms, "ria": ria}.items():
        plan = secateur.channel_permutation(model, [HIDDEN], importance=kind, statistics=statistics)
        assert plan.groups["hidden"].total == pytest.approx(rows.sum())
        given = secateur.channel_permutation(model, [HIDDEN], importance={"2.weight": rows})
        permutation = plan.permutations["hidden"]
        assert given.gain == pytest.approx(plan.gain)
        kept = plan.groups["hidden"].after
        assert kept == pytest.approx(naive_kept(rows, permutation, 2, 4))


def test_masks_of_ria_keep_what_the_plan_says(client: secateur.Client) -> None:
    model, data = mlp(), torch.randn(50, 6, dtype=torch.float64)
    statistics = secateur.calibrate(model, [data])
    plan = secateur.channel_permutation(model, [HIDDEN], importance="ria", statistics=statistics)
    model.load_state_dict(plan.apply(model))
    statistics = secateur.calibrate(model, [data])
    weight, rms = model[2].weight.detach().abs().numpy(), statistics["2.weight"].rms
    ria = (weight / weight.sum(0) + weight / weight.sum(1)[:, None]) * np.sqrt(rms)
    spec = secateur.ria("2.weight", None, statistics, n_m=(2, 4))
    kept = ria[client.prune(model, spec).masks["2.weight"].numpy()].sum()
    assert kept == pytest.approx(plan.groups["hidden"].after, rel=1e-6)


def test_conv1d_pairs_halves_and_ties() -> None:
    """The other dimension; a pair and its mask; bfloat16; a tensor with two names."""
    rng = np.random.default_rng(0)
    down = torch.tensor(uneven(6, 32).T.copy()).bfloat16()
    table = torch.tensor(rng.random((32, 3)))
    state = {"up": table, "down": down, "tied": table}
    group = secateur.group("g", secateur.member("up"), secateur.member("down"))
    plan = secateur.channel_permutation(state, [group], dim=0)
    permutation = plan.permutations["g"]
    permuted = plan.apply(state)
    assert torch.equal(permuted["down"], down[permutation])
    assert permuted["tied"] is permuted["up"]
    assert torch.equal(permuted["up"], table[permutation])
    model = mlp()
    mask = torch.rand(5, 32) < 0.7
    prune.custom_from_mask(model[2], "weight", mask)  # type: ignore[no-untyped-call]
    plan = secateur.channel_permutation(model, [HIDDEN])
    permuted = plan.apply(model)
    assert torch.equal(permuted["2.weight_mask"].bool(), mask[:, plan.permutations["hidden"]])


def test_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    plan = secateur.channel_permutation(mlp(), [HIDDEN])
    print(plan)
    head, line = capsys.readouterr().out.splitlines()
    assert head.split() == ["group", "units", "readers", "kept", "before", "kept", "after", "gain"]
    assert line.split()[:3] == ["hidden", "32", "1"]
    assert repr(plan) == f"ChannelPermutation(1 groups, gain {plan.gain:.2%})"


def test_nothing_to_gain() -> None:
    same = {"up": np.ones((8, 2)), "down": np.ones((3, 8))}
    group = secateur.group("g", secateur.member("up"), secateur.member("down", 1))
    plan = secateur.channel_permutation(same, [group])
    assert (plan.permutations["g"] == np.arange(8)).all()
    assert plan.gain == 0
    zeros = {"up": np.ones((8, 2)), "down": np.zeros((3, 8))}
    assert secateur.channel_permutation(zeros, [group]).gain == 0
    odd = {"up": np.ones((6, 2)), "down": np.ones((3, 6))}
    assert secateur.channel_permutation(odd, [group]).groups["g"].readers == ()


STATISTICS = secateur.Statistics({})
WRONG: dict[str, dict[str, Any]] = {
    r"n: 4 is not an int in \[1, 4\)": {"n": 4},
    r"m: 1 is not an int": {"m": 1},
    "importance: 'x' is none of magnitude, wanda, ria": {"importance": "x"},
    "importance: 3 is not a mapping": {"importance": 3},
    "importance: has no array for 2.weight": {"importance": {}},
    r"importance: 2.weight: is not \[5, 32\]": {"importance": {"2.weight": np.ones(3)}},
    "statistics: are for importance": {"statistics": STATISTICS},
    "statistics: are for importance 'wanda'": {"importance": "ria"},
    "2.weight: the statistics have not its 32 inputs": {
        "importance": "ria",
        "statistics": STATISTICS,
    },
    "seed: -1 is not": {"seed": -1},
    "groups: is empty": {"groups": []},
    "b: slice 0 of dim 0 of 0.weight is in the groups twice": {
        "groups": [HIDDEN, secateur.group("b", secateur.member("0.weight"))]
    },
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message: str) -> None:
    given = {"groups": [HIDDEN], **WRONG[message]}
    with pytest.raises(secateur.SecateurError, match=message):
        secateur.channel_permutation(mlp(), **given)


def test_a_plan_for_another_model() -> None:
    plan = secateur.channel_permutation(mlp(), [HIDDEN])
    other = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 5))
    with pytest.raises(secateur.InvalidSpec, match=r"hidden: 0.weight: has other units"):
        plan.apply(other)
