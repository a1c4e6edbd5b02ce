"""How many bytes each form of a result has, known before there is one."""

import itertools
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from secateur_proto.framing import file_head, mask_bytes
from secateur_server.devices.masks import Mask
from secateur_server.errors import InvalidStateDict
from secateur_server.model import Model
from secateur_server.pruning.spec import Parameter
from secateur_server.wire.tensors import WireTensor

NOTHING = torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True)
class FormBytes:
    """Bytes of the data of each form; 0 where a form cannot be, as a name in it is taken."""

    masks: int
    reparametrized: int
    dense: int


def form_bytes(model: Model, pruned: Sequence[str]) -> FormBytes:
    """The forms of `model` when its parameters `pruned` are."""
    hollow = _hollow(model, pruned)
    sizes = (math.prod(model.catalog.prunable[name]) for name in pruned)
    masks = zip(pruned, itertools.repeat("U8"), ((mask_bytes(n),) for n in sizes), strict=False)
    reparametrized = 0
    with suppress(InvalidStateDict):
        reparametrized = hollow.size(())
    return FormBytes(file_head(masks)[1], reparametrized, hollow.size(hollow.parameters))


def _hollow(model: Model, pruned: Sequence[str]) -> Model:
    """The model without its data, but with masks for all that is pruned."""
    hollow = Model(model.shards, model.catalog.extras, model.index)
    pairs = model.catalog.pairs
    of_pairs = {mask for _, *masks in pairs.values() for mask in masks}
    hollow.tensors = {
        entry.name: WireTensor(entry.dtype, entry.shape, NOTHING)
        for shard in model.shards
        for entry in shard.entries
        if entry.name not in of_pairs
    }
    has_mask = {*pruned, *pairs, *model.masks}
    hollow.parameters = {
        name: Parameter(NOTHING, Mask(NOTHING, math.prod(shape)))
        for name, shape in model.catalog.prunable.items()
        if name in has_mask
    }
    return hollow
