"""The context of one request: id, tenant, deadline, limits, progress, stages and cancellation."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from secateur_server.errors import Cancelled

if TYPE_CHECKING:
    import torch

    from secateur_server.cut.drivers import Driver

Item = TypeVar("Item")
Found = TypeVar("Found")

# Creates a new error each time: an error keeps the frames that it passed, and with them the model.
Interruption = Callable[[], Cancelled]

# Loops over up to FEW items check for cancellation once: a generator around each loop of a small
# state_dict costs more than the loop. Work on a large item checks by itself, for each piece.
FEW = 16


def cancelled_by_caller() -> Cancelled:
    """The error of a request whose caller has cancelled it, or has lost its connection."""
    return Cancelled("call", "cancelled by the caller")


@dataclass(frozen=True)
class Tenant:
    """The sender of a request, with its quotas. None: no quota.

    Attributes:
        name: The name in the tokens file; empty without a tokens file.
        owner: The owner of the checkpoints that the tenant sees.
        memory: Bytes of models that are served at once.
        requests: Requests that are served at once.
        store: Bytes of checkpoints.
        allow: Prefixes of URIs, among those that the server allows; None: all of them.
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
    """An RPC, as it is named in metrics.

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
    """The time that a request spent in one stage.

    Attributes:
        begun, ended: Nanoseconds since 1970.
        seconds: The sum over all threads.
    """

    begun: int
    ended: int
    seconds: float


class RequestContext:
    """One request. All its threads share the context.

    Args:
        method: The RPC.
        id: The caller's x-request-id, or one made by the server.
        peer: The caller's address.
        deadline: A time of time.monotonic(); None: no deadline.
        work_memory: Bytes that the request may take beside its state_dict; None: no limit.
        scratch: The folder for data that does not fit in `work_memory`.
        charge: The scheduler's, for `charge`.
        driver: Makes the driver of tensors on a device, as cut.drivers says; None: that of this
            process.

    Attributes:
        tenant: The sender of the request.
        now: The phase (fetch, read, prune or write), the bytes that it takes (0: unknown), and
            `done` when it began. One tuple, so that other threads read a consistent value.
        done: Bytes processed in all phases.
        read: Bytes of the state_dict that have been read.
        share: The progress in [0, 1] that was last reported.
        stages: receive, score, select, solve, encode and send, as far as they have run.
        received, sent: Bytes of data.
        elements, pruned: Elements of the tensors in the report, and those that this request pruned.
        reserved: Bytes of --memory-limit that the request holds.
        charges: Bytes that the request holds beside its state_dict, as the scheduler counts them.
        queued, time_to_report: Seconds; None: the request has not reached that point.
        is_waiting: Whether the request waits for memory, or for the cores.
        waited_for: How long, and for what, the request waited when it was cancelled; empty if it
            did not wait.
        reason: The reason of a failure, as google.rpc.ErrorInfo has it.
        error: The message of a failure.
        interruption: Creates the error of a cancelled request; None: it is not cancelled.
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
        driver: "Callable[[torch.device], Driver] | None" = None,
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
        self.reserved = 0
        self._charge, self.driver = charge, driver
        self._started = time.perf_counter()
        self._lock = threading.Lock()
        self.interruption: Interruption | None = None

    @property
    def seconds(self) -> float:
        """Seconds since the request began."""
        return time.perf_counter() - self._started

    @property
    def is_past_deadline(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def cancel(self, reason: Interruption = cancelled_by_caller) -> None:
        """Cancels the request: the next check in any of its threads raises an error.

        The reason creates the error. The first cancellation counts.
        """
        with self._lock:
            self.interruption = self.interruption or reason

    def check(self) -> None:
        """Ends the work of a cancelled request.

        Raises:
            Cancelled: The request has been cancelled, or its deadline has passed.
        """
        # The property above, inlined: this check runs for each of many tensors, and the call would
        # double its time.
        is_late = self.deadline is not None and time.monotonic() >= self.deadline
        if is_late or self.interruption is not None:
            raise (self.interruption or cancelled_by_caller)()

    def each(self, items: Iterable[Item]) -> Iterable[Item]:
        """The same items, with a check for cancellation before each one, or once for a few items.

        Raises:
            Cancelled: The request has been cancelled.
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
        """Maps a function over pieces of tensors, with a check for cancellation before each.

        Raises:
            Cancelled: The request has been cancelled.
        """
        return [function(piece) for piece in self._checked(pieces)]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time of the block to a stage. Several threads may be in one stage."""
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
        """Measures the time of the block as `queued`."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.queued = time.perf_counter() - begun

    @contextmanager
    def waiting(self, what: Callable[[], str]) -> Iterator[None]:
        """Records what the request waited for, as `what` describes it, if it is cancelled."""
        begun = time.perf_counter()
        try:
            yield
        except Cancelled:
            self.waited_for = f"{time.perf_counter() - begun:.1f} s for {what()}"
            raise

    def charge(self, field: str, size: int, what: str) -> None:
        """Counts `size` bytes against the server's limits before they are allocated.

        Args:
            field: The field of the request that needs them.
            size: An upper bound. The bytes count until the request ends.
            what: Describes the work that needs them, for the error.

        Raises:
            RequestTooLarge: They are more than the server's limit.
            QueueFull: They do not fit beside those of other requests.
        """
        self._charge(self, field, size, what)

    def begin(self, phase: str, total: int = 0) -> None:
        """Begins a phase.

        Args:
            phase: fetch, read, prune or write.
            total: Bytes to process; 0: unknown.
        """
        self.now = phase, total, self.done

    def advance(self, count: int) -> None:
        """Adds `count` bytes to the progress.

        Raises:
            Cancelled: The request has been cancelled.
        """
        self.check()
        self.done += count
        if self.now[0] in ("fetch", "read"):  # a fetched file is read again from the disk
            self.read = max(self.read, self.done - self.now[2])


Charge = Callable[[RequestContext, str, int, str], None]
