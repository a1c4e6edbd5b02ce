"""Writes a model to a destination: each file by the task that has it, and the index at last."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from secateur_server.api.shards.model import DividedModel, NotDivisible
from secateur_server.api.shards.work import Written
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.sources import Call, Sources
from secateur_server.uris.local import LocalTarget
from secateur_server.uris.multipart import MultipartTarget
from secateur_server.uris.uris import LOCAL, S3, commit
from secateur_server.wire.writer import Outgoing, OutgoingFile, bytes_file

SharedTarget = LocalTarget | MultipartTarget


@contextmanager
def targets_of(
    sources: Sources, call: Call[Any], model: DividedModel
) -> Iterator[Sequence[SharedTarget]]:
    """Opens a target for each file of a model, and for its index. Discards what is not committed.

    Raises:
        NotDivisible: Tasks cannot write to the destination.
        RequestError: A target cannot be opened.
    """
    uri = call.header.destination_uri
    if not uri.startswith((LOCAL, S3)):
        raise NotDivisible
    files = [(reference.filename, reference.size) for reference in model.references]
    index = model.state_dict.index
    files += [(index.filename, 0)] if index else []
    with sources.shared_targets(call.context, uri, files) as targets:
        yield targets


def put_in_place(
    context: RequestContext,
    model: DividedModel,
    targets: Sequence[SharedTarget],
    written: Sequence[Written],
) -> list[OutgoingFile]:
    """Writes the index, and puts all files in place.

    Args:
        context: The request.
        model: The model.
        targets: As targets_of yields them.
        written: What tasks have written to them.

    Returns:
        The files, without their bytes.

    Raises:
        RequestError: A file of the source has changed, the request is to end, or the disk failed.
    """
    files = [OutgoingFile(file.filename, file.size, file.blake3, lambda: []) for file in written]
    for target, file in zip(targets, written, strict=False):
        target.received(file.uploaded)
    if model.state_dict.index:
        text = model.state_dict.index.rewritten(_layout(written))
        files.append(bytes_file(context, model.state_dict.index.filename, text))
        targets[-1].write([text])
    commit(context, targets, model.check_unchanged)
    return files


def _layout(written: Sequence[Written]) -> Mapping[str, Mapping[str, Outgoing]]:
    """The tensors of each file, by their names, without their data."""
    return {
        file.filename: {
            entry.name: Outgoing(entry.dtype, entry.shape, lambda: []) for entry in file.entries
        }
        for file in written
    }
