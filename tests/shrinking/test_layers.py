"""Each kind of layer with other sizes, and sizes that do not fit."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur
from secateur.errors import InvalidSpec, InvalidStateDict
from secateur.grouping import Group
from secateur.resizing.modules import shrunk
from tests.shrinking.cutting import assert_same, cut_module, difference, run, shrink
from tests.shrinking.groups import inputs, outputs
from tests.shrinking.nets import prepared


def pruned(kept: list[bool]) -> list[int]:
    return [unit for unit, is_kept in enumerate(kept) if not is_kept]


def grouped_conv(groups: int, each: int) -> tuple[nn.Module, list[Group]]:
    """A convolution in groups whose rows are units; so are the channels that it reads."""
    rows = groups * each
    module = nn.Sequential(
        nn.Conv1d(2, 2 * groups, 1), nn.Conv1d(2 * groups, rows, 1, groups=groups), nn.ReLU()
    )
    module.append(nn.Conv1d(rows, 2, 1))
    return prepared(module), [secateur.group("rows", *outputs("1"), *inputs("3"))]


@given(
    groups=st.integers(2, 4),
    each=st.integers(1, 4),
    bits=st.lists(st.booleans(), min_size=16, max_size=16),
)
def test_rows_of_a_grouped_convolution(groups: int, each: int, bits: list[bool]) -> None:
    """As many rows of each group are left, or an error says so; see also `whole groups`."""
    module, rows = grouped_conv(groups, each)
    kept = [bits[i % 16] for i in range(groups * each)]
    kept[0] |= not any(kept)
    masked, tensors, removed = cut_module(module, rows, {"rows": pruned(kept)})
    counts = [sum(kept[group * each : (group + 1) * each]) for group in range(groups)]
    if len(set(counts)) == 1:
        small = shrunk(module, tensors, removed)
        example = torch.randn(1, 2, 3).double()
        assert_same(run(masked, example), run(small, example))
        assert small.get_submodule("1").groups == groups
    elif set(counts) == {0, each}:
        with pytest.raises(InvalidStateDict, match=r"^1: takes \d+ inputs, and 0 makes"):
            shrunk(module, tensors, removed)  # the channels that those groups read are kept
    else:
        with pytest.raises(InvalidStateDict, match=r"^1.weight: keeps from \d to \d rows of its"):
            shrunk(module, tensors, removed)


@given(groups=st.integers(2, 4), each=st.integers(1, 3), kept=st.lists(st.booleans(), min_size=4))
def test_whole_groups_of_a_convolution(groups: int, each: int, kept: list[bool]) -> None:
    module, _ = grouped_conv(groups, each)
    kept = [*kept[: groups - 1], True]
    members = [
        secateur.member(f"{layer}.{leaf}", stride=stride, units=groups)
        for layer, stride in (("0", 2), ("1", each))
        for leaf in ("weight", "bias")
    ]
    unit = secateur.group("groups", *members, *inputs("3", stride=each, units=groups))
    masked, tensors, removed = cut_module(module, [unit], {"groups": pruned(kept)})
    small = shrunk(module, tensors, removed)
    example = torch.randn(1, 2, 3).double()
    assert_same(run(masked, example), run(small, example))
    assert small.get_submodule("1").groups == sum(kept)
    again = secateur.resize(module, secateur.sizes(small))
    again.load_state_dict(small.state_dict())
    assert_same(run(masked, example), run(again, example))


def decoder() -> tuple[nn.Module, list[Group]]:
    """Transposed convolutions, one depthwise and one in two groups, and norms."""
    module = nn.Sequential(
        nn.Linear(5, 12),
        nn.Unflatten(1, (12, 1)),
        nn.ConvTranspose1d(12, 8, 4),
        nn.Tanh(),
        nn.ConvTranspose1d(8, 8, 3, stride=2, groups=8),
        nn.GroupNorm(4, 8),
        nn.Sigmoid(),
        nn.ConvTranspose1d(8, 6, 3, groups=2),
        nn.InstanceNorm1d(6, affine=True),
        nn.ConvTranspose1d(6, 3, 3),
    )
    # A unit is a half of each group of layer 7, and two whole groups of the norm.
    halves: dict[str, Any] = {"indices": [0, 1, 4, 5, 2, 3, 6, 7], "units": 2}
    second = ("2.bias", "4.weight", "4.bias", "5.weight", "5.bias", "7.weight")
    pairs: dict[str, Any] = {"indices": [0, 3, 1, 4, 2, 5], "units": 3}
    third = ("7.bias", "8.weight", "8.bias", "9.weight")
    members = [
        [*outputs("0"), secateur.member("2.weight")],
        [secateur.member("2.weight", 1, **halves), *(secateur.member(n, **halves) for n in second)],
        [secateur.member("7.weight", 1), *(secateur.member(n, **pairs) for n in third)],
    ]
    return prepared(module), [secateur.group(str(n), *each) for n, each in enumerate(members)]


@pytest.mark.parametrize("seed", range(3))
def test_transposed_convolutions_and_norms_in_groups(seed: int) -> None:
    module, groups = decoder()
    assert difference(module, torch.randn(2, 5).double(), groups, seed) <= 1e-12


def test_layers_of_a_sequence_are_checked_against_each_other() -> None:
    module, groups = decoder()
    forgetful = secateur.group("0", *outputs("0"))
    with pytest.raises(InvalidStateDict, match=r"^2: takes 12 inputs, and 0 makes"):
        shrink(module, [forgetful, *groups[1:]])


def test_sizes_without_the_groups_of_a_convolution_may_be_too_few() -> None:
    module, _ = grouped_conv(4, 4)
    sizes = {"1.weight": [8, 2, 1], "1.bias": [8], "3.weight": [2, 8, 1]}
    with pytest.raises(InvalidStateDict, match=r"^1: weight keeps 8 of 16 rows: of 2 or of 4 conv"):
        secateur.resize(module, sizes)
    assert secateur.resize(module, {**sizes, "1.groups": 4}).get_submodule("1").groups == 4
    with pytest.raises(InvalidStateDict, match=r"^1: takes 4 inputs, and 0 makes 8"):
        secateur.resize(module, {**sizes, "1.groups": 2})
    with pytest.raises(InvalidStateDict, match=r"which are not those of 3 convolution groups"):
        secateur.resize(module, {**sizes, "1.groups": 3})
    with pytest.raises(InvalidStateDict, match=r"^7.groups: the module has no such convolution"):
        secateur.resize(module, {"7.groups": 3})
    with pytest.raises(InvalidStateDict, match=r"^1: weight keeps 7 of 16 rows, which are neither"):
        secateur.resize(module, {"1.weight": [7, 2, 1]})


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_dim = 4, 2
        self.qkv: nn.Module = nn.Linear(8, 24)
        self.proj: nn.Module = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim)).transpose(1, 3).unbind(2)
        out = nn.functional.scaled_dot_product_attention(*qkv)
        y: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return y


class UnknownAttention(Attention):
    """With an attribute of another name."""

    def __init__(self) -> None:
        super().__init__()
        self.headcount = self.heads


def attention_groups(qkv: str = "qkv", proj: str = "proj") -> list[Group]:
    rows = [8 * part + 2 * head + i for head in range(4) for part in range(3) for i in range(2)]
    members = [
        secateur.member(f"{qkv}.{leaf}", indices=rows, units=4) for leaf in ("weight", "bias")
    ]
    return [secateur.group("heads", *members, *inputs(proj, stride=2, units=4))]


class ConvAttention(Attention):
    """Over the channels of (batch, channels, positions)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Conv1d(8, 24, 1), nn.Conv1d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(1, (3, self.heads, self.head_dim)).unbind(1)
        out = nn.functional.scaled_dot_product_attention(*(one.mT for one in (q, k, v)))
        y: Tensor = self.proj(out.mT.flatten(1, 2))
        return y


class OddlyNamed(nn.Module):
    """Attention whose projections have names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = 2
        self.everything, self.back = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.everything(x).unflatten(-1, (3, -1, self.head_dim)).transpose(1, 3).unbind(2)
        out = nn.functional.scaled_dot_product_attention(*qkv)
        y: Tensor = self.back(out.transpose(1, 2).flatten(2))
        return y


def test_attention_by_hand() -> None:
    for module, example in (
        (prepared(Attention()), torch.randn(2, 5, 8)),
        (prepared(ConvAttention()), torch.randn(2, 8, 5)),
    ):
        check_attention(module, example)


def check_attention(module: Any, example: Tensor) -> None:
    masked, tensors, removed = cut_module(module, attention_groups(), {"heads": [0]})
    small: Any = shrunk(module, tensors, removed)
    assert_same(run(masked, example.double()), run(small, example.double()))
    assert (small.heads, small.head_dim, module.heads) == (3, 2, 4)


def test_attention_with_unknown_attributes_needs_a_comparison() -> None:
    module, example = prepared(UnknownAttention()), torch.randn(2, 5, 8)
    with pytest.raises(InvalidStateDict, match=r"heads is taken to be heads and headcount; give"):
        shrink(module, attention_groups())
    small: Any = shrink(module, attention_groups(), example)
    assert small.headcount == small.heads < 4
    with pytest.raises(InvalidStateDict, match=r"its attribute headcount; give all sizes"):
        secateur.resize(module, {"qkv.weight": [18, 8], "qkv.bias": [18], "proj.weight": [8, 6]})


def test_attention_with_unknown_projections_needs_a_comparison() -> None:
    module, groups = prepared(OddlyNamed()), attention_groups("everything", "back")
    with pytest.raises(InvalidStateDict, match=r"^the module: its projections lost rows, and"):
        shrink(module, groups)
    shrink(module, groups, torch.randn(2, 5, 8))


def test_keys_and_values_are_cut_alike() -> None:
    class Separate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads = 4
            self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    sizes = {
        f"{name}.{leaf}": [6, 8] if leaf == "weight" else [6]
        for name in ("query", "key")
        for leaf in ("weight", "bias")
    }
    with pytest.raises(InvalidStateDict, match=r"the module: keeps 6 rows of keys and 8 of values"):
        secateur.resize(Separate(), sizes)
    sizes.update({"value.weight": [6, 8], "value.bias": [6]})
    assert secateur.resize(Separate(), sizes).num_heads == 3
    sizes = {name: [5, 8] if len(shape) == 2 else [5] for name, shape in sizes.items()}
    with pytest.raises(InvalidStateDict, match=r"keeps 5 rows of queries, which are not whole"):
        secateur.resize(Separate(), sizes)


def test_norms_and_attention_of_torch_that_cannot_be_cut() -> None:
    norm = nn.Sequential(nn.Conv1d(2, 8, 1), nn.GroupNorm(4, 8))
    sizes: dict[str, Any] = {"0.weight": [5, 2, 1], "0.bias": [5], "1.weight": [5], "1.bias": [5]}
    with pytest.raises(InvalidStateDict, match=r"^1: weight keeps 5 channels, which are not whole"):
        secateur.resize(norm, sizes)
    attention = nn.MultiheadAttention(8, 2)
    sizes = {"in_proj_weight": [12, 8], "in_proj_bias": [12], "out_proj.weight": [8, 4]}
    with pytest.raises(InvalidStateDict, match=r"^the module: its width is 8 and its heads have 4"):
        secateur.resize(attention, sizes)
    sizes = {"in_proj_weight": [12, 4], "in_proj_bias": [12], "out_proj.weight": [4, 4]}
    small = secateur.resize(attention, {**sizes, "out_proj.bias": [4]})
    x = torch.randn(5, 1, 4)
    assert (small.embed_dim, small.num_heads) == (4, 1)
    assert small(x, x, x)[0].shape == x.shape


def test_other_layers() -> None:
    layers: dict[nn.Module, tuple[dict[str, list[int]], str]] = {
        nn.Embedding(9, 4, padding_idx=8): ({"weight": [6, 3]}, "Embedding(6, 3)"),
        nn.Bilinear(3, 4, 5): ({"weight": [2, 3, 1], "bias": [2]}, "in2_features=1"),
        nn.RMSNorm(6): ({"weight": [4]}, "RMSNorm((4,)"),
        nn.LSTM(3, 6, proj_size=4): (
            {
                "weight_ih_l0": [20, 3],
                "weight_hh_l0": [20, 2],
                "weight_hr_l0": [2, 5],
                "bias_ih_l0": [20],
                "bias_hh_l0": [20],
            },
            "LSTM(3, 5, proj_size=2)",
        ),
    }
    for layer, (sizes, text) in layers.items():
        assert text in str(secateur.resize(layer, sizes))
    with pytest.raises(InvalidStateDict, match=r"weight_ih_l0 has 21 rows, which its 4 gates"):
        secateur.resize(nn.LSTM(3, 6), {"weight_ih_l0": [21, 3]})


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [
        ({"other.weight": [1]}, r"sizes: 'other.weight' is not a tensor of the module"),
        ({"weight": [4]}, r"sizes\['weight'\]: \[4\] is not a shape of 2 lengths"),
        ({"weight": [0, 8]}, r"is not a shape of 2 lengths"),
        ({"weight": [4, True]}, r"is not a shape of 2 lengths"),
        ({"weight": "ab"}, r"is not a shape of 2 lengths"),
        ([8, 4], r"sizes: \[8, 4\] is not a mapping from names to shapes"),
        ({"weight": None}, r"is not a shape of 2 lengths"),
    ],
)
def test_wrong_sizes(sizes: Any, problem: str) -> None:
    with pytest.raises(InvalidSpec, match=problem):
        secateur.resize(nn.Linear(8, 4), sizes)
