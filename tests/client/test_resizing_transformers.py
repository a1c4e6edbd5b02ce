"""Smaller models of transformers compute what the masked ones compute."""

import json

import pytest
import torch

import secateur
from secateur.resizing import shrunk
from tests.client.cutting import assert_same, cut, doubles, run, some_units
from tests.client.nets_resizing import randomized
from tests.client.nets_transformers import NETS


@pytest.mark.parametrize("name", NETS)
def test_a_shrunk_transformer_computes_what_the_masked_one_computes(name: str) -> None:
    torch.manual_seed(3)
    net = NETS[name]()
    randomized(net.module)
    masked, tensors, removed = cut(net.module, net.groups, some_units(net.module, net.groups, 1))
    small = shrunk(net.module, tensors, removed, net.inputs)
    given = doubles(net.inputs)
    assert_same(run(masked, given), run(small, given))
    assert not torch.equal(run(masked, given), run(net.module, given))
    again = secateur.resize(net.module, json.loads(json.dumps(secateur.sizes(small))))
    again.load_state_dict(small.state_dict())
    assert_same(run(again, given), run(small, given))
