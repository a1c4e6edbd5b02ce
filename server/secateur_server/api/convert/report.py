"""A report to the wire."""

import math
from collections.abc import Collection, Sequence
from heapq import nlargest

from secateur_proto.report_pb2 import (
    Coverage,
    SparsityReport,
    TensorReport,
    ZeroBlocks,
)
from secateur_proto.spec_pb2 import Pattern
from secateur_server.api.convert.tables import encode_choices, tensor_reports
from secateur_server.backends.dtypes import WIRE_DTYPES
from secateur_server.cut.choice import Choice
from secateur_server.report.measure import MOST_NAMED, Sparsity
from secateur_server.report.tensors import MeasuredTensors
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.catalog import Catalog
from secateur_server.state_dict.parameter import Parameter


def encode_report(
    context: RequestContext,
    measured: MeasuredTensors,
    catalog: Catalog,
    input_blake3: str,
    output_blake3: str = "",
    choices: Sequence[Sequence[Choice]] = (),
    are_folded: bool = False,
) -> SparsityReport:
    """Makes the message of a report, without warnings.

    Args:
        context: The request.
        measured: The counts of the tensors that the report covers.
        catalog: Of the whole state_dict.
        input_blake3: The digest of the file that came; empty if it is not known.
        output_blake3: The digest of the file that is sent; empty if it is not known.
        choices: The choices of each rule of a spec.
        are_folded: Whether the tensors are sent with their masks applied, and without masks.

    Returns:
        The message.
    """
    tensors, names = encode_tensors(measured, are_folded), measured.parameters.keys()
    digests = input_blake3, output_blake3
    return report_of(context, tensors, names, catalog, *digests, choices)


def report_of(
    context: RequestContext,
    encoded: bytes,
    names: Collection[str],
    catalog: Catalog,
    input_blake3: str,
    output_blake3: str = "",
    choices: Sequence[Sequence[Choice]] = (),
) -> SparsityReport:
    """Does what encode_report does, of tensors that are encoded already.

    Args:
        context: The request.
        encoded: What encode_tensors returns; of several models, one behind another.
        names: Of these tensors.
        catalog: Of the whole state_dict.
        input_blake3: As of encode_report.
        output_blake3: As of encode_report.
        choices: As of encode_report.
    """
    report = SparsityReport.FromString(encoded)
    tensors = list(report.tensors)
    by_name = {tensor.name: tensor for tensor in tensors} if catalog.other_names else {}
    for other, name in catalog.other_names.items():
        if name in by_name:
            by_name[name].aliases.append(other)
    _add_up(report)
    for of_rule in choices:
        report.rules.add().MergeFromString(encode_choices(context, of_rule))
    report.input_blake3, report.output_blake3 = input_blake3, output_blake3
    report.coverage.CopyFrom(_coverage(catalog, names))
    return report


def _add_up(report: SparsityReport) -> None:
    tensors = list(report.tensors)
    report.zeros = sum(tensor.zeros for tensor in tensors)
    report.total = sum(tensor.total for tensor in tensors)
    report.sparsity = _share(report.zeros, report.total)


def encode_tensors(measured: MeasuredTensors, is_folded: bool = False) -> bytes:
    """Encodes the field `tensors` of a report. Fields of several models may be concatenated."""
    parameters, others = measured.parameters, measured.others
    encoded: dict[str, bytes] = {}
    for names, counts in measured.batches:
        covered = [parameters[name] for name in names]
        encoded.update(zip(names, tensor_reports(names, covered, counts, is_folded), strict=True))
    return b"".join(
        encoded[name] if name in encoded else _tensor(name, parameter, others[name], is_folded)
        for name, parameter in parameters.items()
    )


def _coverage(catalog: Catalog, names: Collection[str]) -> Coverage:
    sizes = {name: math.prod(catalog.prunable[name]) for name in catalog.floating}
    others = [name for name in sizes if name not in names]
    uncovered = sum(sizes[name] for name in others)
    return Coverage(
        covered=sum(sizes.values()) - uncovered,
        uncovered=uncovered,
        uncovered_tensors=len(others),
        largest_uncovered=nlargest(MOST_NAMED, others, key=sizes.__getitem__),
    )


def _tensor(name: str, parameter: Parameter, found: Sparsity, is_folded: bool) -> bytes:
    weight = parameter.weight
    report = TensorReport(
        name=name,
        shape=weight.shape,
        dtype=WIRE_DTYPES[weight.dtype],
        bytes=weight.nbytes,
        zeros=found.zeros,
        total=found.total,
        sparsity=_share(found.zeros, found.total),
        pruned=0 if is_folded else found.pruned,
        is_pruned=parameter.mask is not None and not is_folded,
        zero_slices=found.zero_slices,
        patterns=[Pattern(n=n, m=m) for n, m in found.structure.patterns],
        zero_blocks=[
            ZeroBlocks(side=blocks.side, zero=blocks.zero, total=blocks.total)
            for blocks in found.structure.zero_blocks
        ],
    )
    return SparsityReport(tensors=[report]).SerializeToString()


def _share(zeros: int, total: int) -> float:
    return zeros / total if total else 0.0
