"""Groups of transformers from a config alone. test_shrink_folder.py has real models."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

import secateur
from secateur.grouping import Group
from tests.client.test_wrong_arguments import problem_of

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 6,
}
GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2Model"],
    "n_embd": 8,
    "n_layer": 1,
    "n_head": 2,
}


def slices_of(group: Group) -> list[tuple[str, int, list[list[int]]]]:
    """Each member's tensor, dimension, and the slices of each unit."""
    return [
        (
            m.tensor,
            m.dim,
            [
                [m.offset + unit * (m.stride or 1) + i for i in range(m.stride or 1)]
                for unit in range(m.units)
            ],
        )
        for m in group.message.members
    ]


def test_channels_of_a_gated_network() -> None:
    first, second = secateur.transformer_groups(LLAMA, ["intermediate"])
    each = [[i] for i in range(6)]
    at = "model.layers.0.mlp"
    assert slices_of(first) == [
        (f"{at}.gate_proj.weight", 0, each),
        (f"{at}.up_proj.weight", 0, each),
        (f"{at}.down_proj.weight", 1, each),
    ]
    assert second.message.name == "channels before model.layers.1.mlp.down_proj"


def test_query_heads_are_grouped_by_their_kv_head() -> None:
    groups = secateur.transformer_groups(LLAMA, ["heads"])
    assert [group.message.name.partition(" with ")[2] for group in groups] == [
        *("KV head 0", "KV head 1") * 2
    ]
    at = "model.layers.0.self_attn"
    assert slices_of(groups[1]) == [
        (f"{at}.q_proj.weight", 0, [[4, 5], [6, 7]]),
        (f"{at}.o_proj.weight", 1, [[4, 5], [6, 7]]),
    ]


def test_kv_heads_have_their_query_heads_and_biases() -> None:
    group, _ = secateur.transformer_groups({**LLAMA, "attention_bias": True}, ["kv_heads"])
    at = "model.layers.0.self_attn"
    queries, keys = [[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1], [2, 3]]
    assert slices_of(group) == [
        (f"{at}.q_proj.weight", 0, queries),
        (f"{at}.q_proj.bias", 0, queries),
        (f"{at}.k_proj.weight", 0, keys),
        (f"{at}.k_proj.bias", 0, keys),
        (f"{at}.v_proj.weight", 0, keys),
        (f"{at}.v_proj.bias", 0, keys),
        (f"{at}.o_proj.weight", 1, queries),
    ]


def test_fused_and_transposed_heads() -> None:
    (group,) = secateur.transformer_groups(GPT2, ["heads"])
    q, k, v = ([[b, b + 1, b + 2, b + 3] for b in (o, o + 4)] for o in (0, 8, 16))
    weight, bias = "h.0.attn.c_attn.weight", "h.0.attn.c_attn.bias"
    assert slices_of(group) == [
        *((weight, 1, q), (bias, 0, q), (weight, 1, k), (bias, 0, k), (weight, 1, v), (bias, 0, v)),
        ("h.0.attn.c_proj.weight", 0, q),
    ]


def test_a_folder_with_a_model_decides_the_names(tmp_path: Path) -> None:
    """The prefix and the biases are those of the file, whatever the config says."""
    config = {**LLAMA, "num_hidden_layers": 1, "architectures": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.o_proj")
    tensors: dict[str, npt.NDArray[Any]] = {
        f"a.layers.0.{name}.weight": np.zeros((2, 2), np.float32) for name in names
    }
    tensors["a.layers.0.mlp.up_proj.bias"] = np.zeros(2, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    expected = [
        *("a.layers.0.mlp.gate_proj.weight", "a.layers.0.mlp.up_proj.weight"),
        *("a.layers.0.mlp.up_proj.bias", "a.layers.0.mlp.down_proj.weight"),
    ]
    for given in (tmp_path, tmp_path / "config.json", str(tmp_path)):
        (group,) = secateur.transformer_groups(given, ["intermediate"])
        assert [member.tensor for member in group.message.members] == expected


WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "unknown": (
        {"model_type": "t5"},
        {},
        "config.json: model_type: 't5' is not a known architecture; known are bert, distilbert, "
        "gemma2, gemma3, gemma3_text, gpt2, llama, mistral, mixtral, phi3, qwen2, qwen3, "
        "qwen3_moe, roberta, vit; write other groups with secateur.group",
    ),
    "no type": ({}, {}, "config.json: model_type: None is not a known architecture"),
    "no class": ({**LLAMA, "architectures": None}, {}, "pass source=, the model"),
    "no size": (
        {**LLAMA, "hidden_size": None},
        {"parts": ["heads"]},
        "hidden_size: None is not",
    ),
    "a wrong size": (
        {**LLAMA, "num_hidden_layers": "2"},
        {},
        "num_hidden_layers: '2' is",
    ),
    "heads": (
        {**LLAMA, "num_key_value_heads": 3},
        {"parts": ["heads"]},
        "3 KV heads do not divide 4 heads",
    ),
    "part": (LLAMA, {"parts": ["channels"]}, "parts: 'channels' is none of intermediate, heads, "),
    "hidden": (LLAMA, {"parts": ["hidden"]}, "normalizes over the hidden channels"),
    "layers": (LLAMA, {"parts": ["layers"]}, "secateur.depth"),
    "no experts": (LLAMA, {"parts": ["experts"]}, "a LlamaModel has none"),
    "experts": (
        {**LLAMA, "model_type": "mixtral", "num_local_experts": 2},
        {"parts": ["experts"]},
        "each expert has tensors of its own",
    ),
    "both": (LLAMA, {"parts": ["heads", "kv_heads"]}, "prune them in two calls"),
    "vocabulary": (LLAMA, {"parts": ["vocabulary"]}, "pass source="),
    "another model": (
        LLAMA,
        {"source": {"a": np.ones(2)}},
        "no tensor is named layers.0.self",
    ),
    "two models": (
        LLAMA,
        {"source": {f"{at}.layers.0.self_attn.o_proj.weight": np.ones((2, 2)) for at in "ab"}},
        "holds several models, at a., b.",
    ),
    "part of a model": (
        LLAMA,
        {"source": {"layers.0.self_attn.o_proj.weight": np.ones((2, 2))}},
        "layers.0.mlp.gate_proj.weight: the model has no tensor of this name",
    ),
    "a URI": (LLAMA, {"source": "file:///m.safetensors"}, "on the server are not known here"),
    "no path": (3, {}, "a path is a str"),
    "no file": ("nowhere/config.json", {}, "nowhere/config.json: No such file or directory"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    config, arguments, message = WRONG[case]
    with pytest.raises(secateur.InvalidSpec) as raised:
        secateur.transformer_groups(config, **arguments)
    assert message in str(raised.value)


MOE = {
    **LLAMA,
    **{"model_type": "qwen3_moe", "head_dim": 2, "num_experts": 2, "moe_intermediate_size": 4},
    **{"decoder_sparse_step": 2, "mlp_only_layers": [0], "attention_bias": False},
}
IMAGES = {"model_type": "gemma3", "architectures": ["G"], "text_config": {**LLAMA, "head_dim": 2}}


@pytest.mark.parametrize("config", [LLAMA, GPT2, MOE, IMAGES], ids=lambda c: str(c["model_type"]))
def test_a_config_with_a_wrong_value_is_an_error_or_has_groups(config: dict[str, Any]) -> None:
    wrong = [None, True, -1, 0, 1 << 70, 0.5, "x", [], [None], [[1]], {}, {"a": 1}]
    assert secateur.transformer_groups(config)
    for key in config:
        for value in wrong:
            found = problem_of(
                lambda: secateur.transformer_groups({**config, key: value})  # noqa: B023
            )
            assert found is None, (key, value)


@pytest.mark.parametrize("text", ["[]", "{", "\xff"])
def test_a_broken_config(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin1"))
    with pytest.raises(secateur.InvalidSpec, match=str(path)):
        secateur.transformer_groups(path)
