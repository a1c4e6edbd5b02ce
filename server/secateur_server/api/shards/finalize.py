"""Finalize: the masks of each file are applied, and it is measured and written, by a task."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from secateur_proto import pruner_pb2 as pb
from secateur_server.api.answers import Made
from secateur_server.api.convert.checkpoint import file_message
from secateur_server.api.convert.report import encode_tensors, report_of
from secateur_server.api.finalize import final_files, resolved_groups
from secateur_server.api.shards.groups import shrink
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
from secateur_server.cut.prior import prune_zeros
from secateur_server.granularity.group import Group
from secateur_server.outputs.shrunk import shrunk_files
from secateur_server.report.shrinkage import measure_sent
from secateur_server.report.warnings import not_shrunk
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.slices import Shrinking
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
        shrinking: What is kept of the file; None: everything.
    """

    work: FileWork
    header: pb.FinalizeHeader
    names: tuple[str, ...]
    target: Place
    shrinking: Shrinking | None

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.work.size

    @property
    def place(self) -> Reference:
        """The file, so that its next task is on the same node."""
        return self.work.reference


def finalize_files(
    sources: Sources,
    cluster: Cluster,
    call: Call[pb.FinalizeHeader],
    asked: Sequence[Group],
    held: ExitStack,
) -> Made:
    """Makes the answer of a call of Finalize, as finalize_call does.

    Raises:
        NotDivisible: The server must do the work.
    """
    context, header = call.context, call.header
    if header.HasField("details") or not header.destination_uri:
        raise NotDivisible
    model = held.enter_context(divided_model(sources, cluster, call))
    names = model.state_dict.named(context, "header.tensors", header.tensors)
    groups = resolved_groups(context, asked, model.catalog)
    works = _works(header, model, groups)
    shrunk = shrink(context, model, works, groups) if groups else None
    with targets_of(sources, call, model) as targets:
        kept = shrunk.files if shrunk else [None] * len(works)
        pieces = [
            FinalizeWork(work, header, part, target.place(), shrinking)
            for work, part, target, shrinking in zip(
                works,
                model.divide(names),
                targets,
                kept,
                strict=False,  # targets: the index too
            )
        ]
        done = worked(context, cluster, "write", finalize_file, pieces)
        files = put_in_place(context, model, targets, [file for _, file in done])
    encoded = b"".join(tensors for tensors, _ in done)
    report = report_of(context, encoded, names, model.catalog, "", digest_of(files))
    if shrunk:
        shrunk.add_to(context, report, model)
        report.warnings.extend(filter(None, [not_shrunk(report.shrinkage)]))
    sources.metrics.reported(context, report)
    result = pb.FinalizeResult(report=report, files=map(file_message, files))
    return result, [], model.check_unchanged


def _works(
    header: pb.FinalizeHeader, model: DividedModel, groups: Sequence[Group]
) -> list[FileWork]:
    named = {member.tensor for group in groups for member in group.members}
    zeros = named if header.prior == pb.PRIOR_ZEROS else set[str]()
    return [
        FileWork(reference, zeros=tuple(name for name in catalog.prunable if name in zeros))
        for reference, catalog in zip(model.references, model.catalogs, strict=True)
    ]


def finalize_file(
    context: RequestContext, backend: Backend, asked: FinalizeWork
) -> tuple[bytes, Written]:
    """Finalizes a file. Returns its measured parameters, as encode_tensors does, and the file."""
    work = asked.work
    state_dict = read_state_dict(context, work)
    state_dict.parameters = prune_zeros(context, state_dict.parameters, work.zeros)
    covered = {name: state_dict.parameters[name] for name in asked.names}
    if asked.shrinking is None:
        (file,) = final_files(context, asked.header, state_dict, [], asked.names)
    else:
        (file,) = shrunk_files(context, state_dict, {}, asked.shrinking)
    measured = measure_sent(context, covered, asked.shrinking)
    written = write_file(context, asked.target, file)
    close_file(work.reference)
    return encode_tensors(measured, is_folded=True), written
