"""The service that prunes: read, prune, write."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import wait
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, TypeVar

from secateur_proto import pruner_pb2 as pb
from secateur_proto.codec import Data
from secateur_proto.plan_pb2 import PruningPlan
from secateur_server.api.convert.checkpoint import (
    checkpoint_message,
    file_message,
    progress_message,
)
from secateur_server.api.convert.columns import field_head
from secateur_server.api.convert.plan import decode_amounts, encode_plan
from secateur_server.api.convert.report import encode_report
from secateur_server.api.convert.server_info import encode_server_info
from secateur_server.api.stream import open_request, responses
from secateur_server.backends.cores import one_thread
from secateur_server.backends.threads import Pool
from secateur_server.cut.plan import plan
from secateur_server.cut.plan_small import is_planned_by_runs
from secateur_server.cut.prior import prune_zeros
from secateur_server.cut.prune import prune
from secateur_server.errors import CheckpointNotFound, InvalidRequest
from secateur_server.outputs import OUTPUTS
from secateur_server.outputs.dense import folded_files
from secateur_server.outputs.hollow import hollow_state_dict
from secateur_server.report.tensors import measure_tensors
from secateur_server.report.warnings import changes_of, warnings_of
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.amounts import Amount
from secateur_server.spec.decode import decode_spec
from secateur_server.spec.resolve import resolve
from secateur_server.spec.rules import Rule, Selection
from secateur_server.state_dict.parameter import Parameter
from secateur_server.state_dict.sources import Incoming, Sources
from secateur_server.state_dict.state_dict import StateDict, masks_of, packed_masks
from secateur_server.storage.receiver import Receiver
from secateur_server.wire.writer import Bytes, OutgoingFile, chunks

# Seconds between messages of progress, and until a cancelled call is noticed.
PROGRESS_SECONDS = 0.2

# Bytes of a plan for each amount: for a character of a name, and for a tensor. The answer is in
# memory in parts and as a whole, and has each name and number twice, for the tensor and for its
# choice. A plan without arrays has a Python object for each number.
NAME_BYTES, ARRAY_BYTES, OBJECT_BYTES = 4, 250, 700

Done = TypeVar("Done")
Files = list[OutgoingFile]


class Pruner:
    """The service secateur.v1.Pruner."""

    def __init__(self, sources: Sources, calls: int) -> None:
        """Starts the workers of up to `calls` concurrent calls."""
        self._sources = sources
        # One worker for each call that reports progress. With fewer, a call could wait for a worker
        # where the scheduler does not see it, behind calls that wait for memory.
        self._workers = Pool(calls, "work", one_thread)

    def close(self) -> None:
        """Ends the workers, when no more calls come."""
        self._workers.shutdown(wait=False)

    def Prune(
        self, messages: Iterator[pb.PruneRequest | Data], context: RequestContext
    ) -> Iterator[pb.PruneResponse | Data]:
        """Prunes, and returns masks or pruned tensors."""
        first, data = open_request(messages, self._count_received(context))
        header = first.header
        rules = decode_spec(context, header.spec)
        if header.output not in OUTPUTS:
            raise InvalidRequest("header.output", f"{header.output} is not an output")
        if header.destination_uri and header.output == pb.OUTPUT_NONE:
            raise InvalidRequest("header.destination_uri", "OUTPUT_NONE writes nothing there")
        _check_prior(header)
        with ExitStack() as held:
            work = partial(self._prune, context, header, rules, data, held)
            result, files = yield from self._run(context, work, header, pb.PruneResponse)
            yield from self._answer(context, pb.PruneResponse, result, files)

    def prune_single(
        self, message: pb.PruneRequest | Data, context: RequestContext
    ) -> pb.PruneResponse:
        """Does Prune with one message each way, for which gRPC is faster.

        Args:
            message: With all data.
            context: The request.

        Returns:
            The result and all data.

        Raises:
            InvalidRequest: The header names a source, so the answer may be large.
        """
        if isinstance(message, pb.PruneRequest) and message.header.WhichOneof("source"):
            raise InvalidRequest("header", "names a source, so that its answer must be a stream")
        answer = self.Prune(iter([message]), context)
        first, *others = (part for part in answer if not part.HasField("progress"))
        assert isinstance(first, pb.PruneResponse), "the first message has the result"
        size = sum(len(part.data) for part in others)
        context.charge("header.output", 2 * size, "an answer of one message")
        first.data = b"".join([first.data, *(part.data for part in others)])
        return first

    def _prune(
        self,
        context: RequestContext,
        header: pb.PruneHeader,
        asked: Sequence[Rule],
        data: Iterator[Bytes],
        held: ExitStack,
    ) -> tuple[pb.PruneResult, Files]:
        """Makes the result. Weights that are not part of it are freed before it is sent."""
        receiver = held.enter_context(self._sources.receiver(context)) if header.keep else None
        extras = {name for rule in asked for name in rule.extras()}
        incoming = self._sources.open(context, header, data, extras, held, receiver)
        state_dict = incoming.state_dict
        rules = resolve(context, asked, state_dict.catalog)
        output = OUTPUTS[header.output]
        needed = (
            None if output.needs_all_tensors else {name for rule in rules for name in rule.reads()}
        )
        with context.stage("receive"):
            incoming.read(needed)
        with self._cores(context, incoming):
            context.begin("prune")
            before = _before(context, header, state_dict, rules)
            pruned, outcomes = prune(context, before, rules, state_dict.extras)
            with context.stage("encode"):
                files = output.files(context, state_dict, pruned)
                digest = files[0].blake3 if len(files) == 1 else ""
                measured = measure_tensors(context, pruned)
                report = encode_report(
                    context, measured, state_dict.catalog, incoming.digest(), digest, outcomes
                )
                changes = changes_of(context, report, state_dict.catalog, before)
                report.warnings.extend(
                    warnings_of(context, report, asked, rules, state_dict.catalog, changes)
                )
        result = pb.PruneResult()
        result.report.CopyFrom(report)  # which takes less time than to construct it with a report
        incoming.check_unchanged()
        with self._kept(context, receiver, incoming, pruned, result) if receiver else nullcontext():
            written = self._written(context, header.destination_uri, result, files, incoming)
        self._sources.metrics.reported(context, report)
        count = sum(change.pruned for change in changes)
        self._sources.metrics.pruned(context, count, report.sparsity)
        return written

    @contextmanager
    def _kept(
        self,
        context: RequestContext,
        receiver: Receiver,
        incoming: Incoming,
        pruned: Mapping[str, Parameter],
        result: pb.PruneResult,
    ) -> Iterator[None]:
        """Stores the pruned tensors. Deletes them if the body fails, as no caller has the name."""
        masks = receiver.receive_file(
            packed_masks(context, {**incoming.state_dict.masks, **masks_of(pruned)})
        )
        record, store = receiver.create(incoming.files, masks), self._sources.store
        owner = context.tenant.owner
        try:
            expire_time = store.expire_time(owner, record)
            result.checkpoint.CopyFrom(checkpoint_message(record, expire_time))
            yield
        except BaseException:
            with suppress(CheckpointNotFound):  # it may have been removed for another one
                store.delete(owner, record.name)
            raise

    def Report(
        self, messages: Iterator[pb.ReportRequest | Data], context: RequestContext
    ) -> pb.ReportResponse:
        """Measures tensors."""
        first, data = open_request(messages, self._count_received(context))
        header = first.header
        with ExitStack() as held:
            incoming = self._sources.open(context, header, data, (), held)
            names = incoming.state_dict.named(context, "header.tensors", header.tensors)
            with context.stage("receive"):
                incoming.read(names)
            covered = {name: incoming.state_dict.parameters[name] for name in names}
            with self._cores(context, incoming), context.stage("encode"):
                measured = measure_tensors(context, covered)
                report = encode_report(
                    context, measured, incoming.state_dict.catalog, incoming.digest()
                )
            incoming.check_unchanged()
            self._sources.metrics.reported(context, report)
            return pb.ReportResponse(report=report)

    def Plan(self, messages: Iterator[pb.PlanRequest | Data], context: RequestContext) -> bytes:
        """Predicts a Prune for many amounts. Returns a PlanResponse, encoded."""
        first, data = open_request(messages, self._count_received(context))
        header = first.header
        rules = decode_spec(context, header.spec)
        _check_prior(header)
        extras = {name for rule in rules for name in rule.extras()}
        with ExitStack() as held:
            incoming = self._sources.open(context, header, data, extras, held)
            state_dict = incoming.state_dict
            rules = resolve(context, rules, state_dict.catalog)
            planned, amounts = decode_amounts(context, header, rules)
            _charge_plan(context, planned, amounts)
            with context.stage("receive"):
                incoming.read({name for rule in rules for name in rule.reads()})
            with self._cores(context, incoming):
                before = _before(context, header, state_dict, rules)
                state = {**before, **prune(context, before, rules[:-1], state_dict.extras)[0]}
                at = "header.amounts" if header.amounts else ""
                outcomes = plan(context, planned, amounts, state, state_dict.extras, at)
            named = {name for rule in rules for name in rule.names()}
            pruned = [name for name in state if name in named]
            hollow = hollow_state_dict(state_dict, pruned)
            rest = PruningPlan(
                masks_bytes=OUTPUTS[pb.OUTPUT_MASKS].size(hollow, pruned),
                reparametrized_bytes=OUTPUTS[pb.OUTPUT_REPARAMETRIZED].size(hollow, pruned),
                dense_bytes=OUTPUTS[pb.OUTPUT_DENSE].size(hollow, pruned),
                input_blake3=incoming.digest(),
            )
            amounts_bytes = encode_plan(
                context,
                outcomes,
                planned.tensors,
                [state[name].weight for name in planned.tensors],
                [state[name].count_pruned(context) for name in context.each(planned.tensors)],
            )
            parts = [*amounts_bytes, rest.SerializeToString()]
            incoming.check_unchanged()
            return b"".join([field_head(1, sum(map(len, parts))), *parts])

    def Finalize(
        self, messages: Iterator[pb.FinalizeRequest | Data], context: RequestContext
    ) -> Iterator[pb.FinalizeResponse | Data]:
        """Applies masks to their weights."""
        first, data = open_request(messages, self._count_received(context))
        header = first.header
        with ExitStack() as held:
            work = partial(self._finalize, context, header, data, held)
            result, files = yield from self._run(context, work, header, pb.FinalizeResponse)
            yield from self._answer(context, pb.FinalizeResponse, result, files)

    def GetServerInfo(
        self, message: pb.GetServerInfoRequest, context: RequestContext
    ) -> pb.GetServerInfoResponse:
        """Says what this server can do."""
        most = min(self._sources.max_model_bytes, self._sources.scheduler.models.limit)
        return encode_server_info(most)

    def _finalize(
        self,
        context: RequestContext,
        header: pb.FinalizeHeader,
        data: Iterator[Bytes],
        held: ExitStack,
    ) -> tuple[pb.FinalizeResult, Files]:
        incoming = self._sources.open(context, header, data, (), held)
        state_dict = incoming.state_dict
        names = state_dict.named(context, "header.tensors", header.tensors)
        with context.stage("receive"):
            incoming.read(None)
        with self._cores(context, incoming), context.stage("encode"):
            context.begin("prune")
            folded = (
                names if header.tensors else list(state_dict.parameters)
            )  # pairs of integers too
            files = folded_files(
                context, state_dict, {name: state_dict.parameters[name] for name in folded}
            )
            digest = files[0].blake3 if len(files) == 1 else ""
            covered = {name: state_dict.parameters[name] for name in names}
            measured = measure_tensors(context, covered)
            report = encode_report(
                context, measured, state_dict.catalog, incoming.digest(), digest, are_folded=True
            )
        incoming.check_unchanged()
        self._sources.metrics.reported(context, report)
        result = pb.FinalizeResult(report=report)
        return self._written(context, header.destination_uri, result, files, incoming)

    def _run(
        self,
        context: RequestContext,
        work: Callable[[], Done],
        header: pb.PruneHeader | pb.FinalizeHeader,
        make: Callable[..., Any],
    ) -> Generator[Any, None, Done]:
        """Returns what `work` returns. Yields progress, unless the data comes with the call."""
        if not header.WhichOneof("source"):
            return work()
        future = self._workers.submit(work)
        try:
            while not wait([future], PROGRESS_SECONDS).done:
                yield make(progress=progress_message(context))
        finally:
            if not future.cancel():  # if a worker has begun it
                if not future.done():
                    context.cancel()
                wait([future])
        try:
            return future.result()
        finally:
            del future  # its error refers to this frame: the cycle would keep the tensors

    def _written(
        self,
        context: RequestContext,
        uri: str,
        result: Any,
        files: Files,
        incoming: Incoming,
    ) -> tuple[Any, Files]:
        """Writes the files to a URI. Returns the result, and the files that remain to be sent."""
        result.files.extend(map(file_message, files))
        if not uri:
            result.data_bytes = sum(file.size for file in files)
            return result, files
        context.begin("write", sum(file.size for file in files))
        check = incoming.check_unchanged  # dense files are read again while they are written
        self._sources.write(context, uri, files, check)
        return result, []

    def _answer(
        self, context: RequestContext, make: Callable[..., Any], result: Any, files: Files
    ) -> Iterator[Any]:
        count = partial(self._sources.metrics.sent, context)
        return responses(make, result, chunks(context, files), count)

    def _count_received(self, context: RequestContext) -> Callable[[int], None]:
        return partial(self._sources.metrics.received, context)

    def _cores(self, context: RequestContext, incoming: Incoming) -> AbstractContextManager[None]:
        return self._sources.scheduler.cores(context, incoming.size)


def _check_prior(header: pb.PruneHeader | pb.PlanHeader) -> None:
    """Raises InvalidRequest for an unknown value."""
    if header.prior not in pb.Prior.values():
        raise InvalidRequest("header.prior", f"{header.prior} is not a value of Prior")


def _before(
    context: RequestContext,
    header: pb.PruneHeader | pb.PlanHeader,
    state_dict: StateDict,
    rules: Sequence[Rule],
) -> dict[str, Parameter]:
    """The parameters before the first of the resolved rules."""
    parameters = dict(state_dict.parameters)
    return prune_zeros(context, parameters, rules) if header.prior == pb.PRIOR_ZEROS else parameters


def _charge_plan(context: RequestContext, rule: Selection, amounts: Sequence[Amount]) -> None:
    """Reserves the memory of a plan of a resolved rule.  Raises RequestTooLarge, QueueFull."""
    names = rule.names()
    of_tensor = ARRAY_BYTES if is_planned_by_runs(rule, amounts) else OBJECT_BYTES
    parts = len(names) + len(rule.groups)
    size = len(amounts) * (NAME_BYTES * sum(map(len, names)) + of_tensor * parts)
    what = f"a plan of {len(amounts)} amounts of {len(names)} tensors"
    context.charge("header.amounts", size, what)
