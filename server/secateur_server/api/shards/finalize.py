"""Finalize: the masks of each file are applied, and it is measured and written, by a task."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from secateur_proto import pruner_pb2 as pb
from secateur_server.api.answers import Made
from secateur_server.api.convert.checkpoint import file_message
from secateur_server.api.convert.report import encode_tensors, report_of
from secateur_server.api.finalize import final_files
from secateur_server.api.shards.model import DividedModel, NotDivisible, divided_model, worked
from secateur_server.api.shards.work import (
    FileWork,
    Place,
    Written,
    close_file,
    read_state_dict,
    write_file,
)
from secateur_server.api.shards.write import put_in_place, targets_of
from secateur_server.backends.protocol import Backend
from secateur_server.cut.drivers import Cluster
from secateur_server.report.tensors import measure_tensors
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.sources import Call, Sources
from secateur_server.uris.references import Reference
from secateur_server.wire.writer import digest_of


@dataclass(frozen=True)
class FinalizeWork:
    """A file to finalize.

    Attributes:
        work: The file.
        header: Of the call.
        names: The parameters that the report covers.
        target: Where the file is written.
    """

    work: FileWork
    header: pb.FinalizeHeader
    names: tuple[str, ...]
    target: Place

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.work.size

    @property
    def place(self) -> Reference:
        """The file, so that its next task is on the same node."""
        return self.work.reference


def finalize_files(
    sources: Sources, cluster: Cluster, call: Call[pb.FinalizeHeader], held: ExitStack
) -> Made:
    """Makes the answer of a call of Finalize, as finalize_call does.

    Raises:
        NotDivisible: The server must do the work.
    """
    context, header = call.context, call.header
    if header.groups or header.HasField("details") or not header.destination_uri:
        raise NotDivisible
    model = held.enter_context(divided_model(sources, cluster, call))
    names = model.state_dict.named(context, "header.tensors", header.tensors)
    with targets_of(sources, call, model) as targets:
        works = _works(header, model, names, [target.place() for target in targets])
        done = worked(context, cluster, "write", finalize_file, works)
        files = put_in_place(context, model, targets, [file for _, file in done])
    encoded = b"".join(tensors for tensors, _ in done)
    report = report_of(context, encoded, names, model.catalog, "", digest_of(files))
    sources.metrics.reported(context, report)
    result = pb.FinalizeResult(report=report, files=map(file_message, files))
    return result, [], model.check_unchanged


def _works(
    header: pb.FinalizeHeader,
    model: DividedModel,
    names: Sequence[str],
    places: Sequence[Place],
) -> list[FinalizeWork]:
    files = zip(model.references, model.divide(names), places, strict=False)  # and of the index
    return [FinalizeWork(FileWork(file), header, part, place) for file, part, place in files]


def finalize_file(
    context: RequestContext, backend: Backend, asked: FinalizeWork
) -> tuple[bytes, Written]:
    """Finalizes a file. Returns its measured parameters, as encode_tensors does, and the file."""
    state_dict = read_state_dict(context, asked.work)
    (file,) = final_files(context, asked.header, state_dict, [], asked.names)
    covered = {name: state_dict.parameters[name] for name in asked.names}
    tensors = encode_tensors(measure_tensors(context, covered), is_folded=True)
    written = write_file(context, asked.target, file)
    close_file(asked.work.reference)
    return tensors, written
