"""The details of the largest tensors of a report: what a page shows of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from secateur_server.backends import backend_for
from secateur_server.backends.masks import Mask, kept_slices
from secateur_server.backends.pieces import Ints
from secateur_server.report.groups import count_groups
from secateur_server.report.histogram import BINS, Histogram, histogram_of
from secateur_server.report.images import Image, bytes_of_images, images_of
from secateur_server.report.measure import nonzero_mask
from secateur_server.report.structure import GROUPS
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.parameter import Parameter

# The most slices along a dimension that are listed.
MOST_SLICES = 1 << 16

# What a tensor's details count as at least: so a budget also bounds how many tensors have them.
LEAST_BYTES = 1 << 10

# Bytes of the fields of a message that have neither counts nor pixels, or more.
_OTHER_BYTES = 256


@dataclass(frozen=True)
class TensorDetails:
    """The details of a tensor.

    Attributes:
        histogram: Of the weights.
        groups: As count_groups returns them.
        images: As images_of returns them; empty if no element is zero.
        zero_slices: For each dimension that has any, a bit for each of the first MOST_SLICES
            slices: 1 is wholly zero.
    """

    histogram: Histogram
    groups: Mapping[int, Ints]
    images: Sequence[Image]
    zero_slices: Mapping[int, bytes]


@dataclass(frozen=True)
class Chosen:
    """The tensors that get details.

    Attributes:
        histograms: Of each tensor, by its name.
        bytes: An upper bound of the bytes of all details.
    """

    histograms: Mapping[str, Histogram]
    bytes: int


def choose(context: RequestContext, parameters: Mapping[str, Parameter], most_bytes: int) -> Chosen:
    """Chooses the largest tensors whose details take `most_bytes` at most.

    Args:
        context: The request.
        parameters: Those of the report. Masks have not been applied to weights.
        most_bytes: The first tensor that would exceed them ends the choice.
    """
    found, held = dict[str, Histogram](), 0
    for name in sorted(parameters, key=lambda name: -parameters[name].weight.numel()):
        context.check()
        parameter = parameters[name]
        if not parameter.weight.numel() or held + LEAST_BYTES > most_bytes:
            break
        histogram = histogram_of(context, parameter)
        size = max(LEAST_BYTES, _bytes_of(parameter, histogram))
        if held + size > most_bytes:
            break
        found[name] = histogram
        held += size
    return Chosen(found, held)


def _bytes_of(parameter: Parameter, histogram: Histogram) -> int:
    """An upper bound of the bytes of a tensor's details."""
    shape, total = parameter.weight.shape or (1,), parameter.weight.numel()
    numbers = (1 + (parameter.mask is not None)) * BINS + sum(m + 1 for m in GROUPS)
    size = _OTHER_BYTES + numbers * -(-total.bit_length() // 7)
    if histogram.zeros + histogram.pruned:
        size += bytes_of_images(shape) + sum(min(n, MOST_SLICES) // 8 + 8 for n in shape)
    return size


def details_of(
    context: RequestContext, histogram: Histogram, parameter: Parameter, zero_slices: Iterable[int]
) -> TensorDetails:
    """Makes the details of a tensor.

    Args:
        context: The request.
        histogram: Of the tensor before masks were applied, or slices removed.
        parameter: As it is sent.
        zero_slices: For each dimension how many slices are wholly zero.
    """
    shape = parameter.weight.shape or (1,)
    nonzero = nonzero_mask(context, parameter) if histogram.zeros else parameter.mask
    if nonzero is None or nonzero.kept(context) == nonzero.elements:
        return TensorDetails(histogram, count_groups(context, None, shape), (), {})
    slices = {
        dim: _zero_slices(context, nonzero, shape, dim)
        for dim, count in enumerate(zero_slices)
        if count
    }
    images = images_of(context, nonzero, shape)
    return TensorDetails(histogram, count_groups(context, nonzero, shape), images, slices)


def _zero_slices(context: RequestContext, mask: Mask, shape: Sequence[int], dim: int) -> bytes:
    is_zero = ~kept_slices(context, mask, shape, dim)[:MOST_SLICES]
    bits = backend_for(is_zero.device).pack(is_zero)
    return bits.cpu().numpy().tobytes()
