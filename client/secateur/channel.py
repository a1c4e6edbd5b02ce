"""The connection to a server, and the rpcs on it."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from secateur.diagnosis import Target
from secateur.errors import SecateurError
from secateur.paths import source_path
from secateur_proto import checkpoint_pb2, checkpoints_pb2, pruner_pb2
from secateur_proto.codec import SINGLE, Decoder, encode

# grpc makes a call again that could not begin, or was lost before anything of it was answered.
# Not among them are Delete, which would find nothing where it was served before, and what is
# answered by a stream: with a policy, grpc 1.85 has been seen to leave its callers waiting for ever
# when the server was killed. secateur.patience makes these again.
_AGAIN = {
    "secateur.v1.Pruner": ("Report", "Plan", "GetServerInfo"),
    "secateur.v1.Checkpoints": ("QueryUpload", "Get", "List"),
}
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [
                {"service": service, "method": method}
                for service, methods in _AGAIN.items()
                for method in methods
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
    # A server that is gone without a word, as behind a firewall that forgot the connection, is
    # noticed after these two, in milliseconds.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),  # the longer of the two counts; by default 60 s
    # A server that starts again is found soon.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
)


@dataclass(frozen=True)
class TlsFiles:
    """PEM files to speak TLS with; without `ca`, the authorities that gRPC trusts by default."""

    ca: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = None
    cert: str | os.PathLike[str] | None = None


Tls = bool | str | os.PathLike[str] | grpc.ChannelCredentials | TlsFiles | None


def open_channel(target: Target, credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
    """A channel, over TLS where there are credentials."""
    if credentials is None:
        return grpc.insecure_channel(target.address.text, _OPTIONS)
    return grpc.secure_channel(target.address.text, credentials, _OPTIONS)


def read_tls(tls: Any) -> grpc.ChannelCredentials | None:
    """What TLS is spoken with; None for plaintext.

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
        raise SecateurError("a certificate and its private key go together")
    paths = (tls.ca, tls.key, tls.cert)
    return grpc.ssl_channel_credentials(*(None if path is None else _read(path) for path in paths))


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        found = source_path(path, SecateurError).read_bytes()
    except OSError as error:
        raise SecateurError(f"{path}: {error.strerror}") from None
    if b"-----BEGIN " not in found:  # gRPC would not say which file it is
        raise SecateurError(f"{path}: is not a PEM file, which has a line -----BEGIN ...-----")
    return found


class Rpcs:
    """The rpcs of a channel, each called with a request, or an iterator of them."""

    def __init__(self, channel: grpc.Channel, metadata: tuple[tuple[str, str], ...]) -> None:
        of_pruner = f"/{pruner_pb2.DESCRIPTOR.services_by_name['Pruner'].full_name}/"
        of_store = f"/{checkpoints_pb2.DESCRIPTOR.services_by_name['Checkpoints'].full_name}/"

        def rpc(make: Callable[..., Any], name: str, decode: Callable[[bytes], Any]) -> Any:
            return _WithMetadata(make(name, encode, decode), metadata)

        bidi, up = channel.stream_stream, channel.stream_unary
        unary, down = channel.unary_unary, channel.unary_stream
        pruned = Decoder(pruner_pb2.PruneResponse.FromString)
        finalized = Decoder(pruner_pb2.FinalizeResponse.FromString)
        downloaded = Decoder(checkpoints_pb2.DownloadResponse.FromString)
        queried = checkpoints_pb2.QueryUploadResponse.FromString
        self.prune = rpc(bidi, of_pruner + "Prune", pruned)
        self.prune_small = _WithMetadata(
            unary(of_pruner + "Prune", encode, pruned), (*metadata, SINGLE)
        )
        self.report = rpc(up, of_pruner + "Report", pruner_pb2.ReportResponse.FromString)
        self.plan = rpc(up, of_pruner + "Plan", pruner_pb2.PlanResponse.FromString)
        self.finalize = rpc(bidi, of_pruner + "Finalize", finalized)
        self.server_info = rpc(
            unary, of_pruner + "GetServerInfo", pruner_pb2.GetServerInfoResponse.FromString
        )
        self.upload = rpc(up, of_store + "Upload", checkpoint_pb2.Checkpoint.FromString)
        self.query_upload = rpc(unary, of_store + "QueryUpload", queried)
        self.download = rpc(down, of_store + "Download", downloaded)
        self.get = rpc(unary, of_store + "Get", checkpoint_pb2.Checkpoint.FromString)
        self.list = rpc(unary, of_store + "List", checkpoints_pb2.ListResponse.FromString)
        self.delete = rpc(unary, of_store + "Delete", bytes)


class _WithMetadata:
    """An rpc that sends the same metadata with every call."""

    def __init__(self, rpc: Any, metadata: tuple[tuple[str, str], ...]) -> None:
        self._rpc, self._metadata = rpc, metadata

    def __call__(self, request: Any, **options: Any) -> Any:
        with _closed_channels():
            return self._rpc(request, metadata=self._metadata, **options)

    def future(self, request: Any, **options: Any) -> Any:
        """The call, which goes on meanwhile."""
        with _closed_channels():
            return self._rpc.future(request, metadata=self._metadata, **options)


@contextmanager
def _closed_channels() -> Iterator[None]:
    """Turns the ValueError by which grpc refuses calls on a closed channel into our own error."""
    try:
        yield
    except ValueError as error:
        raise SecateurError(f"the client is closed: make a new one ({error})") from error
