"""Calls to a server: they are made again where that may help, and failures are explained."""

import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from secateur.address import parse_address
from secateur.calls.patience import Patience
from secateur.calls.transfer import Received, Receiver, Upload
from secateur.calls.transport import Requests, Transport
from secateur.channel import Metadata, Rpc, Tls, read_tls
from secateur.checks import shown, timeout_of
from secateur.diagnosis import Target, explained
from secateur.errors import DeadlineExceeded, SecateurError, Unavailable
from secateur.progress import Progress, noting_waits, show_progress, show_work

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Call:
    """A call that sends a model, or names one on the server.

    Attributes:
        rpc: The server's rpc.
        header: The header of the first request.
        upload: The data of the requests.
        progress: See `Client`.
        patience: The time for the call.
    """

    rpc: Rpc
    header: Any
    upload: Upload
    progress: Progress
    patience: Patience

    @property
    def is_sent(self) -> bool:
        """Whether the model is sent."""
        return self.header.WhichOneof("source") is None

    @property
    def is_safe(self) -> bool:
        """Whether a second call changes nothing more on the server."""
        return not getattr(self.header, "keep", False)

    def requests(self, sending: Callable[[int], None]) -> Requests:
        """Returns the requests; `sending` is called with the bytes of each."""
        return Requests(self.upload.messages(self.rpc.request, self.header), sending)


class Connection:
    """A connection to a server.

    Attributes:
        transport: Makes the calls.
        is_known: Whether the server has ever answered.
    """

    def __init__(
        self, transport: Transport, timeout: float | None = None, target: Target | None = None
    ) -> None:
        """Calls on a transport.

        Args:
            transport: It is closed with the connection.
            timeout: Seconds for each call of a client's method; None is no limit.
            target: What the transport connects to; None if the caller gave the channel.
        """
        self.transport = transport
        self.is_known = False
        self._timeout, self._target = timeout, target
        self._is_closed = False

    def patience(self) -> Patience:
        """Starts the time of one call of a method."""
        return Patience(self._timeout)

    async def measure(self, call: Call) -> Any:
        """Makes a call, and returns its answer, which is one message."""
        # Such an rpc sends no progress, so a model on the server has nothing to show.
        progress = call.progress if call.is_sent else False

        async def attempt(left: float | None) -> Any:
            with show_progress(progress, call.upload.file_bytes) as sending:
                return await self.transport.send(call.rpc, call.requests(sending), left)

        return await self.until_served(attempt, call.patience)

    async def transform(self, call: Call, is_small: bool = False) -> tuple[Any, Received]:
        """Makes a call, and returns the result and the tensors that its answer streams.

        Args:
            call: The call.
            is_small: Whether it has one message each way: gRPC is faster if it knows that.
        """

        async def attempt(left: float | None) -> tuple[Any, Received]:
            with _shown(call) as (sending, working):
                requests, receiver = call.requests(sending), Receiver(working)
                if is_small:
                    request, _ = next(requests.messages)
                    receiver.take(await self.transport.ask(call.rpc, request, left))
                else:
                    with self.transport.stream(call.rpc, requests, left) as answers:
                        while (message := await answers.read()) is not None:
                            receiver.take(message)
                return await self.transport.run(receiver.finish)

        return await self.until_served(attempt, call.patience, call.is_safe)

    async def ask(
        self, rpc: Rpc, request: Any, patience: Patience | None = None, is_safe: bool = True
    ) -> Any:
        """Makes a call with one request, and returns its answer, which is one message.

        Args:
            rpc: Called with the request.
            request: A message.
            patience: The time for the call; None starts it.
            is_safe: See `until_served`.
        """

        async def attempt(left: float | None) -> Any:
            if rpc.is_streamed:
                return await self.transport.send(rpc, Requests([(request, 0)]), left)
            return await self.transport.ask(rpc, request, left)

        return await self.until_served(attempt, patience or self.patience(), is_safe)

    async def until_served(
        self,
        attempt: Callable[[float | None], Awaitable[Answer]],
        patience: Patience,
        is_safe: bool = True,
    ) -> Answer:
        """Repeats a call while the server is busy, and after the connection broke.

        Args:
            attempt: Makes the call; its argument is the remaining seconds.
            patience: The time for all calls.
            is_safe: Whether the call may be repeated if it may have been served.

        Raises:
            SecateurError: The error of the last try, explained.
        """

        def is_passing(error: SecateurError) -> bool:  # else no connection broke
            return self.is_known and is_safe and isinstance(error, Unavailable)

        repeated = self.repeat(lambda: attempt(patience.left()), patience, is_passing)
        answer = await self.explaining(repeated)
        self.is_known = True
        return answer

    async def repeat(
        self,
        attempt: Callable[[], Awaitable[Answer]],
        patience: Patience,
        is_passing: Callable[[SecateurError], bool],
    ) -> Answer:
        """Repeats an attempt until it succeeds, or until it is time to give up.

        Args:
            attempt: Makes the calls. It sets `patience.tries` to 0 when there is progress.
            patience: The time for all calls.
            is_passing: Whether the attempt may succeed after an error.

        Raises:
            SecateurError: The error of the last try.
        """
        patience.tries = 0
        while True:
            try:
                return await attempt()
            except SecateurError as error:
                pause = patience.pause_after(error, is_passing)
                if pause is None:
                    raise
            await self.transport.sleep(pause)

    async def explaining(self, work: Awaitable[Answer]) -> Answer:
        """Awaits calls, and adds advice to an error of a call that reached no server."""
        try:
            return await work
        except (Unavailable, DeadlineExceeded) as error:
            # A probe of the address blocks.
            with_advice = await self.transport.run(
                explained, error, self._target, self._timeout, self.is_known
            )
            if with_advice is error:
                raise
            raise with_advice from error

    async def wait_until_ready(self, timeout: float) -> None:
        """See Client.wait_until_ready."""
        if self._is_closed:
            raise SecateurError("the client is closed: make a new one")
        await self.explaining(self._wait(timeout_of(timeout) or 0.0))

    async def _wait(self, seconds: float) -> None:
        if not await self.transport.is_ready(seconds):
            raise Unavailable(f"no server answers after {seconds:g} seconds")

    async def close(self) -> None:
        """See Client.close."""
        self._is_closed = True
        await self.transport.close()


@dataclass(frozen=True)
class Settings:
    """What the arguments of a client say.

    Attributes:
        target: The server; None if the caller gave a channel.
        credentials: For TLS; None is plaintext.
        metadata: Sent with every call.
        timeout: Seconds for each call of a method; None is no limit.
    """

    target: Target | None
    credentials: grpc.ChannelCredentials | None
    metadata: Metadata
    timeout: float | None


def settings_of(
    address: str | None,
    token: str | None,
    tls: Tls,
    timeout: float | None,
    has_channel: bool,
    insecure: bool,
) -> Settings:
    """Checks the arguments of `Client`.

    Raises:
        SecateurError: An argument is wrong.
    """
    if not has_channel and address is None:
        address, token, tls = _from_environment(token, tls)
    seconds, metadata = timeout_of(timeout), _authorization(token)
    if has_channel:
        return Settings(None, None, metadata, seconds)
    credentials = read_tls(tls)
    target = Target(parse_address(address), has_tls=credentials is not None)
    _check_secrecy(target, token, insecure)
    return Settings(target, credentials, metadata, seconds)


def check_channel(channel: Any, kind: type, name: str) -> None:
    """Raises a SecateurError for a channel that is not of a kind, which `name` names."""
    if not (channel is None or isinstance(channel, kind)):
        raise SecateurError(f"channel={shown(channel)} is not a {name}")


def _from_environment(token: str | None, tls: Tls) -> tuple[str, str | None, Tls]:
    """The address, the token and the tls, from variables where they are not given."""
    address = os.environ.get("SECATEUR_SERVER")
    if not address:
        raise SecateurError("give an address, or a channel, or set SECATEUR_SERVER")
    token = os.environ.get("SECATEUR_TOKEN") if token is None else token
    return address, token, os.environ.get("SECATEUR_TLS_CA") or None if tls is None else tls


def _authorization(token: Any) -> Metadata:
    """The metadata of every call. An error does not repeat the token."""
    if token is None or (isinstance(token, str) and not token):
        return ()
    if not isinstance(token, str) or not (token.isascii() and token.isprintable()):
        raise SecateurError("token: it is not a line of printable ASCII characters")
    return (("authorization", f"Bearer {token}"),)


def _check_secrecy(target: Target, token: str | None, insecure: bool) -> None:
    """Refuses to send a token over a network in plaintext."""
    if token and not (target.has_tls or target.address.is_local or insecure):
        raise SecateurError(
            f"token: it would be sent to {target.address.text} without encryption; use tls=True or "
            "tls=CA_FILE (--tls or --tls-ca), or insecure=True (--insecure) on a safe network"
        )


@contextmanager
def _shown(call: Call) -> Iterator[tuple[Callable[[int], None], Callable[[Any], None]]]:
    """Yields functions to call with the bytes of each request, and with each progress message."""
    if call.is_sent:
        with show_progress(call.progress, call.upload.file_bytes) as sending:
            yield sending, _ignore
    else:
        with show_work(call.progress) as shown, noting_waits(shown) as working:
            yield _ignore, working


def _ignore(step: Any) -> None:
    pass
