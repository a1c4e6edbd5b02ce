"""FLAP: units whose inputs to their consumers fluctuate little (An et al., AAAI 2024)."""

from typing import Any

import numpy as np

from secateur.calibration.layer import Doubles, LayerStatistics
from secateur.calibration.statistics import Statistics
from secateur.checks import shown
from secateur.errors import InvalidSpec, InvalidStatistics
from secateur.grouping import Groups
from secateur.model import Source
from secateur.units.slices import Slices, checked_groups, slices_in
from secateur.units.weights import read_here, squared_norms, weight_of
from secateur_proto import spec_pb2 as pb


def flap(
    source: Any, statistics: Statistics, groups: Groups, key: str | None = None
) -> dict[str, Doubles]:
    """Scores units of groups by how much their values fluctuate, as FLAP does.

    A unit's score is the sum of variance(x_j) * ||W[:, j]||^2 over the columns j of weights W that
    read it. That is how much the outputs of W change, on the average of the squares, if the unit is
    replaced by its mean; see `compensated`.

    Args:
        source: See `Client`; not a model on the server.
        statistics: What `calibrate` returns.
        groups: What `groups` or `transformer_groups` returns, for example. A member is a weight
            that reads the units if the statistics have it, and its `dim` is that of the inputs.
        key: See `Client`.

    Returns:
        The scores of each group, in float64: `importance_scores` of `grouped`.

    Raises:
        InvalidSpec: The groups are wrong, or do not fit the model.
        InvalidStatistics: No weight with statistics reads a group's units, or they do not fit.
    """
    check_statistics(statistics)
    model = read_here(source, key)
    norms: dict[tuple[str, int], Doubles] = {}

    def norms_of(one: Slices) -> Doubles:
        if (one.name, one.dim) not in norms:  # many groups of heads read one weight
            norms[one.name, one.dim] = squared_norms(weight_of(model, one.name), one.dim)
        return norms[one.name, one.dim]

    scores = {}
    for name, group in checked_groups(groups).items():
        readers = _readers(model, statistics, group)
        parts = [(_variance(layer, one) * norms_of(one))[one.of].sum(1) for one, layer in readers]
        scores[name] = np.sum(parts, axis=0)
    return scores


def check_statistics(statistics: Any) -> None:
    """Refuses what is not a Statistics.

    Raises:
        InvalidSpec: It is of another type.
    """
    if not isinstance(statistics, Statistics):
        raise InvalidSpec(f"statistics: {shown(statistics)} is not a Statistics; see calibrate")


def _readers(
    model: Source, statistics: Statistics, group: pb.Group
) -> list[tuple[Slices, LayerStatistics]]:
    """The members that read a group's units, with the statistics of what they read."""
    found = []
    for one in slices_in(group, model):
        layer = statistics.get(one.name, statistics.get(one.given))
        if layer is not None and one.is_scored and one.dim == layer.input_dim:
            found.append((one, layer))
    if not found:
        names = ", ".join(sorted({member.tensor for member in group.members}))
        raise InvalidStatistics(
            f"{group.name}: the statistics have no weight that reads its units, among {names}; "
            "calibrate the layer after them"
        )
    for one, layer in found:
        size = model.prunable()[one.name].shape[one.dim]
        if layer.inputs != size:
            raise InvalidStatistics(
                f"{one.given}: has {size} inputs, and its statistics have {layer.inputs}; "
                "calibrate this model"
            )
    return found


def _variance(layer: LayerStatistics, one: Slices) -> Doubles:
    variance = layer.variance
    if variance is None:
        raise InvalidStatistics(
            f"{one.given}: its statistics have no sum, which a variance needs; use calibrate, or a "
            "newer llama-imatrix"
        )
    return variance
