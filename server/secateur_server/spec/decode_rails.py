"""Decodes guard rails."""

from secateur_proto import spec_pb2 as pb
from secateur_server.errors import AmountOutOfRange
from secateur_server.fields import check_length, fraction_of
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.rules import GuardRails, Rail

# As PruningSpec in spec.proto lists them.
MOST_RAILS = 100_000


def decode_rails(context: RequestContext, rails: pb.GuardRails, path: str) -> GuardRails:
    """Decodes guard rails, whose globs are not resolved yet.

    Raises:
        AmountOutOfRange: A rail has an impossible bound.
    """
    check_length(f"{path}.rails", rails.rails, MOST_RAILS, "rails")
    found = (_rail(rail, f"{path}.rails[{i}]") for i, rail in enumerate(context.each(rails.rails)))
    return GuardRails(tuple(found), rails.keep_first, rails.keep_last, tuple(rails.exclude))


def _rail(rail: pb.Rail, path: str) -> Rail:
    least = fraction_of(rail.min_sparsity, f"{path}.min_sparsity")
    most = rail.max_sparsity if rail.HasField("max_sparsity") else 1.0
    fraction_of(most, f"{path}.max_sparsity")
    if least > most:
        raise AmountOutOfRange(
            f"{path}.min_sparsity",
            f"{least} is more than max_sparsity, {most}, by {least - most:g}",
        )
    return Rail(path, tuple(rail.tensors), least, most, rail.keep_at_least)
