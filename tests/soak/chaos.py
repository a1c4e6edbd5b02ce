"""A network that fails at random: cut, delayed and slow, both ways, by a seed."""

import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from tests.storage.proxy import READ_BYTES

# Between two faults of one direction lie so many bytes, on the average.
MEAN_BYTES = 4 << 20
# What the system holds by itself for one direction: a slow network is felt by who sends.
SOCKET_BYTES = 1 << 18
# What goes at once where it is slow.
FEW_BYTES = 4096
ENDS = ("cut", "reset")


@dataclass(frozen=True)
class Fault:
    """at: bytes of the direction before it.  kind: cut, reset, delay or throttle."""

    at: int
    kind: str
    seconds: float
    bytes: int


def faults(draws: random.Random, mean: int) -> Iterator[Fault]:
    """What goes wrong with one direction of a connection, by the bytes that it has carried."""
    at = 0
    while True:
        # Of one in four it is known only after some bytes: while the first messages are on the way.
        at += int(draws.expovariate(1 / (mean if draws.random() < 0.75 else 2000)))
        (kind,) = draws.choices(["cut", "reset", "delay", "throttle"], [2, 2, 4, 3])
        yield Fault(at, kind, draws.uniform(0.01, 0.4), draws.randrange(1 << 18))


@dataclass
class Slow:
    """The next bytes of a direction go a few at a time.  pause: seconds behind each few."""

    left: int = 0
    pause: float = 0.0

    def most(self, count: int) -> int:
        """How many of `count` bytes may go at once."""
        return min(count, FEW_BYTES) if self.left > 0 else count

    def after(self, count: int) -> float:
        """Seconds to wait when so many have gone."""
        is_slow, self.left = self.left > 0, self.left - count
        return self.pause if is_slow else 0.0


class Chaos:
    """A proxy in front of the server at `target`.  done: how often each kind of fault was."""

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
        with suppress(OSError):  # it is closed
            for index in range(1 << 30):
                caller, _ = self._listener.accept()
                threading.Thread(target=self._carry, args=(caller, index), daemon=True).start()

    def _carry(self, caller: socket.socket, index: int) -> None:
        self._count("connection")
        try:
            server = socket.create_connection(self._target)
        except OSError:  # it is not there now
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
        """One direction, until it ends or is cut; then the other ends as well."""
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
        """What is slow from now on."""
        self._count(fault.kind)
        if fault.kind == "delay":
            self._ended.wait(fault.seconds)
        return Slow(fault.bytes, fault.seconds / 32) if fault.kind == "throttle" else slow

    def _count(self, kind: str) -> None:
        with self._lock:
            self.done[kind] += 1

    def close(self) -> None:
        """Takes no more connections, and ends those that there are."""
        self._ended.set()
        _end(self._listener)
        self._listener.close()
        self._accepting.join()
        with self._lock:
            _end(*self._open)


def _end(*sockets: socket.socket, is_reset: bool = False) -> None:
    for each in sockets:
        with suppress(OSError):
            if is_reset:  # what is on its way is thrown away, and the peer told
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            each.shutdown(socket.SHUT_RDWR)


@contextmanager
def chaos(target: str, seed: int, mean: int = MEAN_BYTES) -> Iterator[Chaos]:
    """A failing network in front of the server at `target`."""
    running = Chaos(target, seed, mean)
    try:
        yield running
    finally:
        running.close()
