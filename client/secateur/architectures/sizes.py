"""Reads the sizes of a shrunk transformer off its tensors into its config."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from secateur.architectures.heads import check_kept_heads
from secateur.architectures.layout import Config, Kind
from secateur.architectures.transformer import CONFIG, Shapes, Transformer, transformer_of
from secateur.errors import InvalidStateDict
from secateur.resizing.removal import Removed

_RESIZE = "a .safetensors file, and result.shrink(module), can have such sizes"


def fitted_config(config: Config, shapes: Shapes, removed: Removed) -> dict[str, Any]:
    """Returns the config of a model whose units were cut.

    Args:
        config: Before; of as many layers as the model has now.
        shapes: Of the tensors now.
        removed: What was removed of each tensor.

    Raises:
        InvalidSpec: The architecture is not known, or the names do not fit it.
        InvalidStateDict: The config cannot express the sizes of the tensors.
    """
    before = transformer_of(config, shapes)
    after = replace(before, config={**before.config, **_attention_sizes(before, shapes)})
    after = replace(after, config={**after.config, **_network_sizes(after, shapes)})
    check_kept_heads(before, removed)
    check_expressible(before, after)
    _check_shapes(after, shapes)
    inside = before.architecture.inside
    return {**config, inside: after.config} if inside else dict(after.config)


def check_expressible(before: Transformer, after: Transformer) -> None:
    """Refuses numbers of heads and experts that transformers cannot load.

    Raises:
        InvalidStateDict: The message says why, and what can be done.
    """
    if after.heads != before.heads:
        _check_heads(before, after)
    if after.layout.experts is not None and after.experts != before.experts:
        used = after.size("num_experts_per_tok")
        if after.experts < used:
            raise InvalidStateDict(
                f"{CONFIG}: num_experts_per_tok: {used} experts compute each token, and "
                f"{after.experts} of {before.experts} are left; keep at least {used}"
            )


def _check_heads(before: Transformer, after: Transformer) -> None:
    architecture, keys = after.architecture, after.architecture.keys
    heads, hidden = after.heads, after.size(keys.hidden)
    if not architecture.has_head_dim:
        raise InvalidStateDict(
            f"{CONFIG}: {keys.heads}: cannot be {heads}, and was {before.heads}: in transformers "
            f"a head is {keys.hidden} / {keys.heads} wide; keep all heads; {_RESIZE}"
        )
    if architecture.heads_divide_hidden and hidden % heads:
        raise InvalidStateDict(
            f"{CONFIG}: {keys.heads}: {heads} does not divide {keys.hidden}={hidden}, as "
            f"transformers demands; keep {_divisors(hidden, before.heads)}"
        )


def _divisors(hidden: int, heads: int) -> str:
    return " or ".join(str(n) for n in range(1, heads + 1) if hidden % n == 0)


class _Sizes:
    """Sizes by the config's keys. Every tensor must agree."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}
        self._names: dict[str, str] = {}  # by key, the first tensor that decided it

    def note(self, key: str, size: int, name: str) -> None:
        first = self._names.setdefault(key, name)
        if self.found.setdefault(key, size) != size:
            raise InvalidStateDict(
                f"{CONFIG}: {key}: {first} has {self.found[key]}, and {name} has {size}, but all "
                "layers must have the same; prune the same fraction of each group, with "
                f"scope='tensor'; {_RESIZE}"
            )


def _attention_sizes(model: Transformer, shapes: Shapes) -> dict[str, int]:
    sizes, keys, layout = _Sizes(), model.architecture.keys, model.layout
    for layer in range(model.layers):
        at = model.layer(layer)
        o, k = (model.weight(at + name, layout.kind) for name in (layout.o, layout.qkv[1]))
        inputs, outputs = shapes[o][layout.kind.input], shapes[k][layout.kind.output]
        sizes.note(keys.heads, _heads(inputs, model, o), o)
        if keys.kv_heads is not None:
            is_fused = layout.qkv[0] == layout.qkv[1]
            rows = (outputs - inputs) // 2 if is_fused else outputs
            sizes.note(keys.kv_heads, _heads(rows, model, k), k)
    if sizes.found[keys.heads] != model.heads and model.architecture.has_head_dim:
        sizes.found["head_dim"] = model.head_dim
    return sizes.found


def _heads(width: int, model: Transformer, name: str) -> int:
    if width % model.head_dim:
        raise InvalidStateDict(
            f"{name}: {width} is not a multiple of the width of a head, {model.head_dim}"
        )
    return width // model.head_dim


def _network_sizes(model: Transformer, shapes: Shapes) -> dict[str, int]:
    sizes, keys, experts = _Sizes(), model.architecture.keys, model.layout.experts
    if experts is not None:
        for layer in filter(model.has_experts, range(model.layers)):
            router = f"{model.layer(layer)}{experts.router}.weight"
            sizes.note(model.experts_key, shapes[router][0], router)
        model = replace(model, config={**model.config, **sizes.found})
    for layer in range(model.layers):
        for mlp, is_expert in model.networks(layer):
            down = model.weight(mlp.down, mlp.kind)
            key = keys.expert_intermediate if is_expert else keys.intermediate
            sizes.note(key, shapes[down][mlp.kind.input], down)
    if sizes.found.get(keys.intermediate) == model.intermediate:
        del sizes.found[keys.intermediate]  # GPT-2's n_inner may be null
    return sizes.found


def _check_shapes(model: Transformer, shapes: Shapes) -> None:
    """Refuses tensors that do not have the sizes of the config."""
    for name, dim, size in _expected(model):
        if shapes[name][dim] != size:
            raise InvalidStateDict(
                f"{name}: dimension {dim} has {shapes[name][dim]} slices, and {CONFIG} demands "
                f"{size}; is a member missing in a group?"
            )


def _expected(model: Transformer) -> Iterator[tuple[str, int, int]]:
    """Tensors with one of their dimensions, and its size by the config."""
    dim, layout, architecture = model.head_dim, model.layout, model.architecture
    kv_rows = model.kv_heads * dim
    for layer in range(model.layers):
        at = model.layer(layer)
        qkv, rows = [at + name for name in layout.qkv], [model.heads * dim, kv_rows, kv_rows]
        yield from _outputs(model, layout.kind, qkv, rows)
        yield model.weight(at + layout.o, layout.kind), layout.kind.input, rows[0]
        for mlp, is_expert in model.networks(layer):
            size = model.expert_intermediate if is_expert else model.intermediate
            yield from _outputs(model, mlp.kind, mlp.up, [size] * len(mlp.up))
            yield model.weight(mlp.down, mlp.kind), mlp.kind.input, size
    table = f"{model.prefix}{architecture.embeddings}.weight"
    if model.shapes and table in model.shapes:
        yield table, 0, model.size("vocab_size")


def _outputs(
    model: Transformer, kind: Kind, names: Sequence[str], sizes: Sequence[int]
) -> Iterator[tuple[str, int, int]]:
    """The weights and biases of projections; those of one name are fused."""
    for name in dict.fromkeys(names):
        size = sum(size for other, size in zip(names, sizes, strict=True) if other == name)
        yield model.weight(name, kind), kind.output, size
        bias = model.bias(name, kind, True)
        if bias is not None:
            yield bias, 0, size
