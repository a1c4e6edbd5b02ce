"""The client for asyncio."""

from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self

import grpc

from secateur.aio.transport import AsyncTransport
from secateur.calls.connection import Connection, check_channel, settings_of
from secateur.calls.pruning import AsyncPrunerCalls
from secateur.channel import Tls, open_channel
from secateur.checkpoint import Checkpoint


class Client(AsyncPrunerCalls):
    """A connection to a server, for asyncio: the methods of `secateur.Client` as coroutines.

    It belongs to the event loop in which it is first used, and serves any number of calls there at
    once. Threads of asyncio read, hash and decode models; functions of the caller, such as
    `progress`, are called in the loop. A cancelled call ends at the server too.

    Args:
        address: As those of `secateur.Client` are all arguments but `channel`.
        token: See there.
        tls: See there.
        timeout: See there.
        channel: A grpc.aio.Channel, to use in place of an address; it is left open.
        insecure: See there.

    Raises:
        SecateurError: As every method does; secateur.errors lists the kinds.
    """

    def __init__(
        self,
        address: str | None = None,
        token: str | None = None,
        tls: Tls = None,
        timeout: float | None = None,
        channel: grpc.aio.Channel | None = None,
        insecure: bool = False,
    ) -> None:
        settings = settings_of(address, token, tls, timeout, channel is not None, insecure)
        check_channel(channel, grpc.aio.Channel, "grpc.aio.Channel")
        target, credentials = settings.target, settings.credentials

        def opened() -> Any:
            return open_channel(grpc.aio, target, credentials) if target else channel

        transport = AsyncTransport(opened, settings.metadata, is_own=target is not None)
        super().__init__(Connection(transport, settings.timeout, target))

    async def checkpoints(self) -> AsyncIterator[Checkpoint]:
        """See `secateur.Client.checkpoints`: `async for checkpoint in client.checkpoints()`."""
        token: str | None = ""
        while token is not None:
            page, following = await self._page(token)
            for checkpoint in page:
                yield checkpoint
            token = following or None

    async def wait_until_ready(self, timeout: float = 60.0) -> None:
        """See `secateur.Client.wait_until_ready`."""
        await self._connection.wait_until_ready(timeout)

    async def close(self) -> None:
        """Closes the connection, and fails the calls on it."""
        await self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        await self.close()
