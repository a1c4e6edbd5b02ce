"""Histograms of weights by their magnitude."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from secateur_server.backends import backend_for, spans
from secateur_server.backends.keys import score_at
from secateur_server.backends.pieces import Ints
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.parameter import Parameter

BINS = 128


@dataclass(frozen=True)
class Histogram:
    """Weights of a parameter by their magnitude |w|.

    |w| is in the bin floor(|w| / largest * BINS), computed in float64, or in the last one.

    Attributes:
        largest: The largest finite magnitude; 0 if there is none.
        counts: (2, BINS + 2): a line for those that are kept, and one for those that the mask
            prunes. At 0 the zeros, then the bins from 0 to `largest`, at last infinities and NaN.
    """

    largest: float
    counts: Ints

    @property
    def zeros(self) -> int:
        """Weights that are zero themselves, pruned or not."""
        return int(self.counts[:, 0].sum())

    @property
    def pruned(self) -> int:
        """Weights that the mask prunes."""
        return int(self.counts[1].sum())

    @property
    def non_finite(self) -> int:
        """Weights that are infinite or NaN, pruned or not."""
        return int(self.counts[:, -1].sum())


def histogram_of(context: RequestContext, parameter: Parameter) -> Histogram:
    """Makes the histogram of a parameter with elements, whose mask is not applied to it."""
    values, mask = parameter.weight.reshape(-1), parameter.mask
    backend, largest = backend_for(values.device), _largest(context, parameter)

    def count(span: tuple[int, int]) -> Ints:
        counts = np.zeros((2, BINS + 2), np.int64)
        kept = None if mask is None else mask.part(*span)
        backend.count_magnitudes(values[slice(*span)], kept, largest, counts)
        return counts

    parts = backend.map(context, count, spans(len(values), backend.piece))
    return Histogram(largest, np.sum(parts, axis=0))


def _largest(context: RequestContext, parameter: Parameter) -> float:
    """The largest finite magnitude."""
    values = parameter.weight.reshape(-1)
    if parameter.scan is not None:
        largest = score_at(parameter.scan.largest, values.dtype)
        if math.isfinite(largest):
            return largest
    backend = backend_for(values.device)
    parts = spans(len(values), backend.piece)
    return max(backend.map(context, lambda span: _largest_in(values[slice(*span)]), parts))


def _largest_in(values: Tensor) -> float:
    if values.is_floating_point():
        largest = score_at(backend_for(values.device).extremes(values)[1], values.dtype)
        if math.isfinite(largest):
            return largest
    magnitudes = values.to(torch.float64).abs()
    return float(magnitudes.masked_fill_(~magnitudes.isfinite(), 0).max())
