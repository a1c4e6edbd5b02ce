"""Ranks the units of a transformer in a folder by statistics of its module.

A module may name its tensors otherwise than its files do, and number them before layers or experts
are removed.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from secateur.architectures.layout import Config
from secateur.architectures.transformer import Transformer, transformer_of
from secateur.calibration.layer import Doubles, LayerStatistics
from secateur.calibration.statistics import Statistics
from secateur.calibration.unit_statistics import UnitStatistics
from secateur.depth import renumbered
from secateur.errors import InvalidSpec, InvalidStatistics
from secateur.grouping import Group
from secateur.model import Source
from secateur.units.flap import flap
from secateur.units.influence import least_influential


@dataclass(frozen=True)
class Calibrated:
    """Statistics of a transformer.

    Attributes:
        file: The name of their file, for notes.
        weights: The inputs of weights, by the names of these in the folder.
        layers: The influence of each layer; None if it is not known.
        experts: The outputs of experts, by the numbers of their layers.
    """

    file: str
    weights: Mapping[str, LayerStatistics]
    layers: UnitStatistics | None
    experts: Mapping[int, UnitStatistics]

    def least_influential(self, count: int) -> list[int] | None:
        """Returns the layers to remove; None if their influence is not known."""
        if self.layers is None:
            return None
        return least_influential(Statistics({}, {"layers": self.layers}), count)

    def without_layers(self, removed: Collection[int], model: Transformer) -> "Calibrated":
        """Returns the statistics of the model without some layers, which are numbered anew."""
        kept = [layer for layer in range(model.layers) if layer not in removed]
        stack = model.layer(0).removesuffix(".0.")
        experts = {new: self.experts[old] for new, old in enumerate(kept) if old in self.experts}
        return replace(
            self, weights=renumbered(self.weights, kept, stack), layers=None, experts=experts
        )

    def without_experts(self, kept: Sequence[int], stack: str) -> "Calibrated":
        """Returns the statistics of the model with some experts of a layer; see `renumbered`."""
        return replace(self, weights=renumbered(self.weights, kept, stack))

    def scores(self, source: Source, groups: Sequence[Group]) -> dict[str, Doubles]:
        """Returns the scores of the groups whose readers have statistics."""
        known = [one for one in groups if any(self._reads(name, dim) for name, dim in _places(one))]
        return flap(source, Statistics(self.weights), known) if known else {}

    def _reads(self, name: str, dim: int) -> bool:
        layer = self.weights.get(name)
        return layer is not None and layer.sum is not None and layer.input_dim == dim


def _places(group: Group) -> Iterator[tuple[str, int]]:
    return ((member.tensor, member.dim) for member in group.members)


def calibrated(statistics: Statistics, config: Config, model: Transformer, file: str) -> Calibrated:
    """Finds the statistics of a transformer's units.

    Args:
        statistics: Of the module, or by the names of the folder.
        config: The folder's config.
        model: The transformer in the folder.
        file: The name of the file of the statistics.

    Raises:
        InvalidStatistics: They are of another model.
    """
    other = _transformer(statistics, config, model)
    weights = {**statistics}
    for here, there in _readers(model, other):
        if there in statistics:
            weights[here] = statistics[there]
    blocks = statistics.blocks.get(other.layer(0).removesuffix(".0."))
    if blocks is not None and blocks.units != model.layers:
        raise InvalidStatistics(
            f"{file}: has the influence of {blocks.units} layers, and the model has "
            f"{model.layers}; calibrate this model"
        )
    experts = dict(_experts(statistics, other))
    if not weights.keys() & (model.shapes or {}).keys() and blocks is None and not experts:
        raise InvalidStatistics(
            f"{file}: has no statistics of this model, such as of {model.layer(0)}{model.layout.o}"
        )
    return Calibrated(file, weights, blocks, experts)


def _transformer(statistics: Statistics, config: Config, model: Transformer) -> Transformer:
    """The transformer with the names of the statistics."""
    names = [*statistics, *(f"{name}.down_proj" for name in statistics.experts)]
    try:
        return transformer_of(config, dict.fromkeys(names, ()))
    except InvalidSpec:  # some layers only, or another model
        return model


def _readers(model: Transformer, other: Transformer) -> Iterator[tuple[str, str]]:
    """The names of weights that read units, in the folder and in the statistics."""
    here, there = model.layout, other.layout
    parts = [(here.o + here.kind.suffix, there.o + there.kind.suffix)]
    if here.mlp is not None and there.mlp is not None:
        downs = (here.mlp.down + here.mlp.kind.suffix, there.mlp.down + there.mlp.kind.suffix)
        parts.append(downs)
    for layer in range(model.layers):
        for part, other_part in parts:
            yield model.layer(layer) + part, other.layer(layer) + other_part


def _experts(statistics: Statistics, other: Transformer) -> Iterator[tuple[int, UnitStatistics]]:
    """The outputs of experts by their layers."""
    mixtures = (layout.experts for layout in other.architecture.layouts)
    stacked = [mixture.mlp.down for mixture in mixtures if mixture and mixture.is_stacked]
    for layer in range(other.layers):
        for down in stacked:
            name = other.layer(layer) + down.rpartition(".")[0]
            if name in statistics.experts:
                yield layer, statistics.experts[name]
