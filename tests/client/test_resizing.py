"""Smaller modules compute what the masked ones compute."""

import json
from typing import Any

import pytest
import torch

import secateur
from secateur.errors import InvalidStateDict
from secateur.grouping import Group
from secateur.resizing import shrunk
from tests.client.cut_modules import assert_same, cut, doubles, run, shrink, some_units
from tests.client.net import Net, randomized
from tests.client.nets_resizing import NETS


def made(name: str, seed: int) -> tuple[Net, Any]:
    torch.manual_seed(seed)
    net = NETS[name]()
    randomized(net.module)
    return net, doubles(net.inputs)


@pytest.mark.parametrize("name", NETS)
def test_a_shrunk_module_computes_what_the_masked_one_computes(name: str) -> None:
    net, example = made(name, 1)
    before = {name: tensor.clone() for name, tensor in net.module.state_dict().items()}
    masked, tensors, removed = cut(net.module, net.groups, some_units(net.module, net.groups, 1))
    small = shrunk(net.module, tensors, removed, net.inputs)
    assert_same(run(masked, example), run(small, example))
    assert not torch.equal(run(masked, example), run(net.module, example))
    assert sum(p.numel() for p in small.parameters()) < sum(t.numel() for t in before.values())
    for name, tensor in net.module.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("name", NETS)
def test_a_module_is_made_again_from_its_state_dict_and_json(name: str) -> None:
    net, example = made(name, 0)
    small = shrink(net.module, net.groups)
    again = secateur.resize(net.module, json.loads(json.dumps(secateur.sizes(small))))
    again.load_state_dict(small.state_dict())
    assert str(again) == str(small)
    assert_same(run(again, example), run(small, example))


@pytest.mark.parametrize(
    ("name", "group", "member", "at"),
    [
        ("lenet", 0, "conv2.weight", "conv2: takes 6 inputs, and conv1 makes 2"),
        ("lenet", 1, "fc1.weight", "fc1: takes 400 inputs, and conv2 makes 200"),
        ("lenet", 2, "fc2.weight", "fc2: takes 120 inputs, and fc1 makes"),
        ("lenet", 0, "conv1.bias", "conv1: bias has shape"),
        ("resnet18", 2, "head.weight", "blocks.2.one.0: takes 8 inputs, and "),
        ("mobilenet_v2", 0, "blocks.0.depth.1.bias", "blocks.0.depth.1: bias has shape"),
        ("mobilenet_v2", 0, "blocks.0.depth.0.weight", "blocks.0.depth.0: takes 32 "),
        ("unet", 0, "join.weight", "join: takes "),
        ("decoder", 0, "2.weight", "2: takes 12 inputs, and 0 makes"),
        ("lstm", 0, "layer.weight_hh_l1", "layer: weight_hh_l1 has shape"),
        ("lstm", 0, "head.weight", "head: fails in the shrunk module: "),
        ("cells", 0, "two.weight_ih", "two: fails in the shrunk module: "),
        ("encoder", 0, "layers.0.linear2.weight", "layers.0.linear2: fails in the shrunk module"),
    ],
)
def test_the_first_layer_that_does_not_fit_is_named(
    name: str, group: int, member: str, at: str
) -> None:
    net, _ = made(name, 0)
    message = net.groups[group].message
    kept = [one for one in message.members if one.tensor != member]
    assert len(kept) < len(message.members) or name == "resnet18"
    if name == "resnet18":
        kept = [one for one in message.members if not one.tensor.startswith("blocks.2.one")]
    forgetful = Group(type(message)(name=message.name, members=kept))
    example = net.inputs if "fails" in at else None
    with pytest.raises(InvalidStateDict) as error:
        shrink(net.module, [forgetful], example)
    assert str(error.value).startswith(at)


def test_two_layers_that_are_added_are_named() -> None:
    net, _ = made("resnet18", 0)
    stage = next(group.message for group in net.groups if group.message.name == "stage 0")
    readers = ("blocks.0.two.0.weight", "blocks.0.two.1.")
    members = [one for one in stage.members if not one.tensor.startswith(readers)]
    with pytest.raises(InvalidStateDict, match=r"^stem.0: makes \d of 8 .*, and blocks.0.two.0, "):
        shrink(net.module, [Group(type(stage)(name="stage 0", members=members))])


@pytest.mark.parametrize(
    ("name", "group", "member", "at"),
    [
        ("lenet", 1, "conv2.bias", "fc1"),
        ("lenet", 3, "fc2.bias", "fc3"),
        ("mobilenet_v2", 2, "blocks.2.depth.1.bias", "blocks.2.project.0"),
        ("gru", 0, "layer.bias_ih_l0", "head"),
    ],
)
def test_the_first_layer_that_computes_something_else_is_named(
    name: str, group: int, member: str, at: str
) -> None:
    """The group masks neither a tensor nor what reads the units: they are not zero, and cut."""
    net, _ = made(name, 0)
    message = net.groups[group].message
    for one in message.members:
        one.unmasked = one.tensor == member or one.dim == 1
    with pytest.raises(InvalidStateDict, match=rf"^{at}: its output differs by .* from the masked"):
        shrink(net.module, [Group(message)], net.inputs)


def test_a_size_that_does_not_fit_in_memory() -> None:
    for length in (2**50, 2**62, 2**70):
        with pytest.raises(secateur.InvalidSpec) as error:
            secateur.resize(torch.nn.Linear(2, 2), {"weight": [length, 2]})
        assert str(error.value) == f"sizes['weight']: [{length}, 2] is too large to allocate"
