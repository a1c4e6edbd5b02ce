"""The methods of a client that measure models and change none."""

from collections.abc import Mapping, Sequence
from typing import Any

from secateur.amounts import encode_amounts
from secateur.calls.checkpoints import AsyncCheckpointCalls
from secateur.calls.connection import Call
from secateur.calls.patience import Patience
from secateur.calls.transfer import Upload
from secateur.checks import one_of, patterns
from secateur.choices import AnyGranularity, magnitude
from secateur.defaults import SOME_AMOUNTS, matrices
from secateur.details import details_of
from secateur.encoding import encode_spec, unmasked_members
from secateur.literals import Prior
from secateur.model import Source
from secateur.others import check_names
from secateur.plan import Plan, Sensitivity, sensitivity_of
from secateur.plan_decoding import decode_plan
from secateur.progress import Progress
from secateur.renaming import fitted_patterns
from secateur.report import Report
from secateur.report_decoding import decode_report
from secateur.selections import select
from secateur.source import read_source
from secateur.spec import Spec
from secateur.spec_files.lines import placed_errors
from secateur.tensors import LocalTensor
from secateur_proto import pruner_pb2 as pb
from secateur_proto.enums import values_by_name
from secateur_proto.report_pb2 import Details

PRIORS = values_by_name(pb.Prior.DESCRIPTOR)

Patterns = str | Sequence[str] | None
Tensors = Mapping[str, LocalTensor]


class AsyncMeasureCalls(AsyncCheckpointCalls):
    """The coroutines of `secateur.MeasureCalls`."""

    async def report(
        self,
        source: Any,
        tensors: Patterns = None,
        progress: Progress = None,
        key: str | None = None,
        details: bool = False,
    ) -> Report:
        """See `secateur.Client.report`."""
        asked = details_of(details)
        model = await self._transport.run(read_source, source, key)
        return await self._report(model, tensors, progress, self._connection.patience(), asked)

    async def _report(
        self,
        model: Source,
        tensors: Patterns,
        progress: Progress,
        patience: Patience,
        details: Details | None = None,
    ) -> Report:
        header = pb.ReportHeader(tensors=named_in(tensors, model), details=details)
        call = await self._call("Report", header, model, model.tensors, progress, patience)
        return decode_report((await self._connection.measure(call)).report)

    async def plan(
        self,
        source: Any,
        spec: Spec,
        amounts: Sequence[float] | None = None,
        progress: Progress = None,
        key: str | None = None,
        prior: Prior = "masks",
    ) -> Plan:
        """See `secateur.Client.plan`."""
        model = await self._transport.run(read_source, source, key)
        return await self._plan(model, spec, amounts, progress, prior, self._connection.patience())

    async def _plan(
        self,
        model: Source,
        spec: Spec,
        amounts: Sequence[float] | None,
        progress: Progress,
        prior: str,
        patience: Patience,
    ) -> Plan:
        with placed_errors(spec):
            message, arrays = await self._transport.run(encode_spec, spec, model)
            model = model.sending(unmasked_members(message))
            header = pb.PlanHeader(
                spec=message,
                amounts=[] if amounts is None else encode_amounts(amounts),
                prior=one_of("prior", prior, PRIORS),
            )
            tensors = {**model.sent(), **arrays}
            call = await self._call("Plan", header, model, tensors, progress, patience)
            return decode_plan((await self._connection.measure(call)).plan, header)

    async def sensitivity(
        self,
        source: Any,
        tensors: Patterns = None,
        amounts: Sequence[float] = SOME_AMOUNTS,
        granularity: AnyGranularity = "element",
        p: float = 1,
        progress: Progress = None,
        key: str | None = None,
    ) -> Sensitivity:
        """See `secateur.Client.sensitivity`."""
        model = await self._transport.run(read_source, source, key)
        patience = self._connection.patience()
        names = tensors
        if names is None:
            names = matrices(
                model.prunable()
                if model.is_here
                else (await self._report(model, None, None, patience)).tensors
            )
        spec = select(names, 0, magnitude(p), granularity)
        return sensitivity_of(await self._plan(model, spec, amounts, progress, "masks", patience))

    async def _call(
        self,
        rpc: str,
        header: Any,
        model: Source,
        tensors: Tensors,
        progress: Progress,
        patience: Patience,
    ) -> Call:
        """Makes the call that sends tensors; it completes the header."""
        upload = await self._transport.run(Upload, tensors, model.metadata, is_file=model.is_here)
        header.MergeFrom(type(header)(data_bytes=upload.file_bytes, **model.place))
        return Call(self._transport.rpcs[rpc], header, upload, progress, patience)


def named_in(tensors: Patterns, model: Source) -> list[str]:
    """Names and globs as a header has them: an empty list is every tensor."""
    named = [] if tensors is None else fitted_patterns(patterns(tensors), model)
    check_names("tensors", named, model.others)
    return named
