"""Decodes a server's reports."""

from typing import NamedTuple

from secateur.decoding import decoded
from secateur.details import TensorDetails, decode_details
from secateur.lazy import LazyMapping, LazySequence
from secateur.report import (
    Bound,
    Choice,
    Coverage,
    Report,
    ReportWarning,
    TensorReport,
    ZeroBlocks,
)
from secateur.shrinkage import decode_shrinkage
from secateur_proto import report_pb2 as pb


class Extent(NamedTuple):
    """The shape of a tensor, its elements, and its other names."""

    shape: tuple[int, ...]
    total: int
    aliases: tuple[str, ...]


def decode_extents(message: pb.SparsityReport) -> dict[str, Extent]:
    """Decodes the extents of a report's tensors alone: all of the report takes longer."""
    return {
        tensor.name: Extent(tuple(tensor.shape), tensor.total, tuple(tensor.aliases))
        for tensor in message.tensors
    }


def decode_report(message: pb.SparsityReport) -> Report:
    """Decodes a report."""
    return decoded(
        Report,
        message,
        tensors=LazyMapping(message.tensors, _tensor),
        rules=tuple(LazySequence(rule.choices, decode_choice) for rule in message.rules),
        coverage=decoded(Coverage, message.coverage),
        warnings=tuple(map(_warning, message.warnings)),
        shrinkage=decode_shrinkage(message.shrinkage) if message.HasField("shrinkage") else None,
    )


def _warning(message: pb.Warning) -> ReportWarning:
    severity = "note" if message.severity == pb.SEVERITY_NOTE else "warning"
    return decoded(ReportWarning, message, severity=severity)


def _tensor(message: pb.TensorReport) -> TensorReport:
    return decoded(
        TensorReport,
        message,
        patterns=tuple(f"{pattern.n}:{pattern.m}" for pattern in message.patterns),
        zero_blocks=tuple(decoded(ZeroBlocks, blocks) for blocks in message.zero_blocks),
        details=_details(message),
    )


def _details(message: pb.TensorReport) -> TensorDetails | None:
    if not message.HasField("details"):
        return None
    return decode_details(message.details, tuple(message.shape))


def decode_choice(message: pb.Choice) -> Choice:
    """Decodes what a rule did to tensors that were ranked together."""
    return decoded(
        Choice,
        message,
        threshold=message.threshold if message.HasField("threshold") else None,
        bounds=tuple(decoded(Bound, bound) for bound in message.bounds),
    )
