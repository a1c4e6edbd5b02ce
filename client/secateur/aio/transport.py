"""The transport of `aio.Client`: grpc.aio, and threads of asyncio for work that blocks."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, ParamSpec, TypeVar

import grpc

from secateur.blocking import run
from secateur.calls.transport import Answers, Requests
from secateur.channel import Metadata, Rpc, Rpcs, closed
from secateur.errors import Cancelled, SecateurError, from_rpc

P = ParamSpec("P")
T = TypeVar("T")

# gRPC's own words, in the error of the blocking client.
_CLOSED = "Channel closed!"
# If a message is written after a call has ended, gRPC replaces the server's status by one with
# these details: https://github.com/grpc/grpc/issues/36066. The first status is the server's.
_WRITE_FAILED = "Internal error from Core"


class _Opened(NamedTuple):
    """A channel, and where it was opened: gRPC ties it to an event loop."""

    channel: Any
    rpcs: Rpcs
    loop: asyncio.AbstractEventLoop
    process: int


class AsyncTransport:
    """A Transport on a grpc.aio.Channel. See the protocol.

    Args:
        open_channel: Returns the channel; it is called in the loop of the first call.
        metadata: Sent with every call.
        is_own: Whether `close` closes the channel.
    """

    def __init__(
        self, open_channel: Callable[[], grpc.aio.Channel], metadata: Metadata, is_own: bool
    ) -> None:
        self._open_channel, self._metadata, self._is_own = open_channel, metadata, is_own
        self._opened: _Opened | None = None
        self._is_closed = False

    @property
    def rpcs(self) -> Rpcs:
        return self._here().rpcs

    async def ask(
        self, rpc: Rpc, request: Any, timeout: float | None, wait_for_ready: bool | None = None
    ) -> Any:
        call = _start(rpc, request, timeout, wait_for_ready)
        with _failures(call):
            return await _answered(call)

    async def send(self, rpc: Rpc, requests: Requests, timeout: float | None) -> Any:
        call = _start(rpc, _Messages(requests), timeout)
        with _failures(call, requests):
            return await _answered(call, requests)

    @contextmanager
    def stream(self, rpc: Rpc, request: Any, timeout: float | None) -> Iterator[Answers]:
        requests = request if isinstance(request, Requests) else None
        call = _start(rpc, _Messages(requests) if requests else request, timeout)
        with _failures(call, requests):
            yield _Answers(call, requests)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        self._here()
        return await asyncio.to_thread(function, *args, **kwargs)

    async def write(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        work = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.gather(work, return_exceptions=True)
            raise

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def is_ready(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._here().channel.channel_ready()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        self._is_closed = self._is_own
        if self._opened and self._is_own:
            await self._here(is_closing=True).channel.close()

    def _here(self, is_closing: bool = False) -> _Opened:
        """The channel, opened in the running loop.

        Raises:
            SecateurError: The client is closed, or used where it cannot be.
        """
        if self._is_closed and not is_closing:
            raise SecateurError("the client is closed: make a new one")
        try:
            loop, process = asyncio.get_running_loop(), os.getpid()
        except RuntimeError:
            raise SecateurError(
                "secateur.aio needs a running event loop of asyncio; without one use "
                "secateur.Client"
            ) from None
        if self._opened is None:
            channel = self._open_channel()
            self._opened = _Opened(channel, Rpcs(channel, self._metadata), loop, process)
        if (self._opened.loop, self._opened.process) != (loop, process):
            raise SecateurError(
                "the client belongs to another event loop or process: make a client in each"
            )
        return self._opened


class _Messages:
    """The messages of Requests, made in a thread; gRPC iterates over them."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._taken: int | None = None

    def __aiter__(self) -> "_Messages":
        return self

    async def __anext__(self) -> Any:
        with self._requests.keeping_error():
            if self._taken is not None:
                self._requests.sent(self._taken)
            made = await asyncio.to_thread(next, self._requests.messages, None)
        if made is None:
            raise StopAsyncIteration
        message, self._taken = made
        return message


class _Answers:
    def __init__(self, call: Any, requests: Requests | None) -> None:
        self._call, self._requests = call, requests

    async def read(self) -> Any:
        message = await _answered(self._call.read(), self._requests)
        return None if message is grpc.aio.EOF else message


def _start(
    rpc: Rpc, request: Any, timeout: float | None, wait_for_ready: bool | None = None
) -> Any:
    """Starts a call of an rpc."""
    try:
        return rpc.start(
            request, timeout=timeout, metadata=rpc.metadata, wait_for_ready=wait_for_ready
        )
    except grpc.aio.UsageError as error:
        raise closed(error) from error


async def _answered(answer: Awaitable[Any], requests: Requests | None = None) -> Any:
    """Awaits a message of the server."""
    try:
        return await answer
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        # gRPC cancelled the call: a message could not be made, or the channel was closed.
        raise (requests and requests.error) or Cancelled(_CLOSED) from None


@contextmanager
def _failures(call: Any, requests: Requests | None = None) -> Iterator[None]:
    """Raises a failed call's error as a SecateurError, and cancels a call that is not finished."""
    statuses: list[grpc.aio.AioRpcError] = []
    call.add_done_callback(lambda done: statuses.append(_status_of(done)))
    try:
        yield
    except grpc.aio.AioRpcError as error:
        is_lost = error.details() == _WRITE_FAILED and statuses
        found = statuses[0] if is_lost else error
        raise (requests and requests.error) or from_rpc(found) from None
    finally:
        call.cancel()


def _status_of(call: Any) -> grpc.aio.AioRpcError:
    """The status of a finished call, whose coroutines do not suspend."""
    code, details, trailing = run(call.code()), run(call.details()), run(call.trailing_metadata())
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details)
