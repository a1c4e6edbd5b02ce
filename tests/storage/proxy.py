"""A network that fails: a proxy in front of a server, which cuts connections on request."""

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

READ_BYTES = 1 << 16


class Proxy:
    """Carries bytes to and from a server, and cuts the first connections.

    Args:
        target: The address of the server.
        cuts: After how many bytes to cut the first connection, the second, and so on.
        is_back: Whether these are bytes of the answers, or else of the requests.

    Attributes:
        carried: How many of these bytes all connections have carried.
    """

    def __init__(self, target: str, cuts: Sequence[int], is_back: bool) -> None:
        self.target = target
        self.carried = 0
        self._is_back = is_back
        self.connections = 0
        self._cuts = list(cuts)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def _accept(self) -> None:
        with suppress(OSError):  # the listener is closed
            while True:
                caller, _ = self._listener.accept()
                self.connections += 1
                most = self._cuts.pop(0) if self._cuts else None
                threading.Thread(target=self._carry, args=(caller, most), daemon=True).start()

    def _carry(self, caller: socket.socket, most: int | None) -> None:
        host, _, port = self.target.rpartition(":")
        try:
            server = socket.create_connection((host, int(port)))
        except OSError:  # the server does not run
            caller.close()
            return
        ways = [(server, caller), (caller, server)]
        other, counted = ways if not self._is_back else ways[::-1]
        back = threading.Thread(target=_pump, args=other, daemon=True)
        back.start()
        with caller, server, suppress(OSError):
            self._forward(*counted, most)
            for end in (caller, server):
                end.shutdown(socket.SHUT_RDWR)
            back.join()

    def _forward(self, source: socket.socket, target: socket.socket, most: int | None) -> None:
        done = 0
        while (most is None or done < most) and (data := source.recv(READ_BYTES)):
            target.sendall(data)
            done += len(data)
            self.carried += len(data)

    def close(self) -> None:
        """Accepts no more connections."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(READ_BYTES):
            target.sendall(data)
        target.shutdown(socket.SHUT_RDWR)


@contextmanager
def proxy(target: str, *cuts: int, is_back: bool = False) -> Iterator[Proxy]:
    """Runs a proxy in front of the server at `target`."""
    running = Proxy(target, cuts, is_back)
    try:
        yield running
    finally:
        running.close()
