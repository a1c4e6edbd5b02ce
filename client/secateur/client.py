"""The client: sends a model to a server, and returns the server's result."""

from types import TracebackType
from typing import Any, Self

import grpc

from secateur.blocking import BlockingTransport, run
from secateur.calls.connection import Connection, check_channel, settings_of
from secateur.calls.pruning import AsyncPrunerCalls
from secateur.channel import Tls, open_channel
from secateur.pruner_calls import PrunerCalls


class Client(PrunerCalls):
    """A connection to a server. Safe to use from several threads.

    Within the timeout, the client repeats calls that a busy server rejects, after the delay that
    the server asks for, and resumes calls that a broken connection ended.

    Several methods have these arguments:

    - `source`: A torch.nn.Module; a mapping of tensors or arrays; the path of a .safetensors, an
      .onnx or a torch file, or of a model in shards: its index, or the folder; a Checkpoint; or a
      URI, which the server opens.
    - `key`: Where the state_dict is in a torch file that holds several mappings of tensors, such as
      "ema.model"; None finds the only one.
    - `progress`: None shows a bar on a terminal or in a notebook, True always, False never. A
      function is called with the bytes sent and their total, or, while the server works, with parts
      of 1000.

    Args:
        address: HOST:PORT or unix:PATH; None is $SECATEUR_SERVER, and then $SECATEUR_TOKEN and
            $SECATEUR_TLS_CA replace a token and a tls that are not given.
        token: Sent with every call.
        tls: True, the path of a PEM file of authorities to trust, or gRPC's credentials.
        timeout: Seconds for each call of a method, however many requests it makes; each page of
            checkpoints() has its own.
        channel: To use in place of an address; it is left open.
        insecure: Whether a token may be sent to another machine without TLS.

    Raises:
        SecateurError: As every method does; secateur.errors lists the kinds.
    """

    def __init__(
        self,
        address: str | None = None,
        token: str | None = None,
        tls: Tls = None,
        timeout: float | None = None,
        channel: grpc.Channel | None = None,
        insecure: bool = False,
    ) -> None:
        settings = settings_of(address, token, tls, timeout, channel is not None, insecure)
        check_channel(channel, grpc.Channel, "grpc.Channel")
        target = settings.target
        opened: Any = open_channel(grpc, target, settings.credentials) if target else channel
        transport = BlockingTransport(opened, settings.metadata, is_own=target is not None)
        self._connection = Connection(transport, settings.timeout, target)
        super().__init__(AsyncPrunerCalls(self._connection))

    def wait_until_ready(self, timeout: float = 60.0) -> None:
        """Waits until the server accepts connections: for a client that starts with the server.

        Args:
            timeout: Seconds.

        Raises:
            Unavailable: The server does not accept connections in that time.
        """
        run(self._connection.wait_until_ready(timeout))

    def close(self) -> None:
        """Closes the connection."""
        run(self._connection.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()
