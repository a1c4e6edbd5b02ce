"""Shares a limited amount among requests. Requests that do not fit wait in a fair order."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from secateur_server.runtime.context import RequestContext, Tenant

# The interval between checks for cancellation while a request waits.
CHECK_SECONDS = 0.2


@dataclass(frozen=True)
class Quota:
    """The amount and the number of requests that a tenant may hold. None: no quota."""

    amount: int | None = None
    requests: int | None = None


def half_of(limit: int) -> Callable[[Tenant], Quota]:
    """Quotas that give each named tenant at most half of a limit, so that it blocks nobody."""

    def quota(tenant: Tenant) -> Quota:
        return Quota(limit // 2) if tenant.name else Quota()

    return quota


@dataclass
class Held:
    """The amount and the number of requests that a tenant holds."""

    amount: int = 0
    requests: int = 0


@dataclass(eq=False)
class Full(Exception):
    """The state of a budget that refuses a request because too many wait.

    Attributes:
        held: The amount that all requests hold.
        mine: The part of it that the tenant of the request holds.
        quota: The tenant's quota that blocks the request: `amount`, `requests`, or empty.
        waiting: The number of requests that wait.
        longest: Seconds that the first one of them has waited.
    """

    held: int
    mine: Held
    quota: str
    waiting: int
    longest: float


@dataclass(eq=False)
class _Waiting:
    tenant: Tenant
    amount: int
    since: float = field(default_factory=time.monotonic)
    called: threading.Event = field(default_factory=threading.Event)
    refusal: Full | None = None


class Budget:
    """Grants amounts while they fit, and queues other requests.

    The tenant that holds the least comes next; among such tenants, the one that was served longest
    ago. Its oldest request is served. No smaller request overtakes it, so that large requests are
    served too. A request that is blocked by its tenant's quota does not block other tenants. If the
    queue is full, the tenant with the most requests in it loses its newest one, so that one tenant
    cannot block others.

    Args:
        limit: The amount that all requests together may hold.
        max_waiting: The length of the queue; 0: no request waits.
        quota: The quota of each tenant.

    Attributes:
        held: The amount that all requests hold now.
    """

    def __init__(
        self, limit: int, max_waiting: int, quota: Callable[[Tenant], Quota] = lambda _: Quota()
    ) -> None:
        self.limit, self.max_waiting, self._quota = limit, max_waiting, quota
        self._lock = threading.Lock()
        self.held = 0
        self._by_owner: dict[str, Held] = {}
        self._queue: list[_Waiting] = []
        self._turns = 0
        self._last_turn: dict[str, int] = {}  # by owner, if it holds something or waits

    @property
    def waiting(self) -> int:
        """The number of requests in the queue."""
        return len(self._queue)

    @property
    def waiting_for_quota(self) -> int:
        """The number of requests in the queue that a quota of their own tenant blocks."""
        with self._lock:
            return sum(bool(self._blocking_quota(one.tenant, one.amount)) for one in self._queue)

    def limit_for(self, tenant: Tenant) -> int:
        """The amount that a tenant may hold if no other tenant holds anything."""
        quota = self._quota(tenant).amount
        return self.limit if quota is None else min(quota, self.limit)

    def state(self, tenant: Tenant, amount: int) -> Full:
        """The state of the budget for a tenant that asks for `amount` more."""
        with self._lock:
            return self._state(tenant, amount)

    def acquire(self, context: RequestContext, amount: int) -> None:
        """Waits until the request's tenant may hold `amount` more. The caller releases it later.

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

    def acquire_more(self, tenant: Tenant, amount: int) -> Full | None:
        """Grants more to a request that holds a part already, if it fits now.

        It does not wait: two such requests could wait for each other. The caller releases the
        amount with `requests=0`.

        Returns:
            Why it does not fit; None if it is granted.
        """
        with self._lock:
            mine, most = self._held_by(tenant).amount, self._quota(tenant).amount
            is_within = most is None or mine + amount <= most
            if self.held + amount > self.limit or not is_within:
                return replace(self._state(tenant, amount), quota="" if is_within else "amount")
            self.held += amount
            self._by_owner[tenant.owner].amount += amount
            return None

    def release(self, tenant: Tenant, amount: int, requests: int = 1) -> None:
        """Returns an amount to the budget: all that a request holds, or a part if `requests` is 0.

        `tenant` is the one of the request that acquired it.
        """
        with self._lock:
            held = self._by_owner[tenant.owner]
            self.held -= amount
            held.amount -= amount
            held.requests -= requests
            if not held.requests:
                del self._by_owner[tenant.owner]
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
                    self._call_next()  # it may have blocked others
                    raise
            if me.refusal is None:
                self.release(me.tenant, me.amount)
            raise
        finally:
            context.is_waiting = False
        if me.refusal is not None:
            raise me.refusal

    def _call_next(self) -> None:
        while (one := self._next()) is not None and self.held + one.amount <= self.limit:
            self._queue.remove(one)
            self._grant(one.tenant, one.amount)
            one.called.set()
        here = self._by_owner.keys() | {waiting.tenant.owner for waiting in self._queue}
        self._last_turn = {o: turn for o, turn in self._last_turn.items() if o in here}

    def _next(self) -> _Waiting | None:
        """The next request to serve, among those that their quota allows."""
        heads: dict[str, _Waiting] = {}
        for waiting in self._queue:
            heads.setdefault(waiting.tenant.owner, waiting)
        able = [one for one in heads.values() if not self._blocking_quota(one.tenant, one.amount)]
        return min(able, key=lambda one: self._precedence(one.tenant), default=None)

    def _precedence(self, tenant: Tenant) -> tuple[int, int]:
        return self._held_by(tenant).amount, self._last_turn.get(tenant.owner, 0)

    def _held_by(self, tenant: Tenant) -> Held:
        return self._by_owner.get(tenant.owner, Held())

    def _fits(self, tenant: Tenant, amount: int) -> bool:
        return self.held + amount <= self.limit and not self._blocking_quota(tenant, amount)

    def _blocking_quota(self, tenant: Tenant, amount: int) -> str:
        """The name of the tenant's quota that does not allow `amount` more; empty: none."""
        quota, held = self._quota(tenant), self._held_by(tenant)
        if quota.requests is not None and held.requests >= quota.requests:
            return "requests"
        is_within = quota.amount is None or held.amount + amount <= quota.amount
        return "" if is_within else "amount"

    def _grant(self, tenant: Tenant, amount: int) -> None:
        held = self._by_owner.setdefault(tenant.owner, Held())
        self.held += amount
        held.amount += amount
        held.requests += 1
        self._turns += 1
        self._last_turn[tenant.owner] = self._turns

    def _refuse_one(self) -> None:
        """Refuses the newest request of the tenant with the most requests in the queue."""
        counts = Counter(waiting.tenant.owner for waiting in self._queue)
        last = max(reversed(self._queue), key=lambda one: counts[one.tenant.owner])
        self._queue.remove(last)
        last.refusal = self._state(last.tenant, last.amount)
        last.called.set()

    def _state(self, tenant: Tenant, amount: int) -> Full:
        longest = time.monotonic() - self._queue[0].since if self._queue else 0.0
        quota, mine = self._blocking_quota(tenant, amount), self._held_by(tenant)
        return Full(self.held, replace(mine), quota, len(self._queue), longest)
