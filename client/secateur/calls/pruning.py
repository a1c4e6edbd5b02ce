"""The methods of a client that prune models."""

import os
from contextlib import suppress
from dataclasses import replace
from typing import Any, overload

from secateur.calls.measuring import PRIORS, AsyncMeasureCalls, Patterns, Tensors, named_in
from secateur.calls.patience import Patience
from secateur.checkpoint import decode_checkpoint, uri_of
from secateur.checks import flag, one_of
from secateur.destinations import check_destination, new_folder
from secateur.details import details_of
from secateur.encoding import check_solvers, encode_spec, unmasked_members
from secateur.errors import SecateurError
from secateur.forms import OUTPUTS, is_model
from secateur.grouping import Groups, example_inputs_of, groups_of
from secateur.literals import FinalOutput, Masks, Out, Output, Prior
from secateur.model import Source
from secateur.packing.packed import check_zstandard
from secateur.progress import Progress
from secateur.renaming import fitted_groups
from secateur.report_decoding import decode_report
from secateur.result import FinalizeResult, PruneResult
from secateur.server_info import ServerInfo, decode_server_info
from secateur.shrinkage import add_unsent
from secateur.source import read_source
from secateur.spec import Spec
from secateur.spec_files.lines import placed_errors
from secateur_proto import pruner_pb2 as pb
from secateur_proto.enums import plain_name
from secateur_proto.framing import CHUNK_BYTES

# A prune that runs out of time, or is cancelled, has these seconds to delete the model that it
# uploaded.
TIDY_SECONDS = 1.0


class AsyncPrunerCalls(AsyncMeasureCalls):
    """The coroutines of `secateur.PrunerCalls`."""

    @overload
    async def prune(
        self,
        source: Any,
        spec: Spec,
        output: Masks = "masks",
        progress: Progress = None,
        keep: bool = False,
        destination: str | os.PathLike[str] | None = None,
        key: str | None = None,
        prior: Prior = "masks",
        details: bool = False,
    ) -> PruneResult[Masks]: ...

    @overload
    async def prune(
        self,
        source: Any,
        spec: Spec,
        output: Out,
        progress: Progress = None,
        keep: bool = False,
        destination: str | os.PathLike[str] | None = None,
        key: str | None = None,
        prior: Prior = "masks",
        details: bool = False,
    ) -> PruneResult[Out]: ...

    async def prune(
        self,
        source: Any,
        spec: Spec,
        output: Output = "masks",
        progress: Progress = None,
        keep: bool = False,
        destination: str | os.PathLike[str] | None = None,
        key: str | None = None,
        prior: Prior = "masks",
        details: bool = False,
    ) -> PruneResult[Any]:
        """See `secateur.Client.prune`."""
        header = pb.PruneHeader(
            output=one_of("output", output, OUTPUTS),
            keep=flag("keep", keep),
            prior=one_of("prior", prior, PRIORS),
            details=details_of(details),
        )
        model = await self._transport.run(read_source, source, key)
        folder = new_folder(destination, model, output) if is_model(output) else None
        header.destination_uri = "" if folder else uri_of(destination)
        with placed_errors(spec):
            message, arrays = await self._transport.run(encode_spec, spec, model)
            check_solvers(spec, output, keep)
            model = model.sending(unmasked_members(message))
            header.spec.CopyFrom(message)
            if output == "packed":
                check_zstandard("output='packed'")
            if is_model(output):
                check_destination(header.destination_uri, model.only_parameters())
            patience = self._connection.patience()
            if keep and model.is_here:
                result = await self._prune_kept(model, header, arrays, progress, patience, spec)
            else:
                result = await self._prune(model, header, arrays, progress, patience, model, spec)
        if folder and output != "none":  # which has no folder
            await self._transport.write(result.save, folder, output)
        return result

    async def _prune(
        self,
        sent: Source,
        header: pb.PruneHeader,
        arrays: Tensors,
        progress: Progress,
        patience: Patience,
        model: Source,
        spec: Spec,
    ) -> PruneResult:
        """Sends a model, or its place on the server; the result is of `model`."""
        call = await self._call(
            "Prune", header, sent, {**sent.sent(), **arrays}, progress, patience
        )
        output = plain_name(pb.Output.DESCRIPTOR, header.output)
        is_small = not is_model(output) and sent.is_here and call.upload.file_bytes <= CHUNK_BYTES
        if is_small:
            call = replace(call, rpc=self._transport.rpcs.prune_small)
        result, received = await self._connection.transform(call, is_small)
        if result.report.HasField("shrinkage"):
            add_unsent(result.report.shrinkage, model.unsent_tensors().values())
        return PruneResult(
            message=result.report,
            source=model,
            output=output,
            received=received,
            checkpoint=decode_checkpoint(result.checkpoint) if header.keep else None,
            destination=header.destination_uri or None,
            groups=[group for rule in header.spec.rules for group in rule.selection.groups],
            example_inputs=spec.example_inputs,
        )

    async def _prune_kept(
        self,
        model: Source,
        header: pb.PruneHeader,
        arrays: Tensors,
        progress: Progress,
        patience: Patience,
        spec: Spec,
    ) -> PruneResult:
        """Sends what the server does not have of a model, and prunes it there."""
        uploaded = await self._upload(model.only_parameters(), progress, patience)
        sent = read_source(uploaded)
        try:
            result = await self._prune(sent, header, arrays, progress, patience, model, spec)
        except BaseException as error:
            is_failed = isinstance(error, SecateurError)  # and not cancelled
            tidy = patience.at_least(TIDY_SECONDS) if is_failed else Patience(TIDY_SECONDS)
            with suppress(SecateurError):  # the caller sees the first error
                await self._delete(uploaded, False, tidy)
            raise
        # The result refers to the same weights.
        await self._delete(uploaded, False, patience.at_least(TIDY_SECONDS))
        return result

    async def finalize(
        self,
        source: Any,
        tensors: Patterns = None,
        progress: Progress = None,
        destination: str | None = None,
        key: str | None = None,
        output: FinalOutput = "dense",
        groups: Groups = (),
        prior: Prior = "masks",
        details: bool = False,
    ) -> FinalizeResult:
        """See `secateur.Client.finalize`."""
        header = pb.FinalizeHeader(
            destination_uri=uri_of(destination),
            output=one_of("output", output, OUTPUTS),
            prior=one_of("prior", prior, PRIORS),
            details=details_of(details),
        )
        given = groups_of(groups)
        if output == "packed":
            check_zstandard("output='packed'")
        model = await self._transport.run(read_source, source, key)
        header.tensors.extend(named_in(tensors, model))
        header.groups.extend(fitted_groups(given, model))
        patience = self._connection.patience()
        call = await self._call("Finalize", header, model, model.tensors, progress, patience)
        check_destination(destination, model)
        result, received = await self._connection.transform(call)
        return FinalizeResult(
            report=decode_report(result.report),
            source=model,
            received=received,
            destination=destination,
            output=output,
            groups=header.groups,
            example_inputs=example_inputs_of(groups),
        )

    async def server_info(self) -> ServerInfo:
        """See `secateur.Client.server_info`."""
        request = pb.GetServerInfoRequest()
        rpc = self._transport.rpcs["GetServerInfo"]
        return decode_server_info(await self._connection.ask(rpc, request))
