"""Smaller modules compute what the masked ones compute."""

import copy
import json
import pickle
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import secateur
from secateur.grouping import Group
from secateur.removal import Removed, removed_slices
from secateur.resizing import shrunk
from tests.client.cutting import assert_same, cut, doubles, run, some_units
from tests.client.nets_resizing import NETS, Net, inputs, outputs, randomized


def made(name: str, seed: int) -> tuple[Net, Any]:
    torch.manual_seed(seed)
    net = NETS[name]()
    randomized(net.module)
    return net, doubles(net.inputs)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_shrunk_module_computes_what_the_masked_one_computes(name: str, seed: int) -> None:
    net, given = made(name, seed)
    before = {name: tensor.clone() for name, tensor in net.module.state_dict().items()}
    masked, tensors, removed = cut(net.module, net.groups, some_units(net.module, net.groups, seed))
    small = shrunk(net.module, tensors, removed, net.inputs)
    assert_same(run(masked, given), run(small, given))
    assert not torch.equal(run(masked, given), run(net.module, given))
    assert sum(p.numel() for p in small.parameters()) < sum(t.numel() for t in before.values())
    for name, tensor in net.module.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("name", NETS)
def test_a_module_is_made_again_from_its_state_dict_and_json(name: str) -> None:
    net, given = made(name, 0)
    kept = some_units(net.module, net.groups, 0)
    small = shrunk(net.module, *cut(net.module, net.groups, kept)[1:])
    again = secateur.resize(net.module, json.loads(json.dumps(secateur.sizes(small))))
    again.load_state_dict(small.state_dict())
    assert str(again) == str(small)
    assert_same(run(again, given), run(small, given))
