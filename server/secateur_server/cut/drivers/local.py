"""Pieces in the memory of this process, or of its GPU."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from secateur_server.backends.protocol import Backend
from secateur_server.runtime.context import Found, Item, RequestContext


@dataclass(frozen=True)
class Local:
    """Works in the threads of a backend."""

    backend: Backend

    def map(
        self, context: RequestContext, function: Callable[[Item], Found], pieces: Iterable[Item]
    ) -> list[Found]:
        return self.backend.map(context, function, pieces)
