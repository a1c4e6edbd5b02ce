"""Tiny models of transformers, with the groups of their heads and feed-forward units by hand."""

from collections.abc import Callable
from typing import Any

import torch
import transformers

import secateur
from secateur.grouping import Group
from tests.client.net import Net, inputs, outputs, weights

_SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "pad_token_id": 0,
}


def _tokens() -> dict[str, Any]:
    return {"input_ids": torch.randint(1, 50, (2, 7))}


def _ffn(name: str, up: list[str], down: str) -> Group:
    """Feed-forward units, without biases."""
    return secateur.group(name, *weights(*up), *inputs(down))


def _made(config: Any, kind: Any, groups: list[Group], given: Any = None) -> Net:
    return Net(kind._from_config(config), groups, given or _tokens())


def bert_groups(layers: int, heads: int, head_dim: int, prefix: str = "") -> list[Group]:
    groups = []
    for number in range(layers):
        layer = f"{prefix}encoder.layer.{number}"
        rows: dict[str, Any] = {"stride": head_dim, "units": heads}
        attention = f"{layer}.attention"
        members = [
            secateur.member(f"{attention}.self.{part}.{leaf}", **rows)
            for part in ("query", "key", "value")
            for leaf in ("weight", "bias")
        ]
        members.append(secateur.member(f"{attention}.output.dense.weight", 1, **rows))
        groups.append(secateur.group(f"heads {number}", *members))
        ffn = outputs(f"{layer}.intermediate.dense") + inputs(f"{layer}.output.dense")
        groups.append(secateur.group(f"ffn {number}", *ffn))
    return groups


def bert() -> Net:
    return _made(transformers.BertConfig(**_SMALL), transformers.BertModel, bert_groups(2, 4, 4))


def distilbert() -> Net:
    config = transformers.DistilBertConfig(
        vocab_size=50, dim=16, n_layers=1, n_heads=4, hidden_dim=8
    )
    layer = "transformer.layer.0"
    rows: dict[str, Any] = {"stride": 4, "units": 4}
    attention = [
        secateur.member(f"{layer}.attention.{part}.{leaf}", **rows)
        for part in ("q_lin", "k_lin", "v_lin")
        for leaf in ("weight", "bias")
    ]
    attention.append(secateur.member(f"{layer}.attention.out_lin.weight", 1, **rows))
    groups = [
        secateur.group("heads", *attention),
        secateur.group("ffn", *outputs(f"{layer}.ffn.lin1"), *inputs(f"{layer}.ffn.lin2")),
    ]
    return _made(config, transformers.DistilBertModel, groups)


def vit() -> Net:
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=24,
        image_size=16,
        patch_size=8,
    )
    model = transformers.ViTModel(config)
    names = [name for name, _ in model.named_parameters()]
    layer = next(name for name in names if "q_proj" in name).partition(".attention.")[0]
    up, down = (name[: -len(".weight")] for name in names if "fc" in name and "weight" in name)
    rows: dict[str, Any] = {"stride": 4, "units": 4}
    attention = [
        secateur.member(f"{layer}.attention.{part}.{leaf}", **rows)
        for part in ("q_proj", "k_proj", "v_proj")
        for leaf in ("weight", "bias")
    ]
    attention.append(secateur.member(f"{layer}.attention.o_proj.weight", 1, **rows))
    groups = [
        secateur.group("heads", *attention),
        secateur.group("ffn", *outputs(up), *inputs(down)),
    ]
    return Net(model, groups, {"pixel_values": torch.randn(2, 3, 16, 16)})


def gpt2() -> Net:
    """Conv1D has its outputs in the last dimension, and a fused projection."""
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=4, n_positions=16)
    groups = []
    for layer in ("transformer.h.0", "transformer.h.1"):
        rows = [
            16 * part + 4 * head + i for head in range(4) for part in range(3) for i in range(4)
        ]
        groups.append(
            secateur.group(
                f"{layer}.attn",
                secateur.member(f"{layer}.attn.c_attn.weight", 1, indices=rows, units=4),
                secateur.member(f"{layer}.attn.c_attn.bias", indices=rows, units=4),
                secateur.member(f"{layer}.attn.c_proj.weight", 0, stride=4, units=4),
            )
        )
        groups.append(
            secateur.group(
                f"{layer}.mlp",
                secateur.member(f"{layer}.mlp.c_fc.weight", 1),
                secateur.member(f"{layer}.mlp.c_fc.bias"),
                secateur.member(f"{layer}.mlp.c_proj.weight", 0),
            )
        )
    return _made(config, transformers.GPT2LMHeadModel, groups)


def llama() -> Net:
    """Grouped-query attention: two query heads share a KV head, which is the unit."""
    config = transformers.LlamaConfig(**_SMALL, num_key_value_heads=2, head_dim=4)
    groups = []
    for layer in ("model.layers.0", "model.layers.1"):
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        q, k, v, o = (f"{attention}.{part}_proj.weight" for part in "qkvo")
        groups += secateur.head_groups(q, k, v, o, head_dim=4, heads=4, kv_heads=2)
        groups.append(_ffn(mlp, [f"{mlp}.gate_proj", f"{mlp}.up_proj"], f"{mlp}.down_proj"))
    return _made(config, transformers.LlamaForCausalLM, groups)


def llama_queries() -> Net:
    """As `llama`; unit i is query head i of each KV head, and both KV heads are kept."""
    net = llama()
    groups = [group for group in net.groups if "mlp" in group.message.name]
    for layer in ("model.layers.0", "model.layers.1"):
        rows = [8 * kv + 4 * head + i for head in range(2) for kv in range(2) for i in range(4)]
        q, o = (f"{layer}.self_attn.{part}_proj.weight" for part in "qo")
        both = [
            secateur.member(q, indices=rows, units=2),
            secateur.member(o, 1, indices=rows, units=2),
        ]
        groups.append(secateur.group(q, *both))
    return net._replace(groups=groups)


def phi3() -> Net:
    """One projection of queries, keys and values, and one of gates and values."""
    config = transformers.Phi3Config(**_SMALL, num_key_value_heads=2)
    groups = []
    for layer in ("model.layers.0", "model.layers.1"):
        rows = [
            row
            for kv in range(2)
            for begin, size in ((8 * kv, 8), (16 + 4 * kv, 4), (24 + 4 * kv, 4))
            for row in range(begin, begin + size)
        ]
        qkv = secateur.member(f"{layer}.self_attn.qkv_proj.weight", indices=rows, units=2)
        o = secateur.member(f"{layer}.self_attn.o_proj.weight", 1, stride=8, units=2)
        halves = [row for unit in range(24) for row in (unit, 24 + unit)]
        both = secateur.member(f"{layer}.mlp.gate_up_proj.weight", indices=halves, units=24)
        down = secateur.member(f"{layer}.mlp.down_proj.weight", 1)
        groups += [
            secateur.group(f"{layer} kv", qkv, o),
            secateur.group(f"{layer} mlp", both, down),
        ]
    return _made(config, transformers.Phi3ForCausalLM, groups)


def qwen3_moe() -> Net:
    """All experts lose the same units, and the attention whole KV heads."""
    config = transformers.Qwen3MoeConfig(
        **_SMALL,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=6,
    )
    groups = []
    for layer in ("model.layers.0", "model.layers.1"):
        q, k, v, o = (f"{layer}.self_attn.{part}_proj.weight" for part in "qkvo")
        groups += secateur.head_groups(q, k, v, o, head_dim=4, heads=4, kv_heads=2)
        halves = [row for unit in range(6) for row in (unit, 6 + unit)]
        mlp = f"{layer}.mlp.experts"
        up = secateur.member(f"{mlp}.gate_up_proj", 1, indices=halves, units=6)
        groups.append(secateur.group(mlp, up, secateur.member(f"{mlp}.down_proj", 2)))
    config._experts_implementation = "eager"  # others do not know float64
    return _made(config, transformers.Qwen3MoeForCausalLM, groups)


NETS: dict[str, Callable[[], Net]] = {
    made.__name__: made
    for made in (bert, distilbert, vit, gpt2, llama, llama_queries, phi3, qwen3_moe)
}
