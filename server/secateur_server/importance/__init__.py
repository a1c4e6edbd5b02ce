"""Scores: how much a unit matters.

One file for each kind. A new kind is a file here, and a line in IMPORTANCES.
"""

from collections.abc import Callable

from secateur_proto import spec_pb2 as pb
from secateur_server.granularity import Granularity
from secateur_server.importance.activation import Activation
from secateur_server.importance.magnitude import decode_magnitude
from secateur_server.importance.protocol import Importance
from secateur_server.importance.random import Random

__all__ = ["IMPORTANCES", "Importance"]

# Each decodes its own field of a selection, whose path is for errors.
IMPORTANCES: dict[str, Callable[[pb.Selection, Granularity | None, str], Importance]] = {
    "magnitude": decode_magnitude,
    "random": Random.decode,
    "activation": Activation.decode,
}
