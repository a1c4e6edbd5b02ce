"""Scores the units of a tensor."""

import math
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from secateur_server.backends import backend_for, spans
from secateur_server.backends.keys import INFINITY
from secateur_server.backends.masks import Mask
from secateur_server.backends.pieces import Observed, Piece, Scores, Stored
from secateur_server.backends.randomness import random_scores
from secateur_server.backends.scan import Sample, Scan
from secateur_server.cut.drivers import Driver, driver_for
from secateur_server.errors import NanScores
from secateur_server.granularity import Granularity
from secateur_server.importance import Importance
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.parameter import Parameter


class Ranked(Protocol):
    """Units of a tensor with their scores, in this process or elsewhere."""

    @property
    def units(self) -> int:
        """How many there are."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the scores compare without loss."""

    @property
    def offset(self) -> float:
        """What was subtracted from the scores so that none is negative; 0 or less."""

    def driver(self, context: RequestContext) -> Driver:
        """Returns the driver of the scores."""

    def pieces(self, dtype: torch.dtype, size: int) -> Sequence[Observed]:
        """Returns all units in pieces of at most `size`, to be compared as `dtype`."""


class Ranking(NamedTuple):
    """The units of one tensor with their scores. The absolute value of a score counts.

    Attributes:
        name: Of the tensor, or group.
        units: How many there are.
        scores: Without NaN for candidates.
        candidates: A mask of units; None if all are candidates.
        device: Of the scores.
        sample: Of the scores, if there is one already.
        offset: What was subtracted from the scores so that none is negative; 0 or less.
    """

    name: str
    units: int
    scores: Scores
    candidates: Mask | None
    device: torch.device
    sample: Sample | None = None
    offset: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which scores compare without loss."""
        return self.scores.dtype

    @property
    def is_random(self) -> bool:
        """Whether the scores are random, and computed where they are needed."""
        return self.scores.stored is None

    @property
    def values(self) -> Tensor:
        """The scores of units that have no random ones: flat."""
        values = self.scores.stored
        assert values is not None, "random scores are not stored"
        return values

    def driver(self, context: RequestContext) -> Driver:
        """Returns the driver of the scores."""
        return driver_for(context, self.device)

    def piece(self, dtype: torch.dtype, begin: int, end: int) -> Piece:
        """Returns the units [begin, end), to be compared as `dtype`. `begin` is a multiple of 8."""
        candidates = None if self.candidates is None else self.candidates.part(begin, end)
        return Piece(end - begin, self.scores.part(begin, end), dtype, candidates)

    def pieces(self, dtype: torch.dtype, size: int) -> list[Piece]:
        """Returns all units in pieces of `size`, to be compared as `dtype`."""
        return [self.piece(dtype, *span) for span in spans(self.units, size)]

    def count_candidates(self, context: RequestContext) -> int:
        """Counts the units that are still unpruned."""
        return self.units if self.candidates is None else self.candidates.kept(context)


def in_this_process(rankings: Sequence[Ranked]) -> list[Ranking] | None:
    """Returns the same rankings if all their scores are in this process, else None."""
    here = [ranking for ranking in rankings if isinstance(ranking, Ranking)]
    return here if len(here) == len(rankings) else None


def score_dtype(rankings: Sequence[Ranked]) -> torch.dtype:
    """Returns the dtype in which all scores compare without loss."""
    return reduce(torch.promote_types, {ranking.dtype for ranking in rankings})


def score_units(
    context: RequestContext,
    name: str,
    parameter: Parameter,
    scores: Tensor | None,
    importance: Importance,
    granularity: Granularity,
    is_mean: bool,
    is_all: bool,
    field: str,
) -> Ranking:
    """Scores the units of one tensor.

    Args:
        context: The request.
        name: Of the tensor.
        parameter: The tensor and its prior mask.
        scores: Scores of its elements or of its units, which replace the weight; or None.
        importance: Computes scores of units from those of elements.
        granularity: Says what the units are.
        is_mean: Whether to use power means, which compare units of several sizes.
        is_all: Whether all units are pruned, so that any scores will do.
        field: The path of the scored tensor, for errors.

    Returns:
        The units with their scores.

    Raises:
        NanScores: A score is NaN.
    """
    weight, mask = parameter.weight, parameter.mask
    are_elementwise = scores is not None and scores.shape == weight.shape
    values = scores if scores is not None and are_elementwise else weight
    units = math.prod(granularity.grid(weight.shape))
    candidates = granularity.candidates(context, values, mask)
    if by_name := importance.by_name(name):
        return Ranking(name, units, by_name, candidates, weight.device)
    if scores is not None and not are_elementwise:
        refuse_nan(context, scores, candidates, field)
        return Ranking(name, units, Stored(scores.reshape(-1)), candidates, weight.device)
    seen = parameter.scan if scores is None else None
    if scores is not None and candidates is not None and not granularity.is_part:
        mask = granularity.expand(context, candidates, values, mask)  # the scores that are read
    refuse_nan(context, values, mask, field, seen)
    if is_all:
        return Ranking(name, units, random_scores(0, name), candidates, weight.device)
    # As in torch, pruned elements count as 0 in the norm of a weight, and as they are in uploaded
    # scores. But only unpruned elements of an N:M group can be pruned.
    masked = mask if scores is None or granularity.is_part else None
    unit_scores = importance.scores(context, values, masked, granularity, is_mean)
    sample = seen.sample if seen and granularity.is_element and importance.is_value else None
    return Ranking(name, units, Stored(unit_scores), candidates, weight.device, sample)


def refuse_nan(
    context: RequestContext, values: Tensor, mask: Mask | None, field: str, scan: Scan | None = None
) -> None:
    """Refuses NaN among unpruned values.

    Args:
        context: The request.
        values: In any shape.
        mask: Elements that are kept; None if all are.
        field: The path of the values, for errors.
        scan: Statistics of `values` that were gathered while they arrived.

    Raises:
        NanScores: An unpruned value is NaN.
    """
    if not values.dtype.is_floating_point:
        return
    backend, flat = backend_for(values.device), values.reshape(-1)
    if scan is None:
        parts = spans(len(flat), backend.ranked)
        found = backend.map(context, lambda s: backend.extremes(flat[slice(*s)]), parts)
        largest = max((most for _, most in found), default=0)
    else:
        largest = scan.largest
    if largest <= INFINITY[values.dtype]:
        return
    nan = values.isnan() if mask is None else values.isnan() & mask.whole(context, values.shape)
    count = int(nan.count_nonzero())
    if count:
        first = nan.nonzero()[0].tolist()
        raise NanScores(
            field,
            f"is NaN at {first} and in {count} of {nan.numel()} elements; replace NaN before "
            "pruning, or leave the tensor out",
        )
