"""A model without its data, from which outputs tell their sizes before they are made."""

import math
from collections.abc import Sequence

import torch

from secateur_server.backends.masks import Mask
from secateur_server.state_dict.model import Model
from secateur_server.state_dict.parameter import Parameter
from secateur_server.wire.tensors import WireTensor

NO_DATA = torch.empty(0, dtype=torch.uint8)


def hollow_model(model: Model, pruned: Sequence[str]) -> Model:
    """The model as it is once some of its parameters are pruned, without its data."""
    hollow = Model(model.shards, model.catalog.extras, model.index)
    pairs = model.catalog.pairs
    of_pairs = {mask for _, *masks in pairs.values() for mask in masks}
    hollow.tensors = {
        entry.name: WireTensor(entry.dtype, entry.shape, NO_DATA)
        for shard in model.shards
        for entry in shard.entries
        if entry.name not in of_pairs
    }
    has_mask = {*pruned, *pairs, *model.masks}
    hollow.parameters = {
        name: Parameter(NO_DATA, Mask(NO_DATA, math.prod(shape)))
        for name, shape in model.catalog.prunable.items()
        if name in has_mask
    }
    return hollow
