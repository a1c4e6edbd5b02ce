"""State_dicts without their data, from which outputs predict their sizes."""

import math
from collections.abc import Sequence

import torch

from secateur_server.backends.masks import Mask
from secateur_server.state_dict.parameter import Parameter
from secateur_server.state_dict.state_dict import StateDict
from secateur_server.wire.tensors import WireTensor

NO_DATA = torch.empty(0, dtype=torch.uint8)


def hollow_state_dict(state_dict: StateDict, pruned: Sequence[str]) -> StateDict:
    """Makes a state_dict of the same tensors without their data, as it is after a pruning.

    Args:
        state_dict: Its headers are known.
        pruned: The names of the parameters that the pruning gives masks.

    Returns:
        A state_dict with empty tensors.
    """
    hollow = StateDict(state_dict.shards, state_dict.catalog.extras, state_dict.index)
    pairs = state_dict.catalog.pairs
    of_pairs = {mask for _, *masks in pairs.values() for mask in masks}
    hollow.tensors = {
        entry.name: WireTensor(entry.dtype, entry.shape, NO_DATA)
        for shard in state_dict.shards
        for entry in shard.entries
        if entry.name not in of_pairs
    }
    has_mask = {*pruned, *pairs, *state_dict.masks}
    hollow.parameters = {
        name: Parameter(NO_DATA, Mask(NO_DATA, math.prod(shape)))
        for name, shape in state_dict.catalog.prunable.items()
        if name in has_mask
    }
    return hollow
