"""A model in files on which tasks work. The server has the headers only."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from secateur_server.api.shards.work import FileWork, forget_file, read_head
from secateur_server.cut.drivers import Cluster, Task
from secateur_server.errors import InvalidStateDict, RequestError
from secateur_server.runtime.context import Found, RequestContext
from secateur_server.state_dict.catalog import Catalog
from secateur_server.state_dict.mapped import read_index_of
from secateur_server.state_dict.shards import Shard
from secateur_server.state_dict.sources import Call, Sources
from secateur_server.state_dict.state_dict import StateDict
from secateur_server.uris.references import Reference

# Seconds for the removal of fetched files at the end of a call.
FORGET_SECONDS = 10.0


class NotDivisible(Exception):
    """The work on a file of the model needs more than that file, so the server does it itself."""


class HasSize(Protocol):
    """Work on a file."""

    @property
    def size(self) -> int:
        """Bytes of the file."""


Sized = TypeVar("Sized", bound=HasSize)


@dataclass(frozen=True)
class DividedModel:
    """A model in files.

    Attributes:
        cluster: Does the work.
        references: The files, without the index.
        state_dict: Of all files, without data.
        catalogs: Of each file.
        size: Bytes of all files.
        check_unchanged: Raises an error if a file has changed since it was opened.
    """

    cluster: Cluster
    references: Sequence[Reference]
    state_dict: StateDict
    catalogs: Sequence[Catalog]
    size: int
    check_unchanged: Callable[[], None]

    @property
    def catalog(self) -> Catalog:
        """Of the whole model."""
        return self.state_dict.catalog

    def divide(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """Divides names of parameters among the files, in their order."""
        return [
            tuple(name for name in names if name in catalog.prunable) for catalog in self.catalogs
        ]


@contextmanager
def divided_model(sources: Sources, cluster: Cluster, call: Call[Any]) -> Iterator[DividedModel]:
    """Opens the model of a URI for a block.

    Raises:
        NotDivisible: A pair, or the names of a tensor, are in several files; or the call carries
            data.
        RequestError: The model cannot be opened.
    """
    header = call.header
    if header.WhichOneof("source") != "uri" or header.data_bytes:
        raise NotDivisible
    with sources.references(call) as model, ExitStack() as closing:
        works = [FileWork(reference) for reference in model.references]
        if model.remote_bytes:
            closing.callback(_forget, cluster, works)
        if model.remote_bytes:
            heads = worked(call.context, cluster, "fetch", read_head, works)
        else:
            heads = cluster.map(call.context, read_head, works)
        shards = [
            Shard(reference.filename, head.entries, head.metadata)
            for reference, head in zip(model.references, heads, strict=True)
        ]
        state_dict = StateDict(shards, {}, read_index_of(model.index, shards), is_mapped=True)
        catalogs = _catalogs(shards, state_dict.catalog)
        check = model.check_unchanged
        yield DividedModel(cluster, model.references, state_dict, catalogs, model.size, check)


def _forget(cluster: Cluster, works: list[FileWork]) -> None:
    """Removes what tasks have fetched, also after a cancellation; as far as nodes answer."""
    context = RequestContext(deadline=time.monotonic() + FORGET_SECONDS)
    with suppress(RequestError):
        cluster.map(context, forget_file, works)


def _catalogs(shards: Sequence[Shard], whole: Catalog) -> list[Catalog]:
    """The catalog of each file. Raises NotDivisible if they do not make up that of the whole."""
    try:
        catalogs = [StateDict([shard], {}).catalog for shard in shards]
    except InvalidStateDict:
        raise NotDivisible from None
    for of in ("prunable", "pairs", "other_names"):
        parts: dict[str, object] = {}
        for catalog in catalogs:
            parts.update(getattr(catalog, of))
        if parts != getattr(whole, of):
            raise NotDivisible
    return catalogs


def worked(
    context: RequestContext,
    cluster: Cluster,
    phase: str,
    task: Task[Sized, Found],
    pieces: list[Sized],
) -> list[Found]:
    """Does a task for each of some files, as a phase of the request.

    Returns:
        The results, in the order of the files.
    """
    context.begin(phase, sum(piece.size for piece in pieces))
    found: dict[int, Found] = {}
    for index, result in cluster.as_finished(context, task, pieces):
        found[index] = result
        context.advance(pieces[index].size)
    return [found[index] for index in range(len(pieces))]
