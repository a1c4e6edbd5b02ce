"""Decodes guard rails."""

from secateur_proto import spec_pb2 as pb
from secateur_server.errors import AmountOutOfRange
from secateur_server.fields import check_length
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.rules import GuardRails, Rail

# As PruningSpec in spec.proto lists them.
MOST_RAILS = 100_000


def decode_rails(context: RequestContext, rails: pb.GuardRails, path: str) -> GuardRails:
    """Decodes guard rails.

    Args:
        context: The request.
        rails: The message.
        path: Of the message in the request.

    Returns:
        The guard rails, not resolved.

    Raises:
        AmountOutOfRange: A rail has an impossible bound.
    """
    check_length(f"{path}.rails", rails.rails, MOST_RAILS, "rails")
    found = (_rail(rail, f"{path}.rails[{i}]") for i, rail in enumerate(context.each(rails.rails)))
    return GuardRails(
        rails=tuple(found),
        keep_first=rails.keep_first,
        keep_last=rails.keep_last,
        exclude=tuple(rails.exclude),
    )


def _rail(rail: pb.Rail, path: str) -> Rail:
    least, most = rail.min_sparsity, rail.max_sparsity if rail.HasField("max_sparsity") else 1.0
    for field, value in (("min_sparsity", least), ("max_sparsity", most)):
        if not 0.0 <= value <= 1.0:
            raise AmountOutOfRange(f"{path}.{field}", f"{value} is outside [0, 1]")
    if least > most:
        raise AmountOutOfRange(
            f"{path}.min_sparsity",
            f"{least} is more than max_sparsity, {most}, by {least - most:g}",
        )
    return Rail(path, tuple(rail.tensors), least, most, rail.keep_at_least)
