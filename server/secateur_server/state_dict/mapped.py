"""A model in files that lie in mapped memory: of the store, or of a URI."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence

from torch import Tensor

from secateur_proto.index import SUFFIX
from secateur_server.backends.masks import Mask
from secateur_server.errors import InvalidStateDict
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.catalog import Stored
from secateur_server.state_dict.model import Model, Shard
from secateur_server.storage.blobs import Blob
from secateur_server.wire.header import Header
from secateur_server.wire.index import Index, check_length, read_index
from secateur_server.wire.mapped import MappedFile, map_header, map_tensors
from secateur_server.wire.tensors import WireTensor

Extras = tuple[Mapping[str, Stored], Mapping[str, Tensor]]
Read = Callable[[Collection[str] | None], None]


def map_blob(blob: Blob) -> MappedFile:
    """A blob of the store, which is checked as it is read."""
    return MappedFile(blob.filename, blob.data, blob.check, blob.check_whole)


def map_model(
    context: RequestContext,
    files: Sequence[MappedFile],
    masks: MappedFile | None,
    extras: Extras,
) -> tuple[Model, Read]:
    """A model of which the headers are known, and a function that reads the rest, on the CPU.

    files: one, or shards and their index.  masks: of parameters that were pruned since, as bits.
    extras: what the catalog has of uploaded scores and masks, and themselves.
    The function takes the names of the parameters that are needed, or None for all.
    Errors: MalformedFile, InvalidStateDict, InvalidPair, DataLoss.
    """
    shards = [file for file in files if not file.filename.endswith(SUFFIX)]
    heads = [map_header(context, file) for file in shards]
    index = _index([f for f in files if f not in shards], shards, [head for head, _ in heads])
    of_shards = [
        Shard(file.filename, head.entries, head.metadata)
        for file, (head, _) in zip(shards, heads, strict=True)
    ]
    known, values = extras
    model = Model(of_shards, known, index, is_mapped=True)

    def read(names: Collection[str] | None) -> None:
        wanted = None if names is None else model.files_of(names)
        parts = [
            (file, [e for e in head.entries if wanted is None or e.name in wanted], base)
            for file, (head, base) in zip(shards, heads, strict=True)
        ]
        context.begin("read", sum(e.end - e.begin for _, entries, _ in parts for e in entries))
        tensors: dict[str, WireTensor] = {}
        for file, entries, base in parts:
            tensors |= map_tensors(context, file, entries, base)
        model.fill(context, tensors, values, _masks(context, masks, model) if masks else {})

    return model, read


def _index(
    indices: Sequence[MappedFile], shards: Sequence[MappedFile], heads: Sequence[Header]
) -> Index | None:
    """The index of a model's shards.  Errors: InvalidStateDict."""
    if len(shards) == 1 and not indices:
        return None
    if len(indices) != 1 or not shards:
        raise InvalidStateDict(
            "data",
            f"{len(shards)} files and {len(indices)} indices are no model: one file is, "
            f"or shards and one *{SUFFIX}",
        )
    (index,) = indices
    check_length(index.filename, len(index.data))
    for block in range(index.blocks):
        index.check(block)
    names = {
        file.filename: {entry.name for entry in head.entries}
        for file, head in zip(shards, heads, strict=True)
    }
    known = set().union(*names.values())
    tied = {
        alias: name
        for head in heads
        for alias, name in head.metadata.items()
        if name in known or f"{name}_orig" in known
    }
    return read_index(index.filename, index.data, names, tied)


def _masks(context: RequestContext, file: MappedFile, model: Model) -> dict[str, Mask]:
    """The masks that a checkpoint has beside its weights."""
    head, base = map_header(context, file)
    return {
        name: Mask(tensor.data, math.prod(model.catalog.prunable[name]))
        for name, tensor in map_tensors(context, file, head.entries, base).items()
    }
