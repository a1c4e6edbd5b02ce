"""The client: sends a model, and gives back what the server makes of it."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from secateur.errors import InvalidSpec, SecateurError
from secateur.progress import Progress, show_progress
from secateur.report import Report, decode_report
from secateur.result import FinalizeResult, PruneResult
from secateur.source import read_source
from secateur.spec import Spec, patterns
from secateur.tensors import LocalTensor
from secateur.transfer import Upload, errors_of, receive
from secateur_proto import pruner_pb2 as pb
from secateur_proto.codec import Decoder, encode
from secateur_proto.framing import CHUNK_BYTES

_OUTPUTS = {
    "masks": pb.OUTPUT_MASKS,
    "reparametrized": pb.OUTPUT_REPARAMETRIZED,
    "dense": pb.OUTPUT_DENSE,
    "none": pb.OUTPUT_NONE,
}
_METHOD = f"/{pb.DESCRIPTOR.services_by_name['Pruner'].full_name}/"
_OPTIONS = (
    # Chunks are 1 MiB; a report grows with the number of tensors.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
)

Tls = bool | str | os.PathLike[str] | grpc.ChannelCredentials | None
Patterns = str | Sequence[str] | None


class Client:
    """A connection to a server. Safe to use from several threads.

    address: HOST:PORT or unix:PATH.  token: sent with every call.
    tls: True, the path of a PEM file of authorities to trust, or credentials of grpc's.
    timeout: seconds for each call.  channel: to use instead of an address; it is left open.

    Every method raises SecateurError: see secateur.errors for the kinds.
    """

    def __init__(
        self,
        address: str | None = None,
        token: str | None = None,
        tls: Tls = None,
        timeout: float | None = None,
        channel: grpc.Channel | None = None,
    ) -> None:
        self._channel = channel or _open_channel(address, tls)
        self._is_owner = channel is None
        self._prune = self._channel.stream_stream(
            _METHOD + "Prune", encode, Decoder(pb.PruneResponse.FromString)
        )
        self._report = self._channel.stream_unary(
            _METHOD + "Report", encode, pb.ReportResponse.FromString
        )
        self._prune_small = self._channel.unary_unary(
            _METHOD + "Prune", encode, Decoder(pb.PruneResponse.FromString)
        )
        self._finalize = self._channel.stream_stream(
            _METHOD + "Finalize", encode, Decoder(pb.FinalizeResponse.FromString)
        )
        self._timeout = timeout
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()

    def prune(
        self, source: Any, spec: Spec, output: str = "masks", progress: Progress = None
    ) -> PruneResult:
        """Prunes a model by a spec.

        source: a torch.nn.Module, of which the parameters are sent; a mapping of tensors or
            arrays; or the path of a .safetensors, .pt or .pth file.
        output: what comes over the wire: "masks" (of one bit an element), "reparametrized",
            "dense", or "none" for the report alone.
        progress: None shows a bar on a terminal, True always, False never; a function is called
            with the bytes sent and their total.
        """
        if output not in _OUTPUTS:
            raise SecateurError(f"output={output!r} is none of {', '.join(_OUTPUTS)}")
        if not isinstance(spec, Spec):
            raise InvalidSpec(f"a spec is what secateur's methods make, not {type(spec).__name__}")
        model = read_source(source)
        sent = {n: t for n, t in model.tensors.items() if n in model.parameters}
        message, arrays = spec.encode(model.tensors)
        upload = Upload({**sent, **arrays}, model.metadata)
        header = pb.PruneHeader(data_bytes=upload.file_bytes, spec=message, output=_OUTPUTS[output])
        with show_progress(progress, upload.file_bytes) as sending:
            messages = upload.messages(pb.PruneRequest, header, sending)
            if upload.file_bytes <= CHUNK_BYTES and output in ("masks", "none"):
                # One message each way, by the protocol: grpc is faster where it knows that.
                with errors_of(upload):
                    answer = self._prune_small(next(messages), self._timeout, self._metadata)
                result, received = receive([answer])
            else:
                result, received = self._stream(self._prune, messages, upload)
        if output in ("dense", "reparametrized"):
            received |= {n: t for n, t in model.tensors.items() if n not in model.parameters}
        return PruneResult(decode_report(result.report), model, output, received)

    def report(self, source: Any, tensors: Patterns = None, progress: Progress = None) -> Report:
        """Measures how sparse a model is, and where.

        tensors: names and globs; None is every floating tensor.
        """
        model = read_source(source)
        upload = Upload(model.tensors, model.metadata)
        header = pb.ReportHeader(
            data_bytes=upload.file_bytes, tensors=[] if tensors is None else patterns(tensors)
        )
        with show_progress(progress, upload.file_bytes) as sending:
            messages = upload.messages(pb.ReportRequest, header, sending)
            call = self._report.future(messages, self._timeout, self._metadata)
            with errors_of(upload, call):
                return decode_report(call.result().report)

    def finalize(
        self, source: Any, tensors: Patterns = None, progress: Progress = None
    ) -> FinalizeResult:
        """Makes pruning permanent: each pair X_orig, X_mask becomes X.

        tensors: names and globs of what to fold; None is all.  As torch.nn.utils.prune.remove.
        """
        model = read_source(source)
        upload = Upload(model.tensors, model.metadata)
        header = pb.FinalizeHeader(
            data_bytes=upload.file_bytes, tensors=[] if tensors is None else patterns(tensors)
        )
        with show_progress(progress, upload.file_bytes) as sending:
            messages = upload.messages(pb.FinalizeRequest, header, sending)
            result, received = self._stream(self._finalize, messages, upload)
        return FinalizeResult(decode_report(result.report), model, received)

    def _stream(
        self, rpc: Any, messages: Iterator[Any], upload: Upload
    ) -> tuple[Any, dict[str, LocalTensor]]:
        call = rpc(messages, self._timeout, self._metadata)
        with errors_of(upload, call):
            return receive(call)

    def close(self) -> None:
        """Closes the connection."""
        if self._is_owner:
            self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()


def _open_channel(address: str | None, tls: Tls) -> grpc.Channel:
    if address is None:
        raise ValueError("give an address, or a channel")
    if tls is None or tls is False:
        return grpc.insecure_channel(address, _OPTIONS)
    if isinstance(tls, str | os.PathLike):
        tls = grpc.ssl_channel_credentials(Path(tls).read_bytes())
    elif tls is True:
        tls = grpc.ssl_channel_credentials()
    return grpc.secure_channel(address, tls, _OPTIONS)
