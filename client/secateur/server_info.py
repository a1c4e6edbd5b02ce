"""What a server is, and what it can do."""

from collections.abc import Iterable
from dataclasses import dataclass

from secateur_proto import pruner_pb2 as pb


@dataclass(frozen=True)
class ServerInfo:
    """The version, features and limits of a server.

    Names are those of the protocol in lower case, without the prefix of their enum: "masks",
    "slice". They may be newer than this client.

    Attributes:
        version: Of the package secateur.
        outputs: What a result may be sent as.
        importances: By what units may be ranked.
        granularities: What may be pruned as one unit.
        scopes: Over what units may be ranked.
        amounts: How an amount may be given.
        allocations: How a total may be divided among tensors.
        max_model_bytes: The most bytes of a model that a call may send.
    """

    version: str
    outputs: tuple[str, ...]
    importances: tuple[str, ...]
    granularities: tuple[str, ...]
    scopes: tuple[str, ...]
    amounts: tuple[str, ...]
    allocations: tuple[str, ...]
    max_model_bytes: int


def decode_server_info(message: pb.GetServerInfoResponse) -> ServerInfo:
    """A server's answer from the wire."""
    return ServerInfo(
        version=message.version,
        outputs=_plain("OUTPUT_", message.outputs),
        importances=tuple(message.importances),
        granularities=_plain("GRANULARITY_", message.granularities),
        scopes=_plain("SCOPE_", message.scopes),
        amounts=tuple(message.amounts),
        allocations=_plain("ALLOCATION_", message.allocations),
        max_model_bytes=message.max_model_bytes,
    )


def _plain(prefix: str, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(name.removeprefix(prefix).lower() for name in names)
