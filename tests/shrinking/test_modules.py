"""What a smaller copy of a module has of the original, and the comparison of the two."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import secateur
from secateur.errors import InvalidStateDict
from secateur.grouping import Group, Member
from secateur.resizing.modules import shrunk
from tests.shrinking.cutting import assert_same, cut_module, run, shrink, some_units
from tests.shrinking.groups import inputs, outputs, two_layers
from tests.shrinking.nets import prepared


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.embed(tokens))
        return out


def test_tied_parameters_are_one_parameter_of_the_copy() -> None:
    module = prepared(Tied())
    groups = [secateur.group("width", secateur.member("embed.weight", 1))]
    masked, tensors, removed = cut_module(module, groups, {"width": [1, 3, 5]})
    small: Any = shrunk(module, tensors, removed, torch.arange(7))
    assert small.head.weight is small.embed.weight
    assert_same(run(masked, torch.arange(7)), run(small, torch.arange(7)))
    again = secateur.resize(module, secateur.sizes(small))
    assert again.head.weight is again.embed.weight


def test_flags_dtypes_and_hooks_are_kept() -> None:
    module, groups = two_layers()
    module = module.to(torch.bfloat16).train()
    module.get_submodule("1").eval()
    module.get_parameter("0.weight").requires_grad_(False)
    calls: list[int] = []
    module.get_submodule("2").register_forward_hook(lambda *_: calls.append(1))
    small = shrink(module.float(), groups, torch.randn(3, 4))
    for name, part in module.named_modules():
        assert small.get_submodule(name).training == part.training
    for name, parameter in module.named_parameters():
        assert small.get_parameter(name).requires_grad == parameter.requires_grad
    calls.clear()
    small(torch.randn(3, 4))
    assert calls == [1]


def test_masks_of_torch_are_gone_and_the_original_has_them() -> None:
    module: Any
    module, groups = two_layers()
    module.append(nn.LSTM(2, 3))
    for part, name in ((module[0], "weight"), (module[2], "weight"), (module[3], "weight_hh_l0")):
        prune.random_unstructured(part, name, 0.5)  # type: ignore[no-untyped-call]
    before = copy.deepcopy(list(module.state_dict().items()))
    plain = copy.deepcopy({k: v.detach().clone() for k, v in module.state_dict().items()})
    folded = nn.Sequential(*two_layers()[0], nn.LSTM(2, 3))
    for name in folded.state_dict():
        pair = plain.get(f"{name}_orig"), plain.get(f"{name}_mask")
        plain[name] = plain[name] if pair[0] is None else pair[0] * pair[1]
    folded.load_state_dict({name: plain[name] for name in folded.state_dict()})
    masked, tensors, removed = cut_module(folded, groups, some_units(folded, groups, 0))
    small: Any = shrunk(module, tensors, removed, torch.randn(3, 4))
    assert set(small.state_dict()) == set(folded.state_dict())
    assert not any(hooks._forward_pre_hooks for hooks in small.modules())
    example = torch.randn(3, 4)
    assert torch.allclose(masked(example)[0], small(example)[0], atol=1e-6)
    assert all(
        name == other and torch.equal(one, two)
        for (name, one), (other, two) in zip(before, module.state_dict().items(), strict=True)
    )
    assert module[3]._flat_weights[1] is module[3].weight_hh_l0
    assert small[3]._flat_weights[1] is small[3].weight_hh_l0


def test_layers_of_a_module_with_masks_are_checked_against_each_other() -> None:
    module: Any
    module, _ = two_layers()
    forgetful = [secateur.group("hidden", *outputs("0"))]
    _, tensors, removed = cut_module(module, forgetful, {"hidden": [1, 3, 5]})
    prune.identity(module[0], "weight")  # type: ignore[no-untyped-call]
    with pytest.raises(InvalidStateDict, match=r"^2: takes 6 inputs, and 0 makes 3; put both in"):
        shrunk(module, tensors, removed)


class Float32(nn.Module):
    """It makes a tensor of float32, so it does not run in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.one(x)) @ torch.ones(2, 2)
        return out


def test_a_module_that_does_not_run_in_float64_is_compared_in_its_own_dtype() -> None:
    module = Float32()
    right = [secateur.group("hidden", *outputs("one"), *inputs("two"))]
    shrink(module, right, torch.randn(3, 4))
    message = right[0].message
    for one in message.members:
        one.unmasked = True
    with pytest.raises(InvalidStateDict, match=r"^two: its output differs by"):
        shrink(module, [Group(message)], torch.randn(3, 4))


@pytest.mark.parametrize(
    ("example_inputs", "problem"),
    [
        (torch.randn(3, 5), r"^example_inputs: the module fails on them: mat1 and mat2 shapes"),
        ((torch.randn(3, 4), 1), r"^example_inputs: the module fails on them: .* positional arg"),
        ({"x": torch.randn(3, 4)}, r"^example_inputs: the module fails on them: .* keyword arg"),
    ],
)
def test_wrong_example_inputs(example_inputs: Any, problem: str) -> None:
    module, groups = two_layers()
    with pytest.raises(InvalidStateDict, match=problem):
        shrink(module, groups, example_inputs)


def test_a_comparison_uses_evaluation_and_the_same_random_numbers() -> None:
    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = two_layers()[0]
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.drop(self.net(x)) + torch.randn(len(x), 2)
            return out

    module = Random().train()
    groups = [secateur.group("hidden", *outputs("net.0"), *inputs("net.2"))]
    state = torch.get_rng_state()
    small = shrink(module, groups, torch.randn(3, 4, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), state)
    assert small.training
    assert small.get_submodule("drop").training


def test_cached_keys_are_not_compared() -> None:
    """The models of transformers return them, and fewer of them with fewer heads."""

    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = two_layers()[0]

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(x), "past_key_values": self.net[0](x)}

    groups = [secateur.group("hidden", *outputs("net.0"), *inputs("net.2"))]
    assert shrink(Caching(), groups, torch.randn(3, 4))(torch.randn(3, 4))["logits"].shape == (3, 2)


def test_an_output_of_the_module_must_not_be_cut() -> None:
    module, _ = two_layers()
    groups = [secateur.group("out", *outputs("2"))]
    with pytest.raises(InvalidStateDict, match=r"^the module: returns a tensor of shape \[3, 1\]"):
        shrink(module, groups, torch.randn(3, 4))


def test_a_module_that_was_not_pruned() -> None:
    module, groups = two_layers()
    _, tensors, removed = cut_module(module, groups, some_units(module, groups, 0))
    other = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 2))
    with pytest.raises(
        InvalidStateDict, match=r"^0.weight: the module has shape \[7, 4\], and the"
    ):
        shrunk(other, tensors, removed)
    with pytest.raises(InvalidStateDict, match=r"^2.weight: the module has no such tensor"):
        shrunk(module[:1], tensors, removed)
    del tensors["2.bias"]
    with pytest.raises(InvalidStateDict, match=r"^2.bias: the result has no such tensor"):
        shrunk(module, tensors, removed)
    with pytest.raises(InvalidStateDict, match=r"a torch.nn.Module is needed, not dict"):
        shrunk({}, tensors, removed)  # type: ignore[arg-type]


def test_parametrized_weights() -> None:
    """The weight of such a layer is not a parameter: it is computed from others."""
    module = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 2)
    )
    names = ("bias", "parametrizations.weight.original0", "parametrizations.weight.original1")
    members = [secateur.member(f"0.{name}") for name in names]
    # The norm of a row of zeros is zero, and 0 / 0 is NaN: the directions keep their values.
    members[-1] = secateur.member(f"0.{names[-1]}", masked=False)
    groups = [secateur.group("hidden", *members, *inputs("2"))]
    small: Any = shrink(module, groups, torch.randn(3, 4))
    assert small[0].out_features == len(small[0].bias) < 6


def test_a_group_without_a_name(client: secateur.Client) -> None:
    module, (group,) = two_layers()
    unnamed = secateur.group("", *map(Member, group.message.members))
    result = client.prune(module, secateur.grouped([unnamed], 4, align=1), output="shrunk")
    assert result.report.shrinkage is not None
    assert result.report.shrinkage.groups.keys() == {"groups[0]"}
    assert result.shrink(module, torch.randn(3, 4)).get_submodule("0").out_features == 2


def test_a_size_that_does_not_fit_in_memory() -> None:
    for length in (2**50, 2**62, 2**70):
        with pytest.raises(secateur.InvalidSpec) as error:
            secateur.resize(nn.Linear(2, 2), {"weight": [length, 2]})
        assert str(error.value) == f"sizes['weight']: [{length}, 2] is too large to allocate"
