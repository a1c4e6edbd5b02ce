"""Sizes of attention layers that are made of projections: counts of heads, and their total size.

A layer is recognized by the names of its projections and of its integer attributes, which the
models of transformers and many others have in common.
"""

import copy
from typing import Any

from torch.nn import Module

from secateur.resizing.misfit import Misfit

_QUERY = ("q_proj", "query", "q_lin", "q_attn", "wq", "to_q", "q")
_KEY = ("k_proj", "key", "k_lin", "wk", "to_k", "k")
_VALUE = ("v_proj", "value", "v_lin", "wv", "to_v", "v")
_OUTPUT = ("o_proj", "out_proj", "out_lin", "c_proj", "proj", "wo", "to_out", "out", "o")
_FUSED = ("qkv_proj", "c_attn", "qkv", "query_key_value", "in_proj", "to_qkv")

_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "num_attn_heads", "heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")
_QUERIES_PER_KV = ("num_key_value_groups", "num_kv_groups", "n_rep")
_HEAD_SIZE = ("head_dim", "attention_head_size", "head_size")
_DOUBT = "its projections lost rows, and secateur does not know {}"
_TOTAL = ("all_head_size", "split_size", "inner_dim")


def fit_attention(new: Module, old: Module) -> str | None:
    """Sets the counts of heads of a layer whose projections lost rows.

    Returns:
        None, or why they cannot be known from the shapes.

    Raises:
        Misfit: The rows that are left are not whole heads.
    """
    numbers = {name: n for name, n in vars(new).items() if type(n) is int}
    before, after = _rows(old), _rows(new)
    if before is None or after is None:
        is_attention = any("head" in name for name in numbers)
        return _DOUBT.format("their names") if is_attention and _has_lost_rows(new, old) else None
    if before == after:
        return None
    known = {*_HEADS, *_KV_HEADS, *_QUERIES_PER_KV, *_HEAD_SIZE}
    unknown = [name for name in numbers if "head" in name and name not in {*known, *_TOTAL}]
    if unknown or not known & numbers.keys():
        named = f"its attribute {unknown[0]}" if unknown else "how many heads it has"
        return _DOUBT.format(named)
    size = _head_size(numbers, before[0])
    if before[1] == before[2] and after[1] != after[2]:
        raise Misfit(f"keeps {after[1]} rows of keys and {after[2]} of values")
    heads, kv_heads = _whole(after[0], size, "queries"), _whole(after[1], size, "keys")
    if heads % kv_heads:
        raise Misfit(f"keeps {heads} heads of queries, which {kv_heads} KV heads do not divide")
    _set(new, numbers, heads, kv_heads, size)
    return None


def _has_lost_rows(new: Module, old: Module) -> bool:
    names = list(new._modules)
    return any(_widths(new, (name,)) != _widths(old, (name,)) for name in names)


def _rows(layer: Module) -> tuple[int, int, int] | None:
    """The rows of queries, keys and values; None if the layer is not attention."""
    query, key = _widths(layer, _QUERY), _widths(layer, _KEY)
    if query and key:
        value = _widths(layer, _VALUE)
        return query[0], key[0], value[0] if value else key[0]
    fused, output = _widths(layer, _FUSED), _widths(layer, _OUTPUT)
    if query and fused:  # cross-attention of GPT-2
        return query[0], fused[0] // 2, fused[0] // 2
    if fused and output:
        rest = fused[0] - output[1]
        return output[1], rest // 2, rest - rest // 2
    return None


def _widths(layer: Module, names: tuple[str, ...]) -> tuple[int, int] | None:
    """The outputs and inputs of the first projection that has one of the names."""
    for name in names:
        part: Any = layer._modules.get(name)
        if hasattr(part, "out_features") or hasattr(part, "out_channels"):
            return part.weight.shape[0], part.weight.shape[1]
        if hasattr(part, "nf"):  # transformers' Conv1D
            return part.weight.shape[1], part.weight.shape[0]
    return None


def _head_size(numbers: dict[str, int], queries: int) -> int:
    for name in _HEAD_SIZE:
        if name in numbers:
            return numbers[name]
    heads = next((numbers[name] for name in _HEADS if name in numbers), 1)
    return queries // heads


def _whole(rows: int, size: int, what: str) -> int:
    if rows % size:
        raise Misfit(f"keeps {rows} rows of {what}, which are not whole heads of {size}")
    return rows // size


def _set(new: Any, numbers: dict[str, int], heads: int, kv_heads: int, size: int) -> None:
    values = {
        **dict.fromkeys(_HEADS, heads),
        **dict.fromkeys(_KV_HEADS, kv_heads),
        **dict.fromkeys(_QUERIES_PER_KV, heads // kv_heads),
        **dict.fromkeys(_TOTAL, heads * size),
    }
    for name in values.keys() & numbers.keys():
        setattr(new, name, values[name])
    if hasattr(new, "qkv_proj") and hasattr(new, "config"):  # Phi-3 reads its heads from there
        new.config = copy.copy(new.config)
        new.config.num_attention_heads, new.config.num_key_value_heads = heads, kv_heads
