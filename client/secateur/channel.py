"""gRPC channels: their options, TLS, and the rpcs on them."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import grpc
from google.protobuf.message_factory import GetMessageClass

from secateur.diagnosis import Target
from secateur.errors import SecateurError
from secateur.paths import source_path
from secateur_proto import checkpoints_pb2, pruner_pb2
from secateur_proto.codec import SINGLE, Decoder, encode

_SERVICES = (
    pruner_pb2.DESCRIPTOR.services_by_name["Pruner"],
    checkpoints_pb2.DESCRIPTOR.services_by_name["Checkpoints"],
)

# gRPC itself repeats calls that could not begin, or were lost before any answer. The others are
# repeated by secateur.calls: those that change something on the server, since a second Delete
# finds nothing, and calls with streams as answers, since with a retry policy gRPC 1.85 sometimes
# waits for ever after the server was killed.
_CHANGING = {"Upload", "Delete"}
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [
                {"service": service.full_name, "method": method.name}
                for service in _SERVICES
                for method in service.methods
                if not method.server_streaming and method.name not in _CHANGING
            ],
            "retryPolicy": {
                "maxAttempts": 3,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}
_OPTIONS = (
    # Chunks are 1 MiB; a report grows with the number of tensors.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # Detect a lost connection, as behind a firewall that forgot it, after the sum of these two.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),  # the longer of the two counts; by default 60 s
    # Find a server soon after its restart.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
)


Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class TlsFiles:
    """PEM files for TLS.

    Attributes:
        ca: Authorities to trust; None is those that gRPC trusts by default.
        key: The client's private key.
        cert: The client's certificate.
    """

    ca: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = None
    cert: str | os.PathLike[str] | None = None


Tls = bool | str | os.PathLike[str] | grpc.ChannelCredentials | TlsFiles | None


def open_channel(kind: Any, target: Target, credentials: grpc.ChannelCredentials | None) -> Any:
    """Opens a channel of `grpc` or `grpc.aio`, over TLS if credentials are given."""
    if credentials is None:
        return kind.insecure_channel(target.address.text, _OPTIONS)
    return kind.secure_channel(target.address.text, credentials, _OPTIONS)


def read_tls(tls: Any) -> grpc.ChannelCredentials | None:
    """Returns the credentials for TLS; None for plaintext.

    Raises:
        SecateurError: A file cannot be read, or `tls` is not a Tls.
    """
    if tls is None or tls is False:
        return None
    if isinstance(tls, grpc.ChannelCredentials):
        return tls
    if isinstance(tls, str | os.PathLike):
        tls = TlsFiles(tls)
    elif tls is True:
        tls = TlsFiles()
    if not isinstance(tls, TlsFiles):
        raise SecateurError(f"tls={tls!r} is not a bool, a path or credentials of grpc's")
    if (tls.key is None) != (tls.cert is None):
        raise SecateurError("a certificate needs its private key, and a key its certificate")
    paths = (tls.ca, tls.key, tls.cert)
    return grpc.ssl_channel_credentials(*(None if path is None else _read(path) for path in paths))


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        found = source_path(path, SecateurError).read_bytes()
    except OSError as error:
        raise SecateurError(f"{path}: {error.strerror}") from None
    if b"-----BEGIN " not in found:  # gRPC would not name the file
        raise SecateurError(f"{path}: is not a PEM file, which has a line -----BEGIN ...-----")
    return found


class Rpc(NamedTuple):
    """An rpc of a channel.

    Attributes:
        start: gRPC's callable: starts a call with a request, or an iterator of requests.
        metadata: Sent with every call.
        request: Makes its request of a header and data.
        is_streamed: Whether it takes a stream of requests.
    """

    start: Any
    metadata: Metadata
    request: Callable[..., Any]
    is_streamed: bool


class Rpcs:
    """The rpcs of a channel by their names in the services, such as "Prune".

    Attributes:
        prune_small: Prune with one message each way; gRPC is faster if it knows that.
    """

    def __init__(self, channel: Any, metadata: Metadata) -> None:
        methods = {m.name: m for service in _SERVICES for m in service.methods}
        self._rpcs = {name: _rpc(channel, method, metadata) for name, method in methods.items()}
        single = (*metadata, SINGLE)
        self.prune_small = _rpc(channel, methods["Prune"], single, has_streams=False)

    def __getitem__(self, name: str) -> Rpc:
        return self._rpcs[name]


def _rpc(
    channel: Any,
    method: Any,
    metadata: Metadata,
    has_streams: bool = True,
) -> Rpc:
    """The rpc of a method's descriptor."""
    kinds = {
        (True, True): channel.stream_stream,
        (True, False): channel.stream_unary,
        (False, True): channel.unary_stream,
        (False, False): channel.unary_unary,
    }
    is_streamed = method.client_streaming and has_streams
    make = kinds[is_streamed, method.server_streaming and has_streams]
    decode: Any = GetMessageClass(method.output_type).FromString
    if method.server_streaming:  # only streams have messages with data alone
        decode = Decoder(decode)
    start = make(f"/{method.containing_service.full_name}/{method.name}", encode, decode)
    return Rpc(start, metadata, GetMessageClass(method.input_type), is_streamed)


def closed(error: Exception) -> SecateurError:
    """Returns the error of a call on a closed channel, in place of gRPC's."""
    return SecateurError(f"the client is closed: make a new one ({error})")
