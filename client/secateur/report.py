"""How sparse a model is, and where."""

import html
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from secateur_proto import report_pb2 as pb


@dataclass(frozen=True)
class TensorReport:
    """One tensor.

    zeros, total: elements.  bytes: of its values.  pruned: elements that its mask prunes.
    is_pruned: it has a mask.  zero_slices: for each dimension, how many slices are wholly zero.
    """

    shape: tuple[int, ...]
    dtype: str
    bytes: int
    zeros: int
    total: int
    sparsity: float
    pruned: int
    is_pruned: bool
    zero_slices: tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """What a rule did to tensors that were ranked together; counts are of elements or slices.

    threshold: importance of the most important unit pruned, or None.  ties: candidates at it, of
    which ties_pruned were pruned.
    """

    tensors: tuple[str, ...]
    candidates: int
    requested: int
    pruned: int
    threshold: float | None
    ties: int
    ties_pruned: int


@dataclass(frozen=True)
class Report:
    """A sparsity report, measured by the server on what it returned.

    tensors: by name, in the state_dict's order.  rules: for each rule of the spec its choices.
    input_blake3, output_blake3: of the safetensors files that went up and came down.
    """

    tensors: Mapping[str, TensorReport]
    zeros: int
    total: int
    sparsity: float
    rules: tuple[tuple[Choice, ...], ...]
    input_blake3: str
    output_blake3: str

    @property
    def is_pruned(self) -> bool:
        """Whether any tensor has a mask."""
        return any(tensor.is_pruned for tensor in self.tensors.values())

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = self._rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for row in rows:
            cells = [
                cell.ljust(width) if column in (0, 1, 2) else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        head, *body = self._rows()
        lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
        for row in body:
            cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
            lines.append(f"<tr>{cells}</tr>")
        return "<table>" + "".join(lines) + "</table>"

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [
            ("tensor", "shape", "dtype", "bytes", "zeros", "total", "sparsity", "zero slices")
        ]
        for name, tensor in self.tensors.items():
            shape = "x".join(map(str, tensor.shape)) or "scalar"
            slices = " ".join(map("{}/{}".format, tensor.zero_slices, tensor.shape))
            rows.append((name, shape, tensor.dtype, *_counts(tensor.bytes, tensor), slices))
        total_bytes = sum(tensor.bytes for tensor in self.tensors.values())
        rows.append(("total", "", "", *_counts(total_bytes, self), ""))
        return rows


def _counts(size: int, counted: TensorReport | Report) -> tuple[str, ...]:
    numbers = (f"{number:,}" for number in (size, counted.zeros, counted.total))
    return (*numbers, f"{counted.sparsity:.2%}")


def decode_report(message: pb.SparsityReport) -> Report:
    """A report from the wire."""
    return Report(
        tensors={tensor.name: _tensor(tensor) for tensor in message.tensors},
        zeros=message.zeros,
        total=message.total,
        sparsity=message.sparsity,
        rules=tuple(tuple(map(_choice, rule.choices)) for rule in message.rules),
        input_blake3=message.input_blake3,
        output_blake3=message.output_blake3,
    )


def _tensor(message: pb.TensorReport) -> TensorReport:
    return TensorReport(
        shape=tuple(message.shape),
        dtype=message.dtype,
        bytes=message.bytes,
        zeros=message.zeros,
        total=message.total,
        sparsity=message.sparsity,
        pruned=message.pruned,
        is_pruned=message.is_pruned,
        zero_slices=tuple(message.zero_slices),
    )


def _choice(message: pb.Choice) -> Choice:
    return Choice(
        tensors=tuple(message.tensors),
        candidates=message.candidates,
        requested=message.requested,
        pruned=message.pruned,
        threshold=message.threshold if message.HasField("threshold") else None,
        ties=message.ties,
        ties_pruned=message.ties_pruned,
    )
