"""The RPCs: read, prune, write."""

import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import wait
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from contextvars import copy_context
from functools import partial
from typing import Any, TypeVar

import grpc

from secateur_proto import pruner_pb2 as pb
from secateur_proto.codec import SINGLE, Data, Decoder, encode
from secateur_server.devices.cpu import one_thread
from secateur_server.devices.threads import started_pool
from secateur_server.devices.watch import watch
from secateur_server.errors import CheckpointNotFound, InvalidRequest
from secateur_server.forms import form_bytes
from secateur_server.landing import Landing
from secateur_server.messages.checkpoint import checkpoint_message, file_message, progress_message
from secateur_server.messages.plan import decode_amounts, encode_plan
from secateur_server.messages.report import encode_report
from secateur_server.messages.server_info import encode_server_info
from secateur_server.messages.spec import decode_spec
from secateur_server.messages.stream import Bytes, open_request, responses
from secateur_server.messages.warnings import warnings_of
from secateur_server.model import Model, masks_of, packed_masks
from secateur_server.operate.calls import this_call
from secateur_server.pruning.measure import fold
from secateur_server.pruning.plan import plan
from secateur_server.pruning.prior import prune_zeros
from secateur_server.pruning.prune import prune
from secateur_server.pruning.resolve import resolve
from secateur_server.pruning.spec import Parameter, Rule
from secateur_server.sources import ONE_CORE_BYTES, Incoming, Sources
from secateur_server.wire.writer import OutgoingFile, chunks

# How often a caller hears how far its call is, and how soon it is seen that it has left.
PROGRESS_SECONDS = 0.2

Done = TypeVar("Done")
Files = list[OutgoingFile]


class Pruner:
    """The service secateur.v1.Pruner."""

    def __init__(self, sources: Sources, calls: int) -> None:
        """calls: at once."""
        self._sources = sources
        self._lock = threading.Lock()
        self._waiting: list[threading.Event] = []  # the first one has its turn
        # For calls that tell how far they are: one for each, or they would wait for a worker where
        # nobody sees them, behind those of others that wait for memory.
        self._workers = started_pool(calls, "work", one_thread)

    def close(self) -> None:
        """No calls come any more."""
        self._workers.shutdown(wait=False)

    def Prune(
        self, request_iterator: Iterator[pb.PruneRequest | Data], context: grpc.ServicerContext
    ) -> Iterator[pb.PruneResponse | Data]:
        """Decides masks, and answers with them or with what they are applied to."""
        first, data = open_request(request_iterator, self._sources.metrics.received)
        header = first.header
        rules = decode_spec(watch(), header.spec)
        if header.output not in pb.Output.values():
            raise InvalidRequest("header.output", f"{header.output} is no output")
        if header.destination_uri and header.output == pb.OUTPUT_NONE:
            raise InvalidRequest("header.destination_uri", "OUTPUT_NONE writes nothing there")
        _check_prior(header)
        with ExitStack() as held:
            work = partial(self._prune, header, rules, data, held)
            result, files = yield from self._run(work, header, pb.PruneResponse)
            yield from self._answer(pb.PruneResponse, result, files)

    def prune_single(
        self, request: pb.PruneRequest | Data, context: grpc.ServicerContext
    ) -> pb.PruneResponse:
        """As Prune, of one message each way: grpc is faster where it knows that."""
        answer = self.Prune(iter([request]), context)
        first, *others = (message for message in answer if not message.HasField("progress"))
        assert isinstance(first, pb.PruneResponse), "the first message has the result"
        first.data = b"".join([first.data, *(message.data for message in others)])
        return first

    def _prune(
        self,
        header: pb.PruneHeader,
        asked: Sequence[Rule],
        data: Iterator[Bytes],
        held: ExitStack,
    ) -> tuple[pb.PruneResult, Files]:
        """What to answer. Weights that are no part of it are given back before it is sent."""
        owner = this_call().tenant.owner
        landing = held.enter_context(self._sources.landing()) if header.keep else None
        extras = {name for rule in asked for name in rule.extras()}
        incoming = self._sources.open(header, data, extras, held, landing)
        model = incoming.model
        rules = resolve(watch(), asked, model.catalog)
        is_whole = header.output in (pb.OUTPUT_DENSE, pb.OUTPUT_REPARAMETRIZED)
        read_whole = None if is_whole else {name for rule in rules for name in rule.reads()}
        with watch().stage("receive"):
            incoming.read(read_whole)
        with self._turn(incoming):
            watch().begin("prune")
            before = _before(header, model, rules)
            pruned, outcomes = prune(watch(), before, rules, model.extras)
            with watch().stage("encode"):
                files = _prune_output(header.output, model, pruned)
                digest = files[0].blake3 if len(files) == 1 else ""
                report = encode_report(
                    watch(), pruned.items(), model.catalog, incoming.digest(), digest, outcomes
                )
                report.warnings.extend(
                    warnings_of(watch(), report, asked, rules, model.catalog, before)
                )
        result = pb.PruneResult(report=report)
        incoming.check_unchanged()
        with self._kept(landing, incoming, pruned, owner, result) if landing else nullcontext():
            written = self._written(header.destination_uri, result, files, incoming)
        self._sources.metrics.reported(report)
        self._sources.metrics.pruned(before, report)
        return written

    @contextmanager
    def _kept(
        self,
        landing: Landing,
        incoming: Incoming,
        pruned: Mapping[str, Parameter],
        owner: str,
        result: pb.PruneResult,
    ) -> Iterator[None]:
        """Keeps what was pruned; where the block fails it goes: nobody was told its name."""
        masks = landing.land_file(
            packed_masks(watch(), {**incoming.model.masks, **masks_of(pruned)})
        )
        record, store = landing.create(incoming.files, masks), self._sources.store
        try:
            expire_time = store.expire_time(owner, record)
            result.checkpoint.CopyFrom(checkpoint_message(record, expire_time))
            yield
        except BaseException:
            with suppress(CheckpointNotFound):  # it may have made room for another
                store.delete(owner, record.name)
            raise

    def Report(
        self, request_iterator: Iterator[pb.ReportRequest | Data], context: grpc.ServicerContext
    ) -> pb.ReportResponse:
        """Measures a model."""
        first, data = open_request(request_iterator, self._sources.metrics.received)
        header = first.header
        with ExitStack() as held:
            incoming = self._sources.open(header, data, (), held)
            names = incoming.model.named(watch(), "header.tensors", header.tensors)
            with watch().stage("receive"):
                incoming.read(names)
            covered = ((name, incoming.model.parameters[name]) for name in names)
            with self._turn(incoming), watch().stage("encode"):
                report = encode_report(watch(), covered, incoming.model.catalog, incoming.digest())
            incoming.check_unchanged()
            self._sources.metrics.reported(report)
            return pb.ReportResponse(report=report)

    def Plan(
        self, request_iterator: Iterator[pb.PlanRequest | Data], context: grpc.ServicerContext
    ) -> pb.PlanResponse:
        """Foretells what a Prune would do by many amounts."""
        first, data = open_request(request_iterator, self._sources.metrics.received)
        header = first.header
        rules = decode_spec(watch(), header.spec)
        _check_prior(header)
        extras = {name for rule in rules for name in rule.extras()}
        with ExitStack() as held:
            incoming = self._sources.open(header, data, extras, held)
            model = incoming.model
            rules = resolve(watch(), rules, model.catalog)
            planned, amounts = decode_amounts(header, rules)
            with watch().stage("receive"):
                incoming.read({name for rule in rules for name in rule.reads()})
            with self._turn(incoming):
                before = _before(header, model, rules)
                state = {**before, **prune(watch(), before, rules[:-1], model.extras)[0]}
                at = "header.amounts" if header.amounts else ""
                outcomes = plan(watch(), planned, amounts, state, model.extras, at)
            message = encode_plan(watch(), outcomes, state, planned.tensors)
            pruned = {name for rule in rules for name in rule.names()}
            sizes = form_bytes(model, [name for name in state if name in pruned])
            message.masks_bytes, message.dense_bytes = sizes.masks, sizes.dense
            message.reparametrized_bytes = sizes.reparametrized
            message.input_blake3 = incoming.digest()
            incoming.check_unchanged()
            return pb.PlanResponse(plan=message)

    def Finalize(
        self, request_iterator: Iterator[pb.FinalizeRequest | Data], context: grpc.ServicerContext
    ) -> Iterator[pb.FinalizeResponse | Data]:
        """Folds masks into their weights."""
        first, data = open_request(request_iterator, self._sources.metrics.received)
        header = first.header
        with ExitStack() as held:
            work = partial(self._finalize, header, data, held)
            result, files = yield from self._run(work, header, pb.FinalizeResponse)
            yield from self._answer(pb.FinalizeResponse, result, files)

    def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: grpc.ServicerContext
    ) -> pb.GetServerInfoResponse:
        """Says what this server can do."""
        most = min(self._sources.max_model_bytes, self._sources.admission.limit)
        return encode_server_info(most)

    def _finalize(
        self, header: pb.FinalizeHeader, data: Iterator[Bytes], held: ExitStack
    ) -> tuple[pb.FinalizeResult, Files]:
        incoming = self._sources.open(header, data, (), held)
        model = incoming.model
        names = model.named(watch(), "header.tensors", header.tensors)
        with watch().stage("receive"):
            incoming.read(None)
        with self._turn(incoming), watch().stage("encode"):
            watch().begin("prune")
            folded = names if header.tensors else list(model.parameters)  # pairs of integers too
            files = folded_files(model, {name: model.parameters[name] for name in folded})
            digest = files[0].blake3 if len(files) == 1 else ""
            covered = ((name, model.parameters[name]) for name in names)
            report = encode_report(
                watch(), covered, model.catalog, incoming.digest(), digest, are_folded=True
            )
        incoming.check_unchanged()
        self._sources.metrics.reported(report)
        result = pb.FinalizeResult(report=report)
        return self._written(header.destination_uri, result, files, incoming)

    def _run(
        self,
        work: Callable[[], Done],
        header: pb.PruneHeader | pb.FinalizeHeader,
        make: Callable[..., Any],
    ) -> Generator[Any, None, Done]:
        """What `work` returns; meanwhile tells how far it is, where no data comes with the call."""
        if not header.WhichOneof("source"):
            return work()
        of_call = watch()
        future = self._workers.submit(copy_context().run, work)
        try:
            while not wait([future], PROGRESS_SECONDS).done:
                yield make(progress=progress_message(of_call))
        finally:
            if not future.cancel():  # no worker has begun it: there is nothing to wait for
                if not future.done():
                    of_call.cancel()
                wait([future])
        try:
            return future.result()
        finally:
            del future  # its error has this frame: they would keep each other, and the model

    def _written(
        self, uri: str, result: Any, files: Files, incoming: Incoming
    ) -> tuple[Any, Files]:
        """The result and the files to answer with: none, where they went to a URI."""
        result.files.extend(map(file_message, files))
        if not uri:
            result.data_bytes = sum(file.size for file in files)
            return result, files
        watch().begin("write", sum(file.size for file in files))
        check = incoming.check_unchanged  # dense files are read once more as they are written
        self._sources.write(uri, files, check)
        return result, []

    def _answer(self, make: Callable[..., Any], result: Any, files: Files) -> Iterator[Any]:
        return responses(make, result, chunks(watch(), files), self._sources.metrics.sent)

    @contextmanager
    def _turn(self, incoming: Incoming) -> Iterator[None]:
        """Waits until no other large model is worked on: one is enough for all cores.

        Several at once would each take longer, in colder caches, and fewer would be done.
        """
        if incoming.size <= ONE_CORE_BYTES:
            yield
            return
        mine = threading.Event()
        with self._lock:
            self._waiting.append(mine)
            self._waiting[0].set()
        try:
            while not mine.wait(PROGRESS_SECONDS):
                watch().check()
            yield
        finally:
            with self._lock:
                self._waiting.remove(mine)
                if self._waiting:
                    self._waiting[0].set()


def _check_prior(header: pb.PruneHeader | pb.PlanHeader) -> None:
    """Errors: InvalidRequest."""
    if header.prior not in pb.Prior.values():
        raise InvalidRequest("header.prior", f"{header.prior} is not a value of Prior")


def _before(
    header: pb.PruneHeader | pb.PlanHeader, model: Model, rules: Sequence[Rule]
) -> dict[str, Parameter]:
    """The parameters before the first of `rules`, which are resolved."""
    parameters = dict(model.parameters)
    return prune_zeros(watch(), parameters, rules) if header.prior == pb.PRIOR_ZEROS else parameters


def _prune_output(output: int, model: Model, pruned: dict[str, Parameter]) -> Files:
    if output == pb.OUTPUT_NONE:
        return []
    if output in (pb.OUTPUT_UNSPECIFIED, pb.OUTPUT_MASKS):
        return [packed_masks(watch(), masks_of(pruned))]
    model.parameters |= pruned
    if output == pb.OUTPUT_REPARAMETRIZED:
        return model.files(watch(), ())
    return folded_files(model, model.parameters)


def folded_files(model: Model, parameters: dict[str, Parameter]) -> Files:
    """A model's files with the masks of some parameters applied for good."""
    if not model.is_mapped:
        for parameter in parameters.values():
            fold(watch(), parameter)
    return model.files(watch(), parameters)


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
        "Plan": grpc.stream_unary_rpc_method_handler(
            pruner.Plan, Decoder(pb.PlanRequest.FromString), encode
        ),
        "Finalize": grpc.stream_stream_rpc_method_handler(
            pruner.Finalize, Decoder(pb.FinalizeRequest.FromString), encode
        ),
        "GetServerInfo": grpc.unary_unary_rpc_method_handler(
            pruner.GetServerInfo, pb.GetServerInfoRequest.FromString, encode
        ),
    }
    single = grpc.unary_unary_rpc_method_handler(
        pruner.prune_single, Decoder(pb.PruneRequest.FromString), encode
    )
    server.add_generic_rpc_handlers([_Handlers(name, handlers, single)])
    return name


class _Handlers(grpc.GenericRpcHandler):
    """The methods of a service; `single` in place of Prune where a call says that it is one."""

    def __init__(self, service: str, handlers: Mapping[str, Any], single: Any) -> None:
        self._handlers = {f"/{service}/{name}": handler for name, handler in handlers.items()}
        self._prune, self._single = f"/{service}/Prune", single

    def service(self, handler_call_details: Any) -> Any:
        """As grpc.GenericRpcHandler.service."""
        method, metadata = handler_call_details.method, handler_call_details.invocation_metadata
        is_single = method == self._prune and SINGLE in (metadata or ())
        return self._single if is_single else self._handlers.get(method)
