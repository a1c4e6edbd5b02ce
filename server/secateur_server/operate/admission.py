"""Which models are served now, and which wait: by their bytes, in a fair order."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from secateur_server.devices.watch import watch
from secateur_server.errors import ModelTooLarge, QueueFull, QuotaExceeded
from secateur_server.operate.calls import this_call
from secateur_server.runtime.context import Tenant

# How soon it is seen that a waiting caller has left.
LOOK_SECONDS = 0.2
# Between these lies what a caller that is turned away is told to wait.
LEAST_RETRY_SECONDS, MOST_RETRY_SECONDS = 1.0, 30.0


@dataclass(eq=False)
class _Waiting:
    tenant: Tenant
    size: int
    since: float = field(default_factory=time.monotonic)
    called: threading.Event = field(default_factory=threading.Event)
    is_refused: bool = False


@dataclass
class _Held:
    """What a tenant has in service."""

    bytes: int = 0
    requests: int = 0


class Admission:
    """Lets in models while their bytes fit, and keeps a bounded queue of others.

    limit: bytes of all models in service.  most_waiting: requests.

    The next is the one that has waited longest of the tenant that has the fewest bytes in service,
    and of several of these, of the one whose last turn is longest ago: where each model fills the
    limit they take turns. Nobody goes ahead of it because it is smaller, so that large models come
    to their turn. Who waits for its own tenant's quota holds up nobody else. Where the queue is
    full the tenant with the most in it has to give up its last place, so that one tenant cannot
    keep others out.
    """

    def __init__(self, limit: int, most_waiting: int) -> None:
        self.limit, self.most_waiting = limit, most_waiting
        self._lock = threading.Lock()
        self._held: dict[str, _Held] = {}
        self._queue: list[_Waiting] = []
        self._turns = 0
        self._last_turn: dict[str, int] = {}  # of tenants that have something here

    @property
    def held(self) -> int:
        """Bytes of models in service."""
        with self._lock:
            return sum(held.bytes for held in self._held.values())

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @contextmanager
    def admitted(self, field: str, size: int) -> Iterator[None]:
        """Waits until `size` bytes of this call's model may be in service, for the block.

        field: of the request, which announces them.
        Errors: ModelTooLarge, QuotaExceeded, QueueFull, Stopped.
        """
        call = this_call()
        self._check(field, size, call.tenant)
        me = _Waiting(call.tenant, size)
        with self._lock:
            self._queue.append(me)
            self._call_next()
            if not me.called.is_set() and len(self._queue) > self.most_waiting:
                self._refuse_one()
        try:
            self._wait(me)
        finally:
            call.queued = time.monotonic() - me.since
        try:
            yield
        finally:
            self._leave(me)

    def _check(self, field: str, size: int, tenant: Tenant) -> None:
        if size > self.limit:
            raise ModelTooLarge(
                field, f"{size} bytes; this server has room for {self.limit} (--memory-limit)"
            )
        if tenant.memory is not None and size > tenant.memory:
            raise QuotaExceeded(
                field,
                f"{size} bytes; {tenant.name} may have {tenant.memory} in service: send less, or "
                "ask the operator to raise `memory` in the tokens file",
            )

    def _wait(self, me: _Waiting) -> None:
        """Errors: QueueFull, Stopped."""
        try:
            while not me.called.wait(LOOK_SECONDS):
                watch().check()
        except BaseException:
            with self._lock:
                if me in self._queue:
                    self._queue.remove(me)
                    self._call_next()  # it may have stood before others
                    raise
            if not me.is_refused:
                self._leave(me)
            raise
        if me.is_refused:
            raise QueueFull("call", self._how_full(), self._retry_after())

    def _leave(self, me: _Waiting) -> None:
        with self._lock:
            held = self._held[me.tenant.owner]
            held.bytes -= me.size
            held.requests -= 1
            if not held.requests:
                del self._held[me.tenant.owner]
            self._call_next()

    def _call_next(self) -> None:
        while (next_one := self._next()) is not None:
            used = sum(held.bytes for held in self._held.values())
            if used + next_one.size > self.limit:
                break
            self._queue.remove(next_one)
            owner = next_one.tenant.owner
            held = self._held.setdefault(owner, _Held())
            held.bytes += next_one.size
            held.requests += 1
            self._turns += 1
            self._last_turn[owner] = self._turns
            next_one.called.set()
        here = self._held.keys() | {waiting.tenant.owner for waiting in self._queue}
        self._last_turn = {o: turn for o, turn in self._last_turn.items() if o in here}

    def _next(self) -> _Waiting | None:
        """Whose turn it is, of those whose quota lets them."""
        heads: dict[str, _Waiting] = {}
        for waiting in self._queue:
            heads.setdefault(waiting.tenant.owner, waiting)
        able = [waiting for waiting in heads.values() if self._is_within_quota(waiting)]
        return min(able, key=lambda one: self._precedence(one.tenant), default=None)

    def _precedence(self, tenant: Tenant) -> tuple[int, int]:
        return self._of(tenant).bytes, self._last_turn.get(tenant.owner, 0)

    def _of(self, tenant: Tenant) -> _Held:
        return self._held.get(tenant.owner, _Held())

    def _is_within_quota(self, waiting: _Waiting) -> bool:
        tenant, held = waiting.tenant, self._of(waiting.tenant)
        if tenant.requests is not None and held.requests >= tenant.requests:
            return False
        return tenant.memory is None or held.bytes + waiting.size <= tenant.memory

    def _refuse_one(self) -> None:
        """The last one of the tenant that has the most in the queue."""
        counts: dict[str, int] = {}
        for waiting in self._queue:
            counts[waiting.tenant.owner] = counts.get(waiting.tenant.owner, 0) + 1
        last = max(reversed(self._queue), key=lambda one: counts[one.tenant.owner])
        self._queue.remove(last)
        last.is_refused = True
        last.called.set()

    def _how_full(self) -> str:
        with self._lock:
            held = sum(held.bytes for held in self._held.values())
            waiting = len(self._queue)
        return f"{held} of {self.limit} bytes are in service, and {waiting} requests wait"

    def _retry_after(self) -> float:
        """As long as the one that has waited longest waits already."""
        with self._lock:
            longest = time.monotonic() - self._queue[0].since if self._queue else 0.0
        return min(max(longest, LEAST_RETRY_SECONDS), MOST_RETRY_SECONDS)
