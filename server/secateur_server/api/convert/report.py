"""A report to the wire."""

import math
from collections.abc import Collection, Iterable, Sequence
from heapq import nlargest

from secateur_proto.report_pb2 import (
    Coverage,
    SparsityReport,
    TensorReport,
    ZeroBlocks,
)
from secateur_proto.spec_pb2 import Pattern
from secateur_server.api.convert.tables import encode_choices, tensor_reports
from secateur_server.backends.batches import are_many, batched
from secateur_server.backends.dtypes import WIRE_DTYPES
from secateur_server.cut.choice import Choice
from secateur_server.cut.small import is_small
from secateur_server.report.measure import MOST_NAMED, measure
from secateur_server.report.measure_small import measure_small
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.catalog import Catalog
from secateur_server.state_dict.parameter import Parameter


def encode_report(
    context: RequestContext,
    parameters: Iterable[tuple[str, Parameter]],
    catalog: Catalog,
    input_blake3: str,
    output_blake3: str = "",
    outcomes: Sequence[Sequence[Choice]] = (),
    are_folded: bool = False,
) -> SparsityReport:
    """Measures `parameters`, in their order.

    catalog: of the whole model.
    outcomes: for each rule of a spec its choices.
    are_folded: the parameters are sent with their masks applied, and without masks.
    """
    covered = dict(parameters)
    report = SparsityReport.FromString(_tensors(context, covered.items(), are_folded))
    tensors = list(report.tensors)
    by_name = {tensor.name: tensor for tensor in tensors} if catalog.other_names else {}
    for other, name in catalog.other_names.items():
        if name in by_name:
            by_name[name].aliases.append(other)
    report.zeros = sum(tensor.zeros for tensor in tensors)
    report.total = sum(tensor.total for tensor in tensors)
    report.sparsity = _share(report.zeros, report.total)
    for choices in outcomes:
        report.rules.add().MergeFromString(encode_choices(context, choices))
    report.input_blake3, report.output_blake3 = input_blake3, output_blake3
    report.coverage.CopyFrom(_coverage(catalog, covered))
    return report


def _tensors(
    context: RequestContext, parameters: Collection[tuple[str, Parameter]], is_folded: bool
) -> bytes:
    """The field `tensors` of a report, encoded; small tensors are measured together."""
    small = [of for of in parameters if is_small(of[1]) and of[1].weight.dim()]
    small = small if are_many(small) else []
    found: dict[str, bytes] = {}
    for part in batched([parameter.weight.numel() for _, parameter in small]):
        context.check()
        names, of_names = zip(*small[part], strict=True)
        measured = measure_small(context, of_names)
        found.update(zip(names, tensor_reports(names, of_names, measured, is_folded), strict=True))
    return b"".join(
        found[name] if name in found else _tensor(context, name, parameter, is_folded)
        for name, parameter in parameters
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


def _tensor(context: RequestContext, name: str, parameter: Parameter, is_folded: bool) -> bytes:
    weight = parameter.weight
    found = measure(context, parameter)
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
