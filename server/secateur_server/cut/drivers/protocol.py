"""What a driver does, and what it is given."""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from secateur_server.backends.protocol import Backend
from secateur_server.runtime.context import Found, Item, RequestContext

# A function of a module, or a partial of one, so that it can be pickled, as can its piece and its
# result. It changes nothing that it is given. It takes the request, the array operations where the
# piece is, and the piece. In another process the request is one that nobody cancels.
Task = Callable[[RequestContext, Backend, Item], Found]


class Driver(Protocol):
    """Runs tasks where the pieces live."""

    @property
    def backend(self) -> Backend:
        """The array operations of this process, for the results of tasks."""

    @property
    def threads(self) -> int:
        """How many pieces `map` works on at once."""

    def map(
        self, context: RequestContext, task: Task[Item, Found], pieces: Iterable[Item]
    ) -> list[Found]:
        """Applies a task to each piece.

        Returns:
            The results, in order. The caller may write to them.

        Raises:
            Cancelled, DeadlineExceeded: The request is to end.
        """


class Cluster(Driver, Protocol):
    """A driver whose pieces may be on other machines."""

    def as_finished(
        self, context: RequestContext, task: Task[Item, Found], pieces: list[Item]
    ) -> Iterator[tuple[int, Found]]:
        """Does what `map` does, and yields the index of each piece and its result, as they come.

        Raises:
            Cancelled, DeadlineExceeded: The request is to end. Its tasks end too.
            RequestError: A task raised it, that of the first piece; or the cluster failed.
        """
