"""The methods of a client on models: the service Pruner."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from secateur.amounts import encode_amounts
from secateur.checkpoint import decode_checkpoint, uri_of
from secateur.checkpoint_calls import CheckpointCalls
from secateur.checks import flag, one_of, patterns
from secateur.choices import AnyGranularity, magnitude
from secateur.connection import Call
from secateur.defaults import SOME_AMOUNTS, matrices
from secateur.destinations import check_destination, new_folder
from secateur.encoding import encode_spec, unmasked_members
from secateur.errors import SecateurError
from secateur.forms import OUTPUTS, is_model
from secateur.grouping import Groups, example_inputs_of, groups_of
from secateur.model import Source
from secateur.others import check_names
from secateur.packed import check_zstandard
from secateur.patience import Patience
from secateur.plan import Plan, Sensitivity, decode_plan, sensitivity_of
from secateur.progress import Progress
from secateur.report import Report
from secateur.report_decoding import decode_report
from secateur.result import FinalizeResult, PruneResult
from secateur.selections import select
from secateur.server_info import ServerInfo, decode_server_info
from secateur.source import read_source
from secateur.spec import Spec
from secateur.tensors import LocalTensor
from secateur.transfer import Upload
from secateur_proto import pruner_pb2 as pb
from secateur_proto.enums import plain_name, values_by_name
from secateur_proto.framing import CHUNK_BYTES

_PRIORS = values_by_name(pb.Prior.DESCRIPTOR)

# A prune that runs out of time has these seconds to delete the model that it uploaded.
TIDY_SECONDS = 1.0

Patterns = str | Sequence[str] | None
Tensors = Mapping[str, LocalTensor]


class PrunerCalls(CheckpointCalls):
    """What `Client` does with models; several arguments are described there."""

    def prune(
        self,
        source: Any,
        spec: Spec,
        output: str = "masks",
        progress: Progress = None,
        keep: bool = False,
        destination: str | os.PathLike[str] | None = None,
        key: str | None = None,
        prior: str = "masks",
    ) -> PruneResult:
        """Prunes a model by a spec.

        Args:
            source: See `Client`. Of a Module the parameters are sent, and not the buffers.
            spec: What to prune.
            output: What the server sends: "masks" (one bit an element), "reparametrized", "dense",
                "packed" (without zeros, compressed), "none" for the report alone, or another one of
                `server_info().outputs`.
            progress: See `Client`.
            keep: Whether the server keeps the result, as the result's checkpoint. Data that the
                server already has of the source is not sent again.
            destination: A URI to which the server writes the output, in place of sending it. With
                "shrunk" and a model from a Hugging Face folder also a new folder here, which gets
                a config.json with the new sizes.
            key: See `Client`.
            prior: What counts as pruned before: what "masks" prune, or also the "zeros" of the
                tensors that the spec names, for a model that was pruned and stored dense.
        """
        header = pb.PruneHeader(
            output=one_of("output", output, OUTPUTS),
            keep=flag("keep", keep),
            prior=one_of("prior", prior, _PRIORS),
        )
        model = read_source(source, key)
        folder = new_folder(destination, model) if output == "shrunk" else None
        header.destination_uri = "" if folder else uri_of(destination)
        message, arrays = encode_spec(spec, model)
        model = model.sending(unmasked_members(message))
        header.spec.CopyFrom(message)
        if output == "packed":
            check_zstandard("output='packed'")
        if is_model(output):
            check_destination(header.destination_uri, model.only_parameters())
        patience = self._connection.patience()
        if keep and model.is_here:
            result = self._prune_kept(model, header, arrays, progress, patience, spec)
        else:
            result = self._prune(model, header, arrays, progress, patience, model, spec)
        if folder:
            result.save(folder, output)
        return result

    def _prune(
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
        call = self._call("Prune", header, sent, {**sent.sent(), **arrays}, progress, patience)
        output = plain_name(pb.Output.DESCRIPTOR, header.output)
        is_small = not is_model(output) and sent.is_here and call.upload.file_bytes <= CHUNK_BYTES
        if is_small:
            call = replace(call, rpc=self._rpcs.prune_small)
        result, received = self._connection.transform(call, is_small)
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

    def _prune_kept(
        self,
        model: Source,
        header: pb.PruneHeader,
        arrays: Tensors,
        progress: Progress,
        patience: Patience,
        spec: Spec,
    ) -> PruneResult:
        """Sends what the server does not have of a model, and prunes it there."""
        uploaded = self._upload(model.only_parameters(), progress, patience)
        sent = read_source(uploaded)
        try:
            result = self._prune(sent, header, arrays, progress, patience, model, spec)
        except BaseException:
            with suppress(SecateurError):  # the caller sees the first error
                self._delete(uploaded, False, patience.at_least(TIDY_SECONDS))
            raise
        # The result refers to the same weights.
        self._delete(uploaded, False, patience.at_least(TIDY_SECONDS))
        return result

    def report(
        self,
        source: Any,
        tensors: Patterns = None,
        progress: Progress = None,
        key: str | None = None,
    ) -> Report:
        """Measures how sparse a model is, and where.

        Args:
            source: See `Client`.
            tensors: Names and globs; None is every floating tensor.
            progress: See `Client`.
            key: See `Client`.
        """
        model = read_source(source, key)
        return self._report(model, tensors, progress, self._connection.patience())

    def _report(
        self, model: Source, tensors: Patterns, progress: Progress, patience: Patience
    ) -> Report:
        header = pb.ReportHeader(tensors=_named(tensors, model))
        call = self._call("Report", header, model, model.tensors, progress, patience)
        return decode_report(self._connection.measure(call).report)

    def plan(
        self,
        source: Any,
        spec: Spec,
        amounts: Sequence[float] | None = None,
        progress: Progress = None,
        key: str | None = None,
        prior: str = "masks",
    ) -> Plan:
        """Computes what a prune would do, and prunes nothing.

        Args:
            source: See `Client`.
            spec: Its last rule is planned, after the rules before it; not a custom_from_mask.
            amounts: Ints and floats in place of that rule's own, at most 1000. The server reads the
                weights once for all of them.
            progress: See `Client`.
            key: See `Client`.
            prior: See `prune`.
        """
        model = read_source(source, key)
        return self._plan(model, spec, amounts, progress, prior, self._connection.patience())

    def _plan(
        self,
        model: Source,
        spec: Spec,
        amounts: Sequence[float] | None,
        progress: Progress,
        prior: str,
        patience: Patience,
    ) -> Plan:
        message, arrays = encode_spec(spec, model)
        model = model.sending(unmasked_members(message))
        header = pb.PlanHeader(
            spec=message,
            amounts=[] if amounts is None else encode_amounts(amounts),
            prior=one_of("prior", prior, _PRIORS),
        )
        call = self._call("Plan", header, model, {**model.sent(), **arrays}, progress, patience)
        return decode_plan(self._connection.measure(call).plan, header)

    def sensitivity(
        self,
        source: Any,
        tensors: Patterns = None,
        amounts: Sequence[float] = SOME_AMOUNTS,
        granularity: AnyGranularity = "element",
        p: float = 1,
        progress: Progress = None,
        key: str | None = None,
    ) -> Sensitivity:
        """Computes how much of its norm each tensor would lose, pruned alone by magnitude.

        Args:
            source: See `Client`.
            tensors: Names and globs; None is every floating tensor of 2 or more dimensions.
            amounts: See `plan`.
            granularity: See `secateur.select`.
            p: The order of the norm that ranks units larger than elements.
            progress: See `Client`.
            key: See `Client`.
        """
        model, patience = read_source(source, key), self._connection.patience()
        names = tensors
        if names is None:
            names = matrices(model, lambda model: self._report(model, None, None, patience))
        spec = select(names, 0, magnitude(p), granularity)
        return sensitivity_of(self._plan(model, spec, amounts, progress, "masks", patience))

    def finalize(
        self,
        source: Any,
        tensors: Patterns = None,
        progress: Progress = None,
        destination: str | None = None,
        key: str | None = None,
        output: str = "dense",
        groups: Groups = (),
        prior: str = "masks",
    ) -> FinalizeResult:
        """Makes pruning permanent: each pair X_orig, X_mask becomes X.

        Does what torch.nn.utils.prune.remove does; or, with output="shrunk", also removes the units
        of groups that are wholly pruned.

        Args:
            source: See `Client`.
            tensors: Names and globs of the tensors whose pairs are folded; None is all.
            progress: See `Client`.
            destination: See `prune`.
            key: See `Client`.
            output: "dense", "shrunk", or "packed".
            groups: What `group` returns; with "shrunk" only.
            prior: What counts as pruned in the groups' tensors: see `prune`. With "shrunk" only.
        """
        header = pb.FinalizeHeader(
            destination_uri=uri_of(destination),
            output=one_of("output", output, OUTPUTS),
            groups=groups_of(groups),
            prior=one_of("prior", prior, _PRIORS),
        )
        if output == "packed":
            check_zstandard("output='packed'")
        model = read_source(source, key)
        header.tensors.extend(_named(tensors, model))
        patience = self._connection.patience()
        call = self._call("Finalize", header, model, model.tensors, progress, patience)
        check_destination(destination, model)
        result, received = self._connection.transform(call)
        return FinalizeResult(
            report=decode_report(result.report),
            source=model,
            received=received,
            destination=destination,
            output=output,
            groups=header.groups,
            example_inputs=example_inputs_of(groups),
        )

    def server_info(self) -> ServerInfo:
        """Returns the server's version, features and limits.

        Raises:
            InvalidRequest: The server is older than this method.
        """
        request = pb.GetServerInfoRequest()
        return decode_server_info(self._connection.ask(self._rpcs["GetServerInfo"], request))

    def _call(
        self,
        rpc: str,
        header: Any,
        model: Source,
        tensors: Tensors,
        progress: Progress,
        patience: Patience,
    ) -> Call:
        """Makes the call that sends tensors; it completes the header."""
        upload = Upload(tensors, model.metadata, is_file=model.is_here)
        header.MergeFrom(type(header)(data_bytes=upload.file_bytes, **model.place))
        return Call(self._rpcs[rpc], header, upload, progress, patience)


def _named(tensors: Patterns, model: Source) -> list[str]:
    """Names and globs as a header has them: an empty list is every tensor."""
    named = [] if tensors is None else patterns(tensors)
    check_names("tensors", named, model.others)
    return named
