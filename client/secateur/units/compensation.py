"""Adds to biases what removed inputs add on average."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from secateur.calibration.layer import Doubles, LayerStatistics
from secateur.calibration.statistics import Statistics
from secateur.checks import text_keys
from secateur.errors import InvalidSpec, InvalidStatistics
from secateur.model import Source
from secateur.tensors import LocalTensor, from_value, to_value
from secateur.ties import tied, values_of
from secateur.units.flap import check_statistics
from secateur.units.weights import Array, floats, pieces, read_here, weight_of


def compensated(
    source: Any, masks: Mapping[str, Any], statistics: Statistics, key: str | None = None
) -> dict[str, Any]:
    """Adds to each bias what the pruned inputs of its weight add on average, as FLAP does.

    The pruned layer then has the mean output of the whole one, on the data of the statistics, up to
    the padding of convolutions. Weights without a bias, transposed convolutions, and the stacked
    projections of a MultiheadAttention are left as they are.

    Args:
        source: The model before it is pruned; see `Client`; not a model on the server.
        masks: What is kept: `masks` of a result of `prune`.
        statistics: What `calibrate` returns.
        key: See `Client`.

    Returns:
        The whole state_dict, with new biases and the weights as they were: prune it the same way.

    Raises:
        InvalidSpec: The masks do not fit the model.
        InvalidStatistics: The statistics do not fit the model, or have no sums.
    """
    check_statistics(statistics)
    model = read_here(source, key)
    tensors = dict(model.tensors)
    known = model.prunable_names()
    weights = {known.get(n, n): m for n, m in text_keys("masks", masks, "names to bools").items()}
    for name, mask in weights.items():
        layer = statistics.get(name)
        bias = f"{name.removesuffix('weight')}bias"
        stored = f"{bias}_orig" if bias in model.pairs() else bias
        if layer is None or not name.endswith("weight") or stored not in tensors:
            continue
        added = _mean_output(name, model, np.asarray(mask), layer)
        if added is not None:
            if bias in weights:  # what is pruned of it has no output
                added = np.where(np.asarray(weights[bias]), added, 0.0)
            tensors[stored] = _raised(stored, tensors[stored], added, model.as_torch)
    entries = tied({**tensors, **model.others}, model.other_names)
    return model.ordered(values_of(entries, model.as_torch))


def _mean_output(name: str, model: Source, mask: Array, layer: LayerStatistics) -> Doubles | None:
    """What the pruned inputs of a weight add on average; None if that is not known."""
    if name not in model.prunable():
        raise InvalidSpec(f"masks: {name}: the model has no floating tensor of this name")
    weight = weight_of(model, name)
    if mask.shape != weight.shape:
        raise InvalidSpec(f"masks: {name}: has shape {[*mask.shape]}, not {[*weight.shape]}")
    if layer.input_dim == 0:
        if weight.ndim != 2:
            return None
        weight, mask = weight.T, mask.T
    groups = layer.inputs // weight.shape[1]
    if groups * weight.shape[1] != layer.inputs or len(weight) % max(1, groups):
        raise InvalidStatistics(
            f"{name}: has {weight.shape[1]} inputs, and its statistics have {layer.inputs}; "
            "calibrate this model"
        )
    if layer.mean is None:
        raise InvalidStatistics(f"{name}: its statistics have no sum, which a mean needs")
    means = layer.mean.reshape(groups, -1).repeat(len(weight) // groups, axis=0)
    found = np.zeros(len(weight))
    for part, piece in pieces(weight):
        pruned = np.where(mask[part], 0.0, piece).reshape(*piece.shape[:2], -1).sum(2)
        found[part] = (pruned * means[part]).sum(1)
    return found


def _raised(name: str, bias: LocalTensor, added: Doubles, as_torch: bool) -> LocalTensor:
    """A bias with something added, in its own dtype."""
    raised = floats(name, bias).astype(np.float64) + added
    like = to_value(name, bias, as_torch)
    if as_torch:
        import torch

        return from_value(name, torch.from_numpy(raised).to(like.dtype))
    return from_value(name, raised.astype(like.dtype))
