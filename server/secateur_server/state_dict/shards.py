"""The files of a state_dict."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from secateur_server.backends.dtypes import TORCH_DTYPES
from secateur_server.errors import InvalidStateDict, quote
from secateur_server.state_dict.catalog import Shape, Stored
from secateur_server.wire.header import Entry


@dataclass(frozen=True)
class Shard:
    """A file of a state_dict, which may be its only one."""

    filename: str
    entries: Sequence[Entry]
    metadata: Mapping[str, str]


def shards_of(shards: Sequence[Shard]) -> dict[str, str]:
    """Maps each tensor's name to its file's. Raises InvalidStateDict if two files have it."""
    found: dict[str, str] = {}
    for shard in shards:
        for entry in shard.entries:
            if entry.name in found:
                raise InvalidStateDict(
                    f"data[{quote(entry.name)}]",
                    f"is in two files, {quote(found[entry.name])} and {quote(shard.filename)}",
                )
            found[entry.name] = shard.filename
    return found


def stored_of(entries: Iterable[Entry]) -> dict[str, Stored]:
    """Describes the tensors of a file, by their names."""
    kinds: dict[tuple[str, Shape], Stored] = {}  # many tensors share few kinds
    stored = {}
    for entry in entries:
        kind = entry.dtype, entry.shape
        if kind not in kinds:
            kinds[kind] = Stored(entry.dtype, TORCH_DTYPES.get(entry.dtype), entry.shape)
        stored[entry.name] = kinds[kind]
    return stored
