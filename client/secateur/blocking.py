"""The transport of `Client`: its coroutines block, and never suspend."""

import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import grpc

from secateur.calls.transport import Answers, Requests
from secateur.channel import Metadata, Rpc, Rpcs, closed
from secateur.errors import from_rpc

P = ParamSpec("P")
T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine that does not suspend, and returns its result."""
    try:
        work.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise RuntimeError("a coroutine of the blocking client suspended")


class BlockingTransport:
    """A Transport on a grpc.Channel. See the protocol.

    Args:
        channel: The channel.
        metadata: Sent with every call.
        is_own: Whether `close` closes the channel.
    """

    def __init__(self, channel: grpc.Channel, metadata: Metadata, is_own: bool) -> None:
        self.rpcs = Rpcs(channel, metadata)
        self._channel, self._is_own = channel, is_own

    async def ask(
        self, rpc: Rpc, request: Any, timeout: float | None, wait_for_ready: bool | None = None
    ) -> Any:
        with _failures():
            return _start(rpc, rpc.start, request, timeout, wait_for_ready)

    async def send(self, rpc: Rpc, requests: Requests, timeout: float | None) -> Any:
        call = _start(rpc, rpc.start.future, _each(requests), timeout)
        with _failures(requests, call):
            return call.result()

    @contextmanager
    def stream(self, rpc: Rpc, request: Any, timeout: float | None) -> Iterator[Answers]:
        requests = request if isinstance(request, Requests) else None
        call = _start(rpc, rpc.start, _each(requests) if requests else request, timeout)
        with _failures(requests, call):
            yield _Answers(call)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return function(*args, **kwargs)

    async def write(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return function(*args, **kwargs)

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    async def is_ready(self, seconds: float) -> bool:
        try:
            grpc.channel_ready_future(self._channel).result(seconds)
        except grpc.FutureTimeoutError:
            return False
        return True

    async def close(self) -> None:
        if self._is_own:
            self._channel.close()


class _Answers:
    def __init__(self, messages: Iterator[Any]) -> None:
        self._messages = messages

    async def read(self) -> Any:
        return next(self._messages, None)


def _start(
    rpc: Rpc, start: Any, request: Any, timeout: float | None, wait_for_ready: bool | None = None
) -> Any:
    """Starts a call of an rpc by one of gRPC's callables."""
    try:
        return start(request, timeout=timeout, metadata=rpc.metadata, wait_for_ready=wait_for_ready)
    except ValueError as error:
        raise closed(error) from error


def _each(requests: Requests) -> Iterator[Any]:
    with requests.keeping_error():
        for message, count in requests.messages:
            yield message
            requests.sent(count)


@contextmanager
def _failures(requests: Requests | None = None, call: Any = None) -> Iterator[None]:
    """Raises a failed call's error as a SecateurError, and cancels a call that is not finished."""
    try:
        yield
    except grpc.RpcError as error:
        raise (requests and requests.error) or from_rpc(error) from None
    finally:
        if call is not None:
            call.cancel()
