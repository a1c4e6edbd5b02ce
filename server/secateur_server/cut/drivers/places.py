"""Pieces of a cluster by their places: a task works on all those of a place, one after another."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from secateur_server.backends.protocol import Backend
from secateur_server.cut.drivers.protocol import Cluster, Task
from secateur_server.runtime.context import Found, Item, RequestContext


@dataclass(frozen=True)
class _Together:
    """The pieces of a place."""

    place: object
    pieces: Sequence[Any]


@dataclass(frozen=True)
class ByPlace:
    """A driver for many pieces in few places of a cluster. Pieces have a `place`, as Observed."""

    cluster: Cluster

    @property
    def backend(self) -> Backend:
        return self.cluster.backend

    @property
    def threads(self) -> int:
        return self.cluster.threads

    def map(
        self, context: RequestContext, task: Task[Item, Found], pieces: Iterable[Item]
    ) -> list[Found]:
        by_place: dict[object, list[tuple[int, Item]]] = defaultdict(list)
        for index, piece in enumerate(pieces):
            by_place[getattr(piece, "place", None)].append((index, piece))
        groups = [_Together(place, [p for _, p in of]) for place, of in by_place.items()]
        results = self.cluster.map(context, partial(_each, task=task), groups)
        found = {
            index: result
            for of, some in zip(by_place.values(), results, strict=True)
            for (index, _), result in zip(of, some, strict=True)
        }
        return [found[index] for index in range(len(found))]


def _each(
    context: RequestContext, backend: Backend, together: _Together, task: Task[Any, Found]
) -> list[Found]:
    return [task(context, backend, piece) for piece in context.each(together.pieces)]
