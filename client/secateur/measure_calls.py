"""The methods of a client that measure models and change none."""

from collections.abc import Mapping, Sequence
from typing import Any

from secateur.amounts import encode_amounts
from secateur.checkpoint_calls import CheckpointCalls
from secateur.checks import one_of, patterns
from secateur.choices import AnyGranularity, magnitude
from secateur.connection import Call
from secateur.defaults import SOME_AMOUNTS, matrices
from secateur.details import details_of
from secateur.encoding import encode_spec, unmasked_members
from secateur.model import Source
from secateur.others import check_names
from secateur.patience import Patience
from secateur.plan import Plan, Sensitivity, decode_plan, sensitivity_of
from secateur.progress import Progress
from secateur.renaming import fitted_patterns
from secateur.report import Report
from secateur.report_decoding import decode_report
from secateur.selections import select
from secateur.source import read_source
from secateur.spec import Spec
from secateur.tensors import LocalTensor
from secateur.transfer import Upload
from secateur_proto import pruner_pb2 as pb
from secateur_proto.enums import values_by_name
from secateur_proto.report_pb2 import Details

PRIORS = values_by_name(pb.Prior.DESCRIPTOR)

Patterns = str | Sequence[str] | None
Tensors = Mapping[str, LocalTensor]


class MeasureCalls(CheckpointCalls):
    """What `Client` measures; several arguments are described there."""

    def report(
        self,
        source: Any,
        tensors: Patterns = None,
        progress: Progress = None,
        key: str | None = None,
        details: bool = False,
    ) -> Report:
        """Measures how sparse a model is, and where.

        Args:
            source: See `Client`.
            tensors: Names and globs; None is every floating tensor.
            progress: See `Client`.
            key: See `Client`.
            details: Whether the largest tensors get `TensorReport.details`: histograms, and images
                of the zeros.
        """
        asked = details_of(details)
        model = read_source(source, key)
        return self._report(model, tensors, progress, self._connection.patience(), asked)

    def _report(
        self,
        model: Source,
        tensors: Patterns,
        progress: Progress,
        patience: Patience,
        details: Details | None = None,
    ) -> Report:
        header = pb.ReportHeader(tensors=named_in(tensors, model), details=details)
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
            prior=one_of("prior", prior, PRIORS),
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


def named_in(tensors: Patterns, model: Source) -> list[str]:
    """Names and globs as a header has them: an empty list is every tensor."""
    named = [] if tensors is None else fitted_patterns(patterns(tensors), model)
    check_names("tensors", named, model.others)
    return named
