"""One request: who sent it, what it may use, how far it is, and whether it has to end."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from secateur_server.errors import Cancelled

Item = TypeVar("Item")
Found = TypeVar("Found")

# Makes the error of a cancelled request anew each time: a raised one keeps its frames, and a model.
Interruption = Callable[[], Cancelled]

# Loops over so few items check for cancellation once: a generator around each loop of a small
# state_dict costs more than the loop. Work on one large item checks by itself, for each piece.
FEW = 16


def cancelled_by_caller() -> Cancelled:
    """The error of a request whose caller cancelled it, or is gone."""
    return Cancelled("call", "the caller has left")


@dataclass(frozen=True)
class Tenant:
    """Who sends a request, and that tenant's quotas. None: no quota.

    Attributes:
        name: Of the tokens file; empty for a caller whom it does not name.
        owner: Whose checkpoints the tenant sees.
        memory: Bytes of models served at once.
        requests: Served at once.
        store: Bytes of checkpoints.
        allow: Prefixes of URIs, among those that the server allows; None is all of them.
    """

    name: str
    owner: str
    memory: int | None = None
    requests: int | None = None
    store: int | None = None
    allow: tuple[str, ...] | None = None


ANONYMOUS = Tenant("", "0" * 32)


@dataclass(frozen=True)
class Method:
    """An RPC as metrics name it.

    Attributes:
        service: `secateur.v1.Pruner`.
        name: `Prune`.
        kind: unary, client_stream, server_stream or bidi_stream.
    """

    service: str
    name: str
    kind: str

    def __str__(self) -> str:
        return f"{self.service}/{self.name}"


@dataclass(frozen=True)
class Stage:
    """A part of a request: begun and ended in ns since 1970, seconds of all threads together."""

    begun: int
    ended: int
    seconds: float


class RequestContext:
    """One request, from its first moment to its last. All its threads share it.

    Attributes:
        method: The RPC.
        id: The caller's x-request-id, or one made by the server.
        peer: The caller's address.
        tenant: The caller.
        deadline: By time.monotonic(); None: the caller waits for ever.
        work_memory: Bytes that the request may take beside its state_dict; None: no limit.
        scratch: The folder for what does not fit in `work_memory`.
        now: What the request does (fetch, read, prune or write), the bytes that this takes (0:
            unknown), and `done` when it began. One tuple, so that a reader sees no half of two.
        done: Bytes processed in all phases.
        read: Bytes of the state_dict read so far.
        share: Progress in [0, 1], as last told.
        stages: receive, score, select, encode and send, as far as they have run.
        received, sent: Bytes of data.
        elements, pruned: Of the tensors in the report, and those that this request pruned.
        charges: Bytes that the request holds beside its state_dict, as the scheduler counts them.
        queued, time_to_report: Seconds; None: the request has not come so far.
        is_waiting: Whether the request waits for memory, or for the cores.
        waited_for: For how long and for what the request waited when it was stopped; empty: it did
            not wait then.
        reason: Of a failure, as google.rpc.ErrorInfo has it.  error: What the caller was told.
        interruption: Makes the error of a cancelled request.  None: it is not cancelled.
        code: The final status.
    """

    def __init__(
        self,
        method: Method = Method("", "", ""),
        id: str = "",
        peer: str = "",
        *,
        deadline: float | None = None,
        work_memory: int | None = None,
        scratch: Path | None = None,
        charge: "Charge" = lambda context, field, size, what: None,
    ) -> None:
        self.method, self.id, self.peer, self.tenant = method, id, peer, ANONYMOUS
        self.deadline, self.work_memory, self.scratch = deadline, work_memory, scratch
        self.now = "", 0, 0
        self.done = self.read = 0
        self.share = 0.0
        self.stages: dict[str, Stage] = {}
        self.received = self.sent = self.elements = self.pruned = 0
        self.sparsity: float | None = None
        self.queued: float | None = None
        self.is_waiting = False
        self.time_to_report: float | None = None
        self.reason = self.error = self.code = self.waited_for = ""
        self.charges: list[int] = []
        self._charge = charge
        self.begun = time.time_ns()
        self._started = time.perf_counter()
        self._lock = threading.Lock()
        self.interruption: Interruption | None = None

    @property
    def seconds(self) -> float:
        """Since the request began."""
        return time.perf_counter() - self._started

    @property
    def is_past_deadline(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def cancel(self, reason: Interruption = cancelled_by_caller) -> None:
        """Makes the request end at the next check in any of its threads.

        Args:
            reason: Makes the error that the request ends with. The first one counts.
        """
        with self._lock:
            self.interruption = self.interruption or reason

    def check(self) -> None:
        """Ends the work of a request that nobody waits for.

        Raises:
            Cancelled: The request has been cancelled, or its deadline has passed.
        """
        # As `is_late`, which as a call would double the time that each of many tensors takes here.
        is_past_deadline = self.deadline is not None and time.monotonic() >= self.deadline
        if is_past_deadline or self.interruption is not None:
            raise (self.interruption or cancelled_by_caller)()

    def each(self, items: Iterable[Item]) -> Iterable[Item]:
        """The items, for a loop whose length the caller chooses: checks before each, or once.

        Raises:
            Cancelled: As `check`.
        """
        self.check()
        length = getattr(items, "__len__", None)  # isinstance(items, Sized) takes ten times as long
        is_short = length is not None and length() <= FEW
        return items if is_short else self._checked(items)

    def _checked(self, items: Iterable[Item]) -> Iterator[Item]:
        check = self.check
        for item in items:
            check()
            yield item

    def map(self, function: Callable[[Item], Found], pieces: Iterable[Item]) -> list[Found]:
        """The results of `function` for pieces of tensors, in order, with a check before each.

        Raises:
            Cancelled: As `check`.
        """
        return [function(piece) for piece in self._checked(pieces)]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times the block as a part of a stage. Several threads may be in one stage."""
        now, begun = time.time_ns(), time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - begun
            ended = now + int(seconds * 1e9)
            with self._lock:
                before = self.stages.get(name, Stage(now, ended, 0.0))
                self.stages[name] = Stage(
                    min(before.begun, now), max(before.ended, ended), before.seconds + seconds
                )

    @contextmanager
    def queueing(self) -> Iterator[None]:
        """Times the block as a wait for memory."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.queued = time.perf_counter() - begun

    @contextmanager
    def waiting(self, what: Callable[[], str]) -> Iterator[None]:
        """Records that the request is stopped while it waits in the block.

        Args:
            what: Says what it waits for.
        """
        begun = time.perf_counter()
        try:
            yield
        except Cancelled:
            self.waited_for = f"{time.perf_counter() - begun:.1f} s for {what()}"
            raise

    def charge(self, field: str, size: int, what: str) -> None:
        """Counts `size` bytes against the server's limits before they are allocated.

        Args:
            field: Of the request, which causes them.
            size: An upper estimate. They count until the request ends.
            what: Takes that memory; for the error.

        Raises:
            RequestTooLarge: The server never has so much.
            QueueFull: Other requests hold too much of it.
        """
        self._charge(self, field, size, what)

    def begin(self, phase: str, total: int = 0) -> None:
        """Begins a phase of `total` bytes; 0: unknown."""
        self.now = phase, total, self.done

    def advance(self, count: int) -> None:
        """Adds `count` bytes to the progress.

        Raises:
            Cancelled: As `check`.
        """
        self.check()
        self.done += count
        if self.now[0] in ("fetch", "read"):  # a fetched file is then read from the disk
            self.read = max(self.read, self.done - self.now[2])


Charge = Callable[[RequestContext, str, int, str], None]
