"""The three RPCs: read, prune, write."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import grpc
import torch

from secateur_proto import pruner_pb2 as pb
from secateur_proto.codec import Data, Decoder, encode
from secateur_proto.report_pb2 import SparsityReport
from secateur_server.errors import InvalidRequest, ModelTooLarge
from secateur_server.messages.report import encode_report
from secateur_server.messages.spec import decode_spec
from secateur_server.messages.stream import open_request, responses
from secateur_server.model import Model, open_model, packed_masks, whole_model
from secateur_server.operate.metrics import Metrics
from secateur_server.pruning.catalog import resolve
from secateur_server.pruning.measure import fold
from secateur_server.pruning.prune import prune
from secateur_server.pruning.spec import Parameter, Rule
from secateur_server.wire.header import MIN_FILE_BYTES
from secateur_server.wire.reader import ByteStream
from secateur_server.wire.writer import StateDictWriter

# Models up to this are for one core each.
ONE_CORE_BYTES = 4 << 20


class Pruner:
    """The service secateur.v1.Pruner. It keeps nothing between calls."""

    def __init__(self, device: torch.device, max_model_bytes: int, metrics: Metrics) -> None:
        self._device = device
        self._max_model_bytes = max_model_bytes
        self._metrics = metrics
        self._lock = threading.Lock()

    def Prune(
        self, request_iterator: Iterator[pb.PruneRequest | Data], context: grpc.ServicerContext
    ) -> Iterator[pb.PruneResponse | Data]:
        """Decides masks, and answers with them or with what they are applied to."""
        first, data = open_request(request_iterator, self._metrics.received)
        header = first.header
        rules = decode_spec(header.spec)
        if header.output not in pb.Output.values():
            raise InvalidRequest("header.output", f"{header.output} is no output")
        stream = self._stream(data, header.data_bytes)
        with self._metrics.holding(header.data_bytes):
            report, writer = self._prune(header.output, rules, stream)
            yield from responses(
                pb.PruneResponse,
                pb.PruneResult(report=report, data_bytes=writer.file_bytes if writer else 0),
                writer.chunks() if writer else iter(()),
                self._metrics.sent,
            )

    def _prune(
        self, output: int, rules: Sequence[Rule], stream: ByteStream
    ) -> tuple[SparsityReport, StateDictWriter | None]:
        """What to answer. Weights that are no part of it are given back before it is sent."""
        model = open_model(stream, {name for rule in rules for name in rule.extras()})
        rules = resolve(rules, model.catalog)
        model.read(stream, self._device)
        with self._turn(stream):
            pruned, outcomes = prune(model.parameters, rules, model.extras)
            writer = _prune_output(output, model, pruned)
            digest = writer.digest() if writer else ""
            report = encode_report(pruned.items(), stream.digest(), digest, outcomes)
        self._metrics.pruned(model.parameters, report)
        return report, writer

    def Report(
        self, request_iterator: Iterator[pb.ReportRequest | Data], context: grpc.ServicerContext
    ) -> pb.ReportResponse:
        """Measures a model."""
        first, data = open_request(request_iterator, self._metrics.received)
        header = first.header
        stream = self._stream(data, header.data_bytes)
        with self._metrics.holding(header.data_bytes):
            model = open_model(stream)
            names = model.named("header.tensors", header.tensors)
            model.read(stream, self._device)
            covered = ((name, model.parameters[name]) for name in names)
            with self._turn(stream):
                return pb.ReportResponse(report=encode_report(covered, stream.digest()))

    def Finalize(
        self, request_iterator: Iterator[pb.FinalizeRequest | Data], context: grpc.ServicerContext
    ) -> Iterator[pb.FinalizeResponse | Data]:
        """Folds masks into their weights."""
        first, data = open_request(request_iterator, self._metrics.received)
        header = first.header
        stream = self._stream(data, header.data_bytes)
        with self._metrics.holding(header.data_bytes):
            model = open_model(stream)
            names = model.named("header.tensors", header.tensors)
            model.read(stream, self._device)
            with self._turn(stream):
                for name in names:
                    fold(model.parameters[name])
                tensors = whole_model(model, model.parameters, names)
                writer = StateDictWriter(tensors, model.metadata)
                folded = ((name, Parameter(model.parameters[name].weight)) for name in names)
                report = encode_report(folded, stream.digest(), writer.digest())
            yield from responses(
                pb.FinalizeResponse,
                pb.FinalizeResult(report=report, data_bytes=writer.file_bytes),
                writer.chunks(),
                self._metrics.sent,
            )

    def _turn(self, stream: ByteStream) -> AbstractContextManager[object]:
        """Waits until no other large model is worked on: one is enough for all cores.

        Several at once would each take longer, in colder caches, and fewer would be done.
        """
        return self._lock if stream.announced > ONE_CORE_BYTES else nullcontext()

    def _stream(self, data: Iterator[bytes | memoryview], file_bytes: int) -> ByteStream:
        if file_bytes < MIN_FILE_BYTES:
            raise InvalidRequest(
                "header.data_bytes", f"{file_bytes} is less than the {MIN_FILE_BYTES} of any file"
            )
        if file_bytes > self._max_model_bytes:
            raise ModelTooLarge(
                "header.data_bytes",
                f"{file_bytes} bytes; this server takes up to {self._max_model_bytes}",
            )
        return ByteStream(data, file_bytes)


def _prune_output(
    output: int, model: Model, pruned: dict[str, Parameter]
) -> StateDictWriter | None:
    if output == pb.OUTPUT_NONE:
        return None
    if output in (pb.OUTPUT_UNSPECIFIED, pb.OUTPUT_MASKS):
        return StateDictWriter(packed_masks(pruned), {})
    parameters = {**model.parameters, **pruned}
    if output == pb.OUTPUT_REPARAMETRIZED:
        return StateDictWriter(whole_model(model, parameters, ()), model.metadata)
    for parameter in parameters.values():
        fold(parameter)
    return StateDictWriter(whole_model(model, parameters, parameters.keys()), model.metadata)


def add_pruner(pruner: Pruner, server: grpc.Server) -> str:
    """Adds the service to a server, with the codec that copies no data.  Returns: its name."""
    name = pb.DESCRIPTOR.services_by_name["Pruner"].full_name
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Prune": grpc.stream_stream_rpc_method_handler(
            pruner.Prune, Decoder(pb.PruneRequest.FromString), encode
        ),
        "Report": grpc.stream_unary_rpc_method_handler(
            pruner.Report, Decoder(pb.ReportRequest.FromString), encode
        ),
        "Finalize": grpc.stream_stream_rpc_method_handler(
            pruner.Finalize, Decoder(pb.FinalizeRequest.FromString), encode
        ),
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(name, handlers)])
    return name
