"""What a client's methods need of gRPC, time and threads; `blocking` and `aio` implement it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ParamSpec, Protocol, TypeVar

from secateur.channel import Rpc, Rpcs

P = ParamSpec("P")
T = TypeVar("T")


class Requests:
    """The request messages of one call.

    Attributes:
        messages: Each message, and the bytes of the model in it.
        error: The error of making a message, or of `sending`. gRPC makes messages in a thread or
            task of its own, and hides their errors.
    """

    def __init__(
        self,
        messages: Iterable[tuple[Any, int]],
        sending: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Requests of some messages.

        Args:
            messages: See there.
            sending: Called with the bytes of a message after gRPC has taken it.
        """
        self.messages, self._sending = iter(messages), sending
        self.error: BaseException | None = None

    def sent(self, count: int) -> None:
        """Calls `sending`."""
        try:
            self._sending(count)
        except BaseException as error:
            self.error = error
            # gRPC's thread would not survive a SystemExit, nor end the call.
            raise RuntimeError("progress failed") from error

    @contextmanager
    def keeping_error(self) -> Iterator[None]:
        """Keeps an error of the block in `error`."""
        try:
            yield
        except Exception as error:
            self.error = self.error or error
            raise


class Answers(Protocol):
    """The messages that the server streams."""

    async def read(self) -> Any:
        """Returns the next message; None after the last."""


class Transport(Protocol):
    """All input and output of a client.

    Its coroutines raise a failed call as a SecateurError. Those of `blocking` never suspend.
    """

    @property
    def rpcs(self) -> Rpcs:
        """The server's rpcs."""

    async def ask(
        self, rpc: Rpc, request: Any, timeout: float | None, wait_for_ready: bool | None = None
    ) -> Any:
        """Sends one message, and returns the answer, which is one message."""

    async def send(self, rpc: Rpc, requests: Requests, timeout: float | None) -> Any:
        """Sends a stream, and returns the answer, which is one message."""

    def stream(
        self, rpc: Rpc, request: Any, timeout: float | None
    ) -> AbstractContextManager[Answers]:
        """Sends a message or Requests; the block reads the answer. Its end cancels the call."""

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls a function that reads or computes, and changes nothing outside its result."""

    async def write(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls a function that writes files; also a cancelled task waits for its end."""

    async def sleep(self, seconds: float) -> None:
        """Waits."""

    async def is_ready(self, seconds: float) -> bool:
        """Waits until the server accepts connections; False if it does not in that time."""

    async def close(self) -> None:
        """Closes the channel, unless it is the caller's."""
