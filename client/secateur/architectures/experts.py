"""Removes whole experts of a model on disk, where each expert has tensors of its own."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from secateur.amounts import AnyAmount
from secateur.architectures.calibrated import Calibrated
from secateur.architectures.folder import transformer_in, with_inner
from secateur.architectures.sizes import check_expressible
from secateur.architectures.transformer import Transformer
from secateur.calibration.unit_statistics import UnitStatistics
from secateur.client import Client
from secateur.depth import without_layers
from secateur.errors import InvalidSpec, InvalidStatistics
from secateur.folders import Folder
from secateur.grouping import group, member
from secateur.model import Source
from secateur.selections import grouped
from secateur.tensors import Bytes, LocalTensor


def without_experts(
    client: Client,
    source: Source,
    folder: Folder,
    amount: AnyAmount,
    statistics: Calibrated | None = None,
) -> tuple[Source, Calibrated | None]:
    """Removes the least important experts from each layer, with their router's outputs.

    Args:
        client: Ranks the experts, one layer at a time.
        source: The model.
        folder: The folder that it is read from.
        amount: Of the experts of each layer.
        statistics: Rank the experts by their outputs where they have these; others are ranked by
            their weights.

    Returns:
        The smaller model, and the statistics of its units.

    Raises:
        InvalidSpec: The model has no experts with tensors of their own.
        InvalidStateDict: It would have fewer experts than compute a token.
    """
    config, model = transformer_in(folder, source)
    layers = [layer for layer in range(model.layers) if model.has_experts(layer)]
    if model.layout.experts is None or model.layout.experts.is_stacked or not layers:
        raise InvalidSpec(f"experts: {folder.path}: has no experts with tensors of their own")
    outputs = {} if statistics is None else statistics.experts
    kept = [_kept(client, source, model, layer, amount, outputs.get(layer)) for layer in layers]
    count = {model.experts_key: len(kept[0])}
    check_expressible(model, replace(model, config={**model.config, **count}))
    for layer, of_layer in zip(layers, kept, strict=True):
        source = _cut(source, model, layer, of_layer)
        if statistics is not None:
            statistics = statistics.without_experts(of_layer, _stack_of(model, layer))
    note = f"{model.experts_key}: {model.experts} -> {len(kept[0])}"
    return replace(source, folder=with_inner(folder, config, model, count, note)), statistics


def _kept(
    client: Client,
    source: Source,
    model: Transformer,
    layer: int,
    amount: AnyAmount,
    outputs: UnitStatistics | None,
) -> list[int]:
    """The experts of a layer that are kept."""
    router = _router(model, layer)
    if outputs is not None and outputs.units != model.experts:
        raise InvalidStatistics(
            f"{router}: has {model.experts} experts, and its statistics have {outputs.units}; "
            "calibrate this model"
        )
    tensors = {router: source.tensors[router], **_stacked(source, model, layer)}
    ranked = Source(tensors, frozenset(tensors), as_torch=False, order=tuple(tensors))
    scores = None if outputs is None else {"experts": outputs.means}
    experts = group("experts", *map(member, tensors))
    spec = grouped([experts], amount, align=1, importance_scores=scores)
    mask = client.prune(ranked, spec, progress=False).masks[router]
    return [int(expert) for expert in np.flatnonzero(mask.any(axis=1))]


def _router(model: Transformer, layer: int) -> str:
    assert model.layout.experts is not None, "the caller looked at it"
    return f"{model.layer(layer)}{model.layout.experts.router}.weight"


def _stack_of(model: Transformer, layer: int) -> str:
    """The list of a layer's experts."""
    assert model.layout.experts is not None, "the caller looked at it"
    return model.layer(layer) + model.layout.experts.mlp.down.partition(".{}")[0]


def _stacked(source: Source, model: Transformer, layer: int) -> dict[str, LocalTensor]:
    """The weights of a layer's experts, those of one name in one tensor."""
    stacks: dict[str, list[LocalTensor]] = {}
    for mlp, _ in model.networks(layer):
        for place, name in enumerate((*mlp.up, mlp.down)):
            weight = source.tensors[model.weight(name, mlp.kind)]
            stacks.setdefault(f"projection {place}", []).append(weight)
    return {name: _stack(weights) for name, weights in stacks.items()}


def _stack(weights: Sequence[LocalTensor]) -> LocalTensor:
    def read() -> Bytes:
        return np.concatenate([weight.read() for weight in weights])

    return LocalTensor(weights[0].dtype, (len(weights), *weights[0].shape), read)


def _cut(source: Source, model: Transformer, layer: int, kept: Sequence[int]) -> Source:
    """The model with some experts of a layer."""
    removed = set(range(model.experts)).difference(kept)
    smaller = without_layers(source, removed, _stack_of(model, layer))
    router = _router(model, layer)
    tensors = {**smaller.tensors, router: _rows(smaller.tensors[router], kept)}
    return replace(smaller, tensors=tensors)


def _rows(tensor: LocalTensor, kept: Sequence[int]) -> LocalTensor:
    """Some rows of a matrix."""

    def read() -> Bytes:
        return tensor.read().reshape(tensor.shape[0], -1)[list(kept)].reshape(-1)

    return LocalTensor(tensor.dtype, (len(kept), *tensor.shape[1:]), read)
