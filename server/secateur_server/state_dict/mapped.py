"""State_dicts in mapped files: of the store, or of a URI."""

import math
from collections.abc import Collection, Sequence
from functools import partial
from typing import NamedTuple

from secateur_proto.index import SUFFIX
from secateur_server.backends.masks import Mask
from secateur_server.errors import InvalidStateDict
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.incoming import NO_EXTRAS, Extras, Incoming
from secateur_server.state_dict.shards import Shard
from secateur_server.state_dict.state_dict import StateDict
from secateur_server.storage.blobs import Blob
from secateur_server.storage.records import StoredFile
from secateur_server.wire.header import Header
from secateur_server.wire.index import Index, check_length, read_index
from secateur_server.wire.mapped import MappedFile, map_header, map_tensors
from secateur_server.wire.tensors import WireTensor


def map_blob(blob: Blob) -> MappedFile:
    """Maps a blob of the store. Its blocks are verified as they are read."""
    return MappedFile(blob.filename, blob.data, blob.check, blob.check_whole)


def open_files(
    context: RequestContext,
    files: Sequence[MappedFile],
    masks: MappedFile | None = None,
    extras: Extras = NO_EXTRAS,
    stored: tuple[StoredFile, ...] = (),
) -> Incoming:
    """Reads the headers of mapped files.

    Args:
        context: The request.
        files: One file, or shards and their index.
        masks: Packed masks of the parameters that were pruned after the files were stored.
        extras: Uploaded scores and masks.
        stored: The files of the store that are mapped.

    Raises:
        MalformedFile: A header is not one of safetensors.
        InvalidStateDict: The files do not make up one state_dict.
        InvalidPair: A weight and its mask do not fit.
        DataLoss: The store's files are damaged.
    """
    shards = [
        MappedShard(file, *map_header(context, file))
        for file in files
        if not file.filename.endswith(SUFFIX)
    ]
    described = [Shard(s.file.filename, s.head.entries, s.head.metadata) for s in shards]
    index = read_index_of([file for file in files if file.filename.endswith(SUFFIX)], described)
    state_dict = StateDict(described, extras.stored, index, is_mapped=True)

    def check_unchanged() -> None:
        for file in files:
            file.check_unchanged()

    size = sum(len(file.data) for file in files)
    read = partial(_read, context, shards, masks, extras, state_dict)
    digest = stored[0].blake3 if len(stored) == 1 else ""
    return Incoming(
        state_dict, size, read, lambda: digest, extras.streamed, check_unchanged, stored
    )


class MappedShard(NamedTuple):
    """A file of tensors.

    Attributes:
        file: In mapped memory.
        head: Its header.
        base: The offset of the data behind the header.
    """

    file: MappedFile
    head: Header
    base: int


def _read(
    context: RequestContext,
    shards: Sequence[MappedShard],
    masks: MappedFile | None,
    extras: Extras,
    state_dict: StateDict,
    names: Collection[str] | None,
) -> None:
    """Reads the data, as Incoming.read."""
    wanted = None if names is None else state_dict.files_of(names)
    parts = [
        (file, [e for e in head.entries if wanted is None or e.name in wanted], base)
        for file, head, base in shards
    ]
    context.begin("read", sum(e.end - e.begin for _, entries, _ in parts for e in entries))
    tensors: dict[str, WireTensor] = {}
    for file, entries, base in parts:
        tensors |= map_tensors(context, file, entries, base)
    kept = _masks(context, masks, state_dict) if masks else {}
    state_dict.fill(context, tensors, extras.values, kept)


def read_index_of(indices: Sequence[MappedFile], shards: Sequence[Shard]) -> Index | None:
    """Reads the index of shards.

    Args:
        indices: One, or none for a single file.
        shards: The files.

    Returns:
        The index; None for a single file.

    Raises:
        InvalidStateDict: There are too many indices or too few, or the files differ from the index.
    """
    if len(shards) == 1 and not indices:
        return None
    if len(indices) != 1 or not shards:
        raise InvalidStateDict(
            "data",
            f"got {len(shards)} files and {len(indices)} indices; send one file, or shards and "
            f"one *{SUFFIX}",
        )
    (index,) = indices
    check_length(index.filename, len(index.data))
    for block in range(index.blocks):
        index.check(block)
    names = {shard.filename: {entry.name for entry in shard.entries} for shard in shards}
    known = set().union(*names.values())
    tied = {
        alias: name
        for shard in shards
        for alias, name in shard.metadata.items()
        if name in known or f"{name}_orig" in known
    }
    return read_index(index.filename, index.data, names, tied)


def _masks(context: RequestContext, file: MappedFile, state_dict: StateDict) -> dict[str, Mask]:
    """The masks that a checkpoint stores beside its weights."""
    head, base = map_header(context, file)
    return {
        name: Mask(tensor.data, math.prod(state_dict.catalog.prunable[name]))
        for name, tensor in map_tensors(context, file, head.entries, base).items()
    }
