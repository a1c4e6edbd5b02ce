"""Every network of nets.py: the smaller module computes what the masked one does."""

import copy
import json

import pytest
import torch

import secateur
from tests.shrinking.cutting import assert_same, cut, difference, masked, run, slices, unit_counts
from tests.shrinking.nets import NETS, traced

# The units of each group, by the tensor that makes them.
UNITS = {
    "LeNet": {"conv1.weight": 6, "conv2.weight": 16, "fc1.weight": 120, "fc2.weight": 84},
    "U-Net": {
        "down1.0.weight": 6,
        "down2.0.weight": 12,
        "bottom.0.weight": 24,
        "up2.weight": 12,
        "join2.0.weight": 12,
        "join1.0.weight": 6,
    },
    "decoder": {"fc.weight": 12, "up1.weight": 8},
    "LSTM": {"embedding.weight": 10, "rnn.weight_ih_l0": 8},
    "LSTM, 2 layers, both directions": {"embedding.weight": 10, "rnn.weight_ih_l0": 8},
    "LSTM with projection": {"embedding.weight": 10, "rnn.weight_hr_l0": 6},
    "GRU": {"embedding.weight": 10, "rnn.weight_ih_l0": 8},
    "RNN": {"embedding.weight": 10, "rnn.weight_ih_l0": 8},
    "cells": {"lstm.weight_ih": 6, "gru.weight_ih": 5},
    "ViT": {
        "attentions.0.qkv.weight": 4,
        "attentions.1.qkv.weight": 4,
        "mlps.0.0.weight": 40,
        "mlps.1.0.weight": 40,
    },
    "grouped queries": {"attention.q.weight": 4, "mlp.gate.weight": 24},
    "grouped queries, repeated keys": {"attention.q.weight": 4, "mlp.gate.weight": 24},
    "grouped convolution": {"stem.weight": 16, "reduce.weight": 2},
    "norms": {"conv2.weight": 10, "conv3.weight": 9, "fc2.weight": 7},
    "gates": {
        "conv1.weight": 8,
        "squeeze.weight": 4,
        "wide.weight": 12,
        "shuffled.weight": 4,
    },
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", NETS)
def test_any_units_can_be_cut(name: str) -> None:
    module, example, groups = traced(name)
    counts = unit_counts(groups, module.state_dict())
    assert counts
    assert counts.items() >= UNITS.get(name, {}).items()
    assert max(difference(module, example, groups, seed) for seed in range(2)) <= 1e-12


@pytest.mark.parametrize("name", NETS)
def test_a_module_that_the_server_cut(client: secateur.Client, name: str) -> None:
    module, inputs, groups = traced(name)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    spec = secateur.grouped(groups, 0.5, scope="tensor", align=1)
    result = client.prune(module, spec, output="shrunk")
    smaller = result.shrink(module)  # which compares them too, as the groups were traced
    with_masks = copy.deepcopy(module)
    client.prune(module, spec).apply_to(with_masks)
    assert not torch.allclose(run(module, inputs), run(with_masks, inputs))
    assert_same(run(with_masks, inputs), run(smaller, inputs))
    sizes = [sum(p.numel() for p in one.parameters()) for one in (module, smaller)]
    assert sizes[1] < sizes[0]
    assert all(torch.equal(before[name], one) for name, one in module.state_dict().items())
    again = secateur.resize(module, json.loads(json.dumps(secateur.sizes(smaller))))
    again.load_state_dict(smaller.state_dict())
    assert str(again) == str(smaller)
    assert_same(run(again, inputs), run(smaller, inputs))


def test_the_server_cuts_the_units_of_its_masks(client: secateur.Client) -> None:
    module, _, groups = traced("U-Net")
    spec = secateur.grouped(groups, 0.5, scope="tensor", align=1)
    masks = client.prune(module, spec).masks
    units = {}
    for group in groups:
        first = group.message.members[0]
        kept = masks[first.tensor].transpose(0, first.dim).flatten(1).any(1)
        units[group.message.name] = [
            unit for unit in range(first.units) if not kept[slices(first, unit, first.units)].any()
        ]
    assert all(units.values())
    tensors = module.state_dict()
    expected = cut(groups, units, masked(groups, units, tensors))
    shrunk = client.prune(module, spec, output="shrunk").state_dict("shrunk")
    assert expected.keys() == shrunk.keys()
    assert all(torch.equal(expected[name], tensor) for name, tensor in shrunk.items())
