"""Calls to a server: they are made again where that may help, and failures are explained."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from secateur.address import parse_address
from secateur.channel import Metadata, Rpc, Rpcs, Tls, open_channel, read_tls
from secateur.checks import shown, timeout_of
from secateur.diagnosis import Target, diagnosing
from secateur.errors import SecateurError, Unavailable
from secateur.patience import Answer, Patience
from secateur.progress import Progress, noting_waits, show_progress, show_work
from secateur.transfer import Received, Upload, errors_of, receive


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

    def messages(self, sending: Callable[[int], None]) -> Iterator[Any]:
        """Yields the requests; `sending` is called with the bytes of each."""
        return self.upload.messages(self.rpc.request, self.header, sending)


class Connection:
    """A connection to a server.

    Attributes:
        rpcs: The server's rpcs.
        timeout: Seconds for each call of a client's method; None is no limit.
        is_known: Whether the server has ever answered.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        metadata: Metadata,
        timeout: float | None,
        target: Target | None,
    ) -> None:
        """Calls on a channel.

        Args:
            channel: It is closed with the connection if `target` is given.
            metadata: Sent with every call.
            timeout: Seconds.
            target: What the channel connects to; None if the caller gave the channel.
        """
        self.rpcs = Rpcs(channel, metadata)
        self.timeout = timeout
        self.is_known = False
        self._channel, self._target = channel, target
        self._is_closed = False

    def patience(self) -> Patience:
        """Starts the time of one call of a method."""
        return Patience(self.timeout)

    def measure(self, call: Call) -> Any:
        """Makes a call, and returns its answer, which is one message."""
        # Such an rpc sends no progress, so a model on the server has nothing to show.
        progress = call.progress if call.is_sent else False

        def attempt(left: float | None) -> Any:
            with show_progress(progress, call.upload.file_bytes) as sending:
                answer = call.rpc.future(call.messages(sending), timeout=left)
                with errors_of(call.upload, answer):
                    return answer.result()

        return self.until_served(attempt, call.patience)

    def transform(self, call: Call, is_small: bool = False) -> tuple[Any, Received]:
        """Makes a call, and returns the result and the tensors that its answer streams.

        Args:
            call: The call.
            is_small: Whether it has one message each way: gRPC is faster if it knows that.
        """

        def attempt(left: float | None) -> tuple[Any, Received]:
            with _shown(call) as (sending, working):
                messages = call.messages(sending)
                if is_small:
                    with errors_of(None):
                        return receive([call.rpc(next(messages), timeout=left)])
                answer = call.rpc(messages, timeout=left)
                with errors_of(call.upload, answer):
                    return receive(answer, working)

        return self.until_served(attempt, call.patience, call.is_safe)

    def ask(
        self, rpc: Rpc, request: Any, patience: Patience | None = None, is_safe: bool = True
    ) -> Any:
        """Makes a call with one request that is not a stream's header.

        Args:
            rpc: Called with the request.
            request: A message, or a list of messages.
            patience: The time for the call; None starts it.
            is_safe: See `until_served`.
        """

        def attempt(left: float | None) -> Any:
            with errors_of(None):
                return rpc(iter(request) if isinstance(request, list) else request, timeout=left)

        return self.until_served(attempt, patience or self.patience(), is_safe)

    def until_served(
        self,
        attempt: Callable[[float | None], Answer],
        patience: Patience,
        is_safe: bool = True,
    ) -> Answer:
        """Does Patience.until_served, and explains failures."""
        with self.diagnosing():
            answer = patience.until_served(attempt, self.is_known, is_safe)
        self.is_known = True
        return answer

    def diagnosing(self) -> AbstractContextManager[None]:
        """Explains failures of the block, as `diagnosing`."""
        return diagnosing(self._target, self.timeout, self.is_known)

    def wait_until_ready(self, timeout: float) -> None:
        """See Client.wait_until_ready."""
        if self._is_closed:
            raise SecateurError("the client is closed: make a new one")
        seconds = timeout_of(timeout)
        try:
            grpc.channel_ready_future(self._channel).result(seconds)
        except grpc.FutureTimeoutError:
            with self.diagnosing():
                raise Unavailable(f"no server answers after {timeout:g} seconds") from None

    def close(self) -> None:
        """See Client.close."""
        self._is_closed = True
        if self._target is not None:
            self._channel.close()


def connect(
    address: str | None,
    token: str | None,
    tls: Tls,
    timeout: float | None,
    channel: grpc.Channel | None,
    insecure: bool,
) -> Connection:
    """Connects to a server; the arguments are those of `Client`.

    Raises:
        SecateurError: An argument is wrong.
    """
    if channel is None and address is None:
        address, token, tls = _from_environment(token, tls)
    seconds, metadata = timeout_of(timeout), _authorization(token)
    if channel is None:
        credentials = read_tls(tls)
        target = Target(parse_address(address), has_tls=credentials is not None)
        _check_secrecy(target, token, insecure)
        return Connection(open_channel(target, credentials), metadata, seconds, target)
    if not isinstance(channel, grpc.Channel):
        raise SecateurError(f"channel={shown(channel)} is not a grpc.Channel")
    return Connection(channel, metadata, seconds, None)


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
