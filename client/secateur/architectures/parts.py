"""Groups of a transformer's units, from its config."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from secateur.architectures.layout import HasBias, Kind
from secateur.architectures.transformer import Shapes, Transformer, read_config, transformer_of
from secateur.checks import patterns, shown
from secateur.errors import InvalidSpec, InvalidStateDict
from secateur.folders import find_folder
from secateur.grouping import GROUPS, Group, GroupList, Member, group, member
from secateur.source import read_source

_NORM = (
    "hidden: every known architecture normalizes over the hidden channels, so a model without some "
    "of them does not compute what the masked model computes; prune intermediate, heads or layers"
)
_LAYERS = "layers: a layer is not slices of tensors; remove layers with secateur.depth"


def transformer_groups(
    config: Any, parts: Sequence[str] = ("intermediate", "heads"), source: Any = None
) -> GroupList:
    """Makes groups of a transformer's units from its config, without any model code.

    Args:
        config: A config.json of Hugging Face: its path, that of its folder, or its content.
        parts: Which units. "intermediate": channels of feed-forward networks, and of each expert.
            "heads": query heads with their keys and values; where several query heads share keys,
            the query heads of each KV head are a group of their own, and keys and values are kept.
            "kv_heads": KV heads with all their query heads. "experts": experts with their outputs
            of the router, where one tensor has all experts. "vocabulary": tokens.
        source: The model, for the names of its tensors; see `Client`. None is the model in the
            folder of the config; without one, the names that transformers' save_pretrained writes.

    Returns:
        Groups for `grouped`. With scope="tensor" and a fraction, all layers keep the same number of
        units, which a config.json can express.

    Raises:
        InvalidSpec: The architecture or a part is not known, or the source is another model.
    """
    found, folder = read_config(config)
    model = transformer_of(found, _shapes_of(source, folder))
    return GroupList(groups_of_parts(model, patterns(parts, "parts")))


def _shapes_of(source: Any, folder: Any) -> Shapes | None:
    """The shapes of the tensors of a source, or of the model in a folder."""
    if source is None:
        try:
            source = None if folder is None else find_folder(folder).path
        except InvalidStateDict:  # a config.json alone
            source = None
    if source is None:
        return None
    model = read_source(source)
    if not model.is_here:
        raise InvalidSpec("source: the names of a model on the server are not known here")
    return model.shapes()


def groups_of_parts(model: Transformer, parts: Sequence[str]) -> list[Group]:
    """Makes the groups of parts of a transformer; see `transformer_groups`."""
    for part in parts:
        if part in _REFUSED:
            raise InvalidSpec(f"parts: {_REFUSED[part]}")
        if part not in PARTS:
            raise InvalidSpec(f"parts: {shown(part)} is none of {', '.join(PARTS)}")
    if {"heads", "kv_heads"} <= set(parts):
        raise InvalidSpec("parts: heads and kv_heads share tensors; prune them in two calls")
    return [one for part in dict.fromkeys(parts) for one in PARTS[part](model)]


class _Outputs(NamedTuple):
    """The outputs of a projection, or of one of several that are fused.

    Attributes:
        name: The projection.
        size: Its outputs in all.
        first: The first output of unit 0.
        stride: Outputs of a unit.
    """

    name: str
    size: int
    first: int = 0
    stride: int = 1


def _members(
    model: Transformer,
    kind: Kind,
    units: int,
    outputs: Sequence[_Outputs],
    consumer: _Outputs,
    has_bias: HasBias,
) -> Iterator[Member]:
    """The outputs of projections, with their biases, and the inputs of the consumer."""
    ends: dict[str, int] = {}  # of the outputs of a fused projection so far
    for name, size, first, stride in outputs:
        begin = ends.get(name, 0) + first
        ends[name] = ends.get(name, 0) + size
        yield member(model.weight(name, kind), kind.output, begin, stride, units)
        bias = model.bias(name, kind, has_bias)
        if bias is not None:
            yield member(bias, 0, begin, stride, units)
    weight = model.weight(consumer.name, kind)
    yield member(weight, kind.input, consumer.first, consumer.stride, units)


def _intermediate(model: Transformer) -> Iterator[Group]:
    for layer in range(model.layers):
        for mlp, is_expert in model.networks(layer):
            size = model.expert_intermediate if is_expert else model.intermediate
            outputs = [_Outputs(up, size) for up in mlp.up]
            down = _Outputs(mlp.down, size)
            members = _members(model, mlp.kind, size, outputs, down, model.architecture.mlp_bias)
            yield group(f"channels before {mlp.down}", *members)


def _heads(model: Transformer) -> Iterator[Group]:
    if model.heads == model.kv_heads:
        yield from _kv_heads(model)
        return
    shared, dim = _sharing(model), model.head_dim
    for layer, kv_head in product(range(model.layers), range(model.kv_heads)):
        at, layout = model.layer(layer), model.layout
        first = kv_head * shared * dim
        q = _Outputs(at + layout.qkv[0], model.heads * dim, first, dim)
        o = _Outputs(at + layout.o, model.heads * dim, first, dim)
        has_bias = model.architecture.attention_bias
        members = _members(model, layout.kind, shared, [q], o, has_bias)
        yield group(f"heads of {at}{layout.o} with KV head {kv_head}", *members)


def _kv_heads(model: Transformer) -> Iterator[Group]:
    rows, dim = _sharing(model) * model.head_dim, model.head_dim
    layout = model.layout
    for layer in range(model.layers):
        at = model.layer(layer)
        sizes = (model.heads * dim, model.kv_heads * dim, model.kv_heads * dim)
        outputs = [
            _Outputs(at + name, size, 0, stride)
            for name, size, stride in zip(layout.qkv, sizes, (rows, dim, dim), strict=True)
        ]
        o = _Outputs(at + layout.o, sizes[0], 0, rows)
        has_bias = model.architecture.attention_bias
        members = _members(model, layout.kind, model.kv_heads, outputs, o, has_bias)
        yield group(f"heads of {at}{layout.o}", *members)


def _sharing(model: Transformer) -> int:
    """How many query heads share a KV head."""
    if model.heads % model.kv_heads:
        raise InvalidSpec(
            f"config.json: {model.kv_heads} KV heads do not divide {model.heads} heads"
        )
    return model.heads // model.kv_heads


def _experts(model: Transformer) -> Iterator[Group]:
    experts = model.layout.experts
    if experts is None:
        raise InvalidSpec(f"parts: experts: a {model.architecture.bare} has none")
    if not experts.is_stacked:
        raise InvalidSpec(
            "parts: experts: each expert has tensors of its own, which are not slices; use the "
            "command secateur shrink --experts, or a Module's state_dict(), which stacks them"
        )
    for layer in filter(model.has_experts, range(model.layers)):
        at = model.layer(layer)
        names = [f"{at}{experts.router}.weight", *(at + up for up in experts.mlp.up)]
        members = [member(name) for name in dict.fromkeys([*names, at + experts.mlp.down])]
        yield group(f"experts of {at}{experts.router}", *members)


def _vocabulary(model: Transformer) -> Iterator[Group]:
    shapes, architecture = model.shapes, model.architecture
    if not architecture.embeddings:
        raise InvalidSpec(f"parts: vocabulary: a {architecture.bare} has none")
    if shapes is None:
        raise InvalidSpec(
            "parts: vocabulary: a config does not say which tensors have tokens; pass source="
        )
    table = model.weight(model.prefix + architecture.embeddings, model.layout.kind)
    outputs = (f"{o}.{part}" for o, part in product(architecture.outputs, ("weight", "bias")))
    names = [table, *(name for name in outputs if name in shapes)]
    yield group(f"tokens of {table}", *(member(name) for name in names))


PARTS: Mapping[str, Callable[[Transformer], Iterator[Group]]] = {
    "intermediate": _intermediate,
    "heads": _heads,
    "kv_heads": _kv_heads,
    "experts": _experts,
    "vocabulary": _vocabulary,
}
_REFUSED = {"hidden": _NORM, "layers": _LAYERS}

GROUPS["transformer_groups"] = transformer_groups
