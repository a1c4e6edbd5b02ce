"""A network that fails at random, in both directions: cut, delayed and slow."""

import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from tests.storage.proxy import READ_BYTES

# The mean number of bytes between two faults of one direction.
MEAN_BYTES = 4 << 20
# The receive buffer of a socket. It is small, so that a slow network slows the sender.
SOCKET_BYTES = 1 << 18
# How many bytes a slow network carries at once.
FEW_BYTES = 4096
ENDS = ("cut", "reset")


@dataclass(frozen=True)
class Fault:
    """A fault of one direction.

    Attributes:
        at: Bytes that the direction has carried before.
        kind: cut, reset, delay or throttle.
        seconds: Of a delay or of all pauses.
        bytes: How many are throttled.
    """

    at: int
    kind: str
    seconds: float
    bytes: int


def faults(draws: random.Random, mean: int) -> Iterator[Fault]:
    """Yields the faults of one direction of a connection, in their order."""
    at = 0
    while True:
        # One in four happens early, during the first messages.
        at += int(draws.expovariate(1 / (mean if draws.random() < 0.75 else 2000)))
        (kind,) = draws.choices(["cut", "reset", "delay", "throttle"], [2, 2, 4, 3])
        yield Fault(at, kind, draws.uniform(0.01, 0.4), draws.randrange(1 << 18))


@dataclass
class Slow:
    """A throttled direction.

    Attributes:
        left: How many bytes are still throttled.
        pause: Seconds after each few bytes.
    """

    left: int = 0
    pause: float = 0.0

    def most(self, count: int) -> int:
        """Returns how many of `count` bytes may be sent at once."""
        return min(count, FEW_BYTES) if self.left > 0 else count

    def after(self, count: int) -> float:
        """Returns the seconds to wait after `count` bytes were sent."""
        is_slow, self.left = self.left > 0, self.left - count
        return self.pause if is_slow else 0.0


class Chaos:
    """A proxy in front of the server at `target`.

    Attributes:
        done: How often each kind of fault happened.
    """

    def __init__(self, target: str, seed: int, mean: int = MEAN_BYTES) -> None:
        host, _, port = target.rpartition(":")
        self._target, self._seed, self._mean = (host, int(port)), seed, mean
        self.done: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._ended = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def _accept(self) -> None:
        with suppress(OSError):  # the listener is closed
            for index in range(1 << 30):
                caller, _ = self._listener.accept()
                threading.Thread(target=self._carry, args=(caller, index), daemon=True).start()

    def _carry(self, caller: socket.socket, index: int) -> None:
        self._count("connection")
        try:
            server = socket.create_connection(self._target)
        except OSError:  # the server does not run
            caller.close()
            return
        with caller, server, self._known(caller, server):
            pumps = []
            for way, source, target in (("up", caller, server), ("down", server, caller)):
                source.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BYTES)
                planned = faults(random.Random(f"{self._seed} {index} {way}"), self._mean)
                pump = threading.Thread(
                    target=self._pump, args=(source, target, planned), daemon=True
                )
                pump.start()
                pumps.append(pump)
            for pump in pumps:
                pump.join()

    @contextmanager
    def _known(self, *sockets: socket.socket) -> Iterator[None]:
        with self._lock:
            self._open.update(sockets)
        try:
            yield
        finally:
            with self._lock:
                self._open.difference_update(sockets)

    def _pump(self, source: socket.socket, target: socket.socket, planned: Iterator[Fault]) -> None:
        """Carries one direction until it ends or is cut. Then it ends the other one."""
        carried, fault, slow = 0, next(planned), Slow()
        with suppress(OSError):
            while data := memoryview(source.recv(READ_BYTES)):
                while data:
                    most = slow.most(fault.at - carried)
                    part, data = data[:most], data[most:]
                    target.sendall(part)
                    carried += len(part)
                    self._ended.wait(slow.after(len(part)))
                    if carried == fault.at:
                        slow = self._fail(fault, slow)
                        if fault.kind in ENDS:
                            _end(source, target, is_reset=fault.kind == "reset")
                            return
                        fault = next(planned)
        _end(source, target)

    def _fail(self, fault: Fault, slow: "Slow") -> "Slow":
        """Applies a fault. Returns the throttling from then on."""
        self._count(fault.kind)
        if fault.kind == "delay":
            self._ended.wait(fault.seconds)
        return Slow(fault.bytes, fault.seconds / 32) if fault.kind == "throttle" else slow

    def _count(self, kind: str) -> None:
        with self._lock:
            self.done[kind] += 1

    def close(self) -> None:
        """Accepts no more connections, and ends the open ones."""
        self._ended.set()
        _end(self._listener)
        self._listener.close()
        self._accepting.join()
        with self._lock:
            _end(*self._open)


def _end(*sockets: socket.socket, is_reset: bool = False) -> None:
    for each in sockets:
        with suppress(OSError):
            if is_reset:  # discards bytes in transit, and notifies the peer
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            each.shutdown(socket.SHUT_RDWR)


@contextmanager
def chaos(target: str, seed: int, mean: int = MEAN_BYTES) -> Iterator[Chaos]:
    """Runs a failing network in front of the server at `target`."""
    running = Chaos(target, seed, mean)
    try:
        yield running
    finally:
        running.close()
