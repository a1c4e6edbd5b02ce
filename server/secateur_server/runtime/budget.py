"""An amount that requests share: what does not fit waits, and is served in a fair order."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from secateur_server.runtime.context import RequestContext, Tenant

# How soon a waiting request sees that its caller has left.
CHECK_SECONDS = 0.2


@dataclass(frozen=True)
class Quota:
    """What a tenant may hold. None: no quota."""

    amount: int | None = None
    requests: int | None = None


def half_of(limit: int) -> Callable[[Tenant], Quota]:
    """The quota by which a named tenant holds at most half of a limit, and keeps nobody out."""

    def quota(tenant: Tenant) -> Quota:
        return Quota(limit // 2) if tenant.name else Quota()

    return quota


@dataclass
class Held:
    """What a tenant holds."""

    amount: int = 0
    requests: int = 0


class Full(Exception):
    """A request has to go: too many wait.

    Attributes:
        held: What requests hold, of the limit.
        mine: What the tenant holds.
        quota: The tenant's quota that kept the request waiting: `amount`, `requests`, or empty.
        waiting: How many requests wait.
        longest: Seconds that the first one of them has waited.
    """

    def __init__(self, held: int, mine: Held, quota: str, waiting: int, longest: float) -> None:
        super().__init__(f"{held} held, {mine} by this tenant, {waiting} wait")
        self.held, self.mine, self.quota = held, mine, quota
        self.waiting, self.longest = waiting, longest


@dataclass(eq=False)
class _Waiting:
    tenant: Tenant
    amount: int
    since: float = field(default_factory=time.monotonic)
    called: threading.Event = field(default_factory=threading.Event)
    refusal: Full | None = None


class Budget:
    """Grants amounts while they fit, and keeps a bounded queue of other requests.

    The next request is the one that has waited longest of the tenant that holds least; among such
    tenants, of the one that was served longest ago. A small request never overtakes it, so large
    ones are served too. A request that waits for its tenant's quota holds up no other tenant. If
    the queue is full, the tenant with most requests in it loses its last one: one tenant cannot
    keep others out.

    Args:
        limit: The amount that all requests may hold.
        most_waiting: Requests; 0: nobody waits.
        quota: What a tenant may hold.
    """

    def __init__(
        self, limit: int, max_waiting: int, quota: Callable[[Tenant], Quota] = lambda _: Quota()
    ) -> None:
        self.limit, self.max_waiting, self._quota = limit, max_waiting, quota
        self._lock = threading.Lock()
        self._total = 0
        self._held: dict[str, Held] = {}  # by owner
        self._queue: list[_Waiting] = []
        self._turns = 0
        self._last_turn: dict[str, int] = {}  # of owners that hold something or wait

    @property
    def held(self) -> int:
        """What requests hold now."""
        return self._total

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def waiting_for_quota(self) -> int:
        """Requests in the queue that a quota of their own tenant holds up."""
        with self._lock:
            return sum(bool(self._quota_in_way(one.tenant, one.amount)) for one in self._queue)

    def most(self, tenant: Tenant) -> int:
        """What a tenant may hold if nobody else holds anything."""
        quota = self._quota(tenant).amount
        return self.limit if quota is None else min(quota, self.limit)

    def state(self, tenant: Tenant, amount: int) -> Full:
        """What is in the way of `amount` more for a tenant."""
        with self._lock:
            return self._state(tenant, amount)

    def acquire(self, context: RequestContext, amount: int) -> None:
        """Waits until the request's tenant may hold `amount` more. The caller releases it.

        Raises:
            Full: Too many requests wait.
            Cancelled: The request has been cancelled.
        """
        tenant = context.tenant
        with self._lock:
            if not self._queue and self._fits(tenant, amount):
                self._grant(tenant, amount)
                return
            me = _Waiting(tenant, amount)
            self._queue.append(me)
            self._call_next()
            if not me.called.is_set() and len(self._queue) > self.max_waiting:
                self._refuse_one()
        self._wait(context, me)

    def release(self, tenant: Tenant, amount: int, requests: int = 1) -> None:
        """Gives back what was acquired.

        Args:
            tenant: That of the request that acquired it.
            amount: A part of what was acquired, or the rest of it.
            requests: 0: a part.
        """
        with self._lock:
            held = self._held[tenant.owner]
            self._total -= amount
            held.amount -= amount
            held.requests -= requests
            if not held.requests:
                del self._held[tenant.owner]
            if self._queue or not held.requests:
                self._call_next()

    def _wait(self, context: RequestContext, me: _Waiting) -> None:
        context.is_waiting = True
        try:
            while not me.called.wait(CHECK_SECONDS):
                context.check()
        except BaseException:
            with self._lock:
                if me in self._queue:
                    self._queue.remove(me)
                    self._call_next()  # others may have waited behind it
                    raise
            if me.refusal is None:
                self.release(me.tenant, me.amount)
            raise
        finally:
            context.is_waiting = False
        if me.refusal is not None:
            raise me.refusal

    def _call_next(self) -> None:
        while (one := self._next()) is not None and self._total + one.amount <= self.limit:
            self._queue.remove(one)
            self._grant(one.tenant, one.amount)
            one.called.set()
        here = self._held.keys() | {waiting.tenant.owner for waiting in self._queue}
        self._last_turn = {o: turn for o, turn in self._last_turn.items() if o in here}

    def _next(self) -> _Waiting | None:
        """The request to serve next, of those that their quota lets in."""
        heads: dict[str, _Waiting] = {}
        for waiting in self._queue:
            heads.setdefault(waiting.tenant.owner, waiting)
        able = [one for one in heads.values() if not self._quota_in_way(one.tenant, one.amount)]
        return min(able, key=lambda one: self._precedence(one.tenant), default=None)

    def _precedence(self, tenant: Tenant) -> tuple[int, int]:
        return self._of(tenant).amount, self._last_turn.get(tenant.owner, 0)

    def _of(self, tenant: Tenant) -> Held:
        return self._held.get(tenant.owner, Held())

    def _fits(self, tenant: Tenant, amount: int) -> bool:
        return self._total + amount <= self.limit and not self._quota_in_way(tenant, amount)

    def _quota_in_way(self, tenant: Tenant, amount: int) -> str:
        """The name of the tenant's quota that does not allow `amount` more now; empty: none."""
        quota, held = self._quota(tenant), self._of(tenant)
        if quota.requests is not None and held.requests >= quota.requests:
            return "requests"
        is_within = quota.amount is None or held.amount + amount <= quota.amount
        return "" if is_within else "amount"

    def _grant(self, tenant: Tenant, amount: int) -> None:
        held = self._held.setdefault(tenant.owner, Held())
        self._total += amount
        held.amount += amount
        held.requests += 1
        self._turns += 1
        self._last_turn[tenant.owner] = self._turns

    def _refuse_one(self) -> None:
        """The last one of the tenant that has the most in the queue."""
        counts: dict[str, int] = {}
        for waiting in self._queue:
            counts[waiting.tenant.owner] = counts.get(waiting.tenant.owner, 0) + 1
        last = max(reversed(self._queue), key=lambda one: counts[one.tenant.owner])
        self._queue.remove(last)
        last.refusal = self._state(last.tenant, last.amount)
        last.called.set()

    def _state(self, tenant: Tenant, amount: int) -> Full:
        longest = time.monotonic() - self._queue[0].since if self._queue else 0.0
        quota, mine = self._quota_in_way(tenant, amount), self._of(tenant)
        return Full(self._total, replace(mine), quota, len(self._queue), longest)
