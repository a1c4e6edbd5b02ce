"""The version, features and limits of a server."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from secateur.decoding import decoded
from secateur_proto import pruner_pb2 as pb


@dataclass(frozen=True)
class ServerInfo:
    """The version, features and limits of a server.

    Names are those of the protocol in lower case, without the prefix of their enum: "masks",
    "slice". They may be newer than this client.

    Attributes:
        version: The version of the package secateur.
        outputs: What a result may be sent as.
        importances: What may rank units.
        granularities: What may be pruned as one unit.
        scopes: Which units may be ranked together.
        amounts: How an amount may be given.
        allocations: How a total may be divided among tensors.
        max_model_bytes: The most bytes of a model that a call may send.
        solvers: Which methods may update weights.
        device: What prunes large models: cpu or cuda:N. Empty from older servers.
        versions: Of python, torch and numba on the server. Empty from older servers.
    """

    version: str
    outputs: tuple[str, ...]
    importances: tuple[str, ...]
    granularities: tuple[str, ...]
    scopes: tuple[str, ...]
    amounts: tuple[str, ...]
    allocations: tuple[str, ...]
    max_model_bytes: int
    solvers: tuple[str, ...]
    device: str
    versions: Mapping[str, str]


def decode_server_info(message: pb.GetServerInfoResponse) -> ServerInfo:
    """Decodes a server's answer."""
    return decoded(
        ServerInfo,
        message,
        outputs=_plain("OUTPUT_", message.outputs),
        granularities=_plain("GRANULARITY_", message.granularities),
        scopes=_plain("SCOPE_", message.scopes),
        allocations=_plain("ALLOCATION_", message.allocations),
        versions=dict(message.versions),
    )


def _plain(prefix: str, names: Iterable[str]) -> tuple[str, ...]:
    """The plain names of enum values, which may be newer than this client."""
    return tuple(name.removeprefix(prefix).lower() for name in names)
