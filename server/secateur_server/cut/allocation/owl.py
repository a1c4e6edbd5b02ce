"""Outlier-weighed layerwise sparsity, OWL: Yin et al. 2024.

Layers with a larger share of outliers keep more. An outlier is OUTLIER times as important as the
mean of its layer.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from secateur_server.backends.norms import total
from secateur_server.cut.drivers import driver_for
from secateur_server.cut.elements import score_tensor
from secateur_server.cut.normalize import moments_of
from secateur_server.cut.observe import observe_score
from secateur_server.cut.score import Ranking
from secateur_server.errors import InvalidSpec, quote
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.amounts import Fraction
from secateur_server.spec.rules import Selection
from secateur_server.state_dict.parameter import Parameter

OUTLIER = 5.0
# Half the range of the fractions.
LAMBDA = 0.08


@dataclass(frozen=True)
class Layer:
    """Tensors that get the same fraction.

    Attributes:
        names: Of the tensors.
        elements: How many the fraction is of.
        outliers: The share of unpruned elements that are outliers.
    """

    names: Sequence[str]
    elements: int
    outliers: float


def fractions_by_owl(
    context: RequestContext,
    rule: Selection,
    state: Mapping[str, Parameter],
    extras: Mapping[str, Tensor],
) -> dict[str, float]:
    """Returns the fraction of each tensor of a rule.

    Scores are computed twice, and only those of one tensor are in memory.

    Args:
        context: The request.
        rule: Resolved.
        state: All parameters.
        extras: Uploaded tensors.

    Raises:
        InvalidSpec: A score is infinite or NaN.
    """
    amount = rule.amount
    assert isinstance(amount, Fraction), "the spec is refused otherwise"
    with context.stage("score"):
        layers = [
            _layer(context, rule, names, state, extras)
            for names in context.each(_layers(rule.tensors).values())
        ]
    outliers, elements = [of.outliers for of in layers], [of.elements for of in layers]
    fractions = divided(outliers, elements, amount.value)
    return {
        name: fraction
        for layer, fraction in zip(layers, fractions, strict=True)
        for name in layer.names
    }


def _layers(names: Sequence[str]) -> dict[str, list[str]]:
    """The tensors of each layer, by the part of their names up to the first number."""
    layers: dict[str, list[str]] = {}
    for name in names:
        numbered = re.match(r"\D*\d+", name)
        layers.setdefault(numbered[0] if numbered else name, []).append(name)
    return layers


def divided(outliers: Sequence[float], elements: Sequence[int], fraction: float) -> list[float]:
    """Computes the fraction that is pruned of each layer.

    Fractions fall linearly with the shares of outliers, over a range of 2 LAMBDA. Their mean over
    all elements is `fraction`: where some would be outside [0, 1], all are moved further.

    Args:
        outliers: The share of outliers of each layer.
        elements: Of each layer.
        fraction: Of all layers.
    """
    every = sum(elements)
    known = [share for share, count in zip(outliers, elements, strict=True) if count]
    least, most = min(known, default=0.0), max(known, default=0.0)
    if least == most:
        return [fraction] * len(outliers)
    scale = 2 * LAMBDA / (most - least)
    kept_more = [(share - least) * scale for share in outliers]
    mean = total(more * n for more, n in zip(kept_more, elements, strict=True)) / every
    found = [fraction + mean - more for more in kept_more]
    if all(0 <= f <= 1 for f in found):
        return found
    low, high = -2.0, 2.0
    for _ in range(64):  # as narrow as doubles allow
        middle = (low + high) / 2
        pruned = total(_clipped(f + middle) * n for f, n in zip(found, elements, strict=True))
        low, high = (middle, high) if pruned < fraction * every else (low, middle)
    return [_clipped(f + high) for f in found]


def _clipped(fraction: float) -> float:
    return min(max(fraction, 0.0), 1.0)


def _layer(
    context: RequestContext,
    rule: Selection,
    names: Sequence[str],
    state: Mapping[str, Parameter],
    extras: Mapping[str, Tensor],
) -> Layer:
    """Counts the outliers of a layer."""
    filled = [name for name in names if state[name].weight.numel()]
    found = []
    for name in context.each(filled):
        ranking = score_tensor(context, rule, name, state, extras)
        found.append(moments_of(context, ranking))
        if not math.isfinite(found[-1].total):
            raise InvalidSpec(
                f"{rule.path}.allocation",
                f"{quote(name)} has scores that are too large for OWL; use another allocation",
            )
    candidates = sum(of.units for of in found)
    limit = OUTLIER * total(of.total for of in found) / max(1, candidates)
    above = 0
    for name in context.each(filled):
        ranking = score_tensor(context, rule, name, state, extras)
        above += _count_above(context, ranking, limit)
    elements = sum(state[name].weight.numel() for name in filled) if rule.of_all else candidates
    return Layer(names, elements, above / max(1, candidates))


def _count_above(context: RequestContext, ranking: Ranking, limit: float) -> int:
    """Counts the candidates with a score above a limit."""
    next_above = math.nextafter(limit, math.inf)
    driver = driver_for(context, ranking.device)
    ((below, _),) = observe_score(context, driver, [ranking], next_above)
    return ranking.count_candidates(context) - below
