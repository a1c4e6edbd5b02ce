"""Decides which request runs when: all shared resources, with their limits.

A request acquires these in this order. A health probe needs only the second one. A scrape of the
metrics needs none, since the server of metrics has a thread and connections of its own.

| shared | limit | a request that does not fit |
| --- | --- | --- |
| calls | WORKERS and --queue-size; a named tenant: half of them | is refused, and may retry |
| probes | MAX_PROBES | ends the oldest one, which is only waiting |
| first messages | FIRST_MESSAGES; a named tenant: half | waits, and is not received |
| state_dicts | --memory-limit; the tenant's `memory`, `requests` | waits, --queue-size at most |
| headers, specs, plans | OTHER; a named tenant: half | is refused, and may retry |
| fetched files | --store-max-bytes; a named tenant: half | is refused, and may retry |
| cores | one state_dict above ONE_CORE_BYTES | waits |

Budget describes the order in which waiting requests are served. A request that could never fit is
refused at once. A request that holds a part of one resource may wait only for resources further
down, so that two requests never wait for each other. What solvers need beside the state_dict is of
the same resource: a request for which it does not fit at once is refused, and may retry.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from secateur_server.errors import ModelTooLarge, QueueFull, QuotaExceeded, RequestTooLarge
from secateur_server.runtime.budget import Budget, Full, Quota, half_of
from secateur_server.runtime.context import RequestContext, Tenant

# Calls that run at once, beside those that wait for memory. Each has one thread that works and one
# that receives; torch's operators and gRPC's waits release the GIL.
WORKERS = 64
# A probe needs no token, so silent probes could otherwise occupy all threads.
MAX_PROBES = 16
# gRPC reports the length of a message only after it has received all of it.
MAX_MESSAGE_BYTES = 16 << 20
# Shares of --memory-limit, on top of it.
FIRST_MESSAGES, OTHER = 1 / 16, 1 / 8
MIN_OTHER_BYTES = 64 << 20
# Smaller charges are not counted: each call takes as much anyway.
SMALL_BYTES = 64 << 10
# State_dicts up to this size are processed by one core each.
ONE_CORE_BYTES = 4 << 20
# Bounds of the delay after which a refused caller may retry.
MIN_RETRY_SECONDS, MAX_RETRY_SECONDS = 1.0, 30.0


class Scheduler:
    """Decides which requests run, which wait and which are refused.

    Args:
        memory_limit: Bytes of the state_dicts that are served at once.
        queue_size: Requests that may wait for memory.

    Attributes:
        max_calls: Calls that run or wait.
        threads: Threads that gRPC needs.
        messages, models, other: The budgets of first messages; of state_dicts; and of headers,
            specs and plans.
    """

    def __init__(self, memory_limit: int, queue_size: int) -> None:
        self.max_calls = WORKERS + queue_size
        # Extra threads, so that rejected calls and probes never wait for a worker.
        self.threads = self.max_calls + 2 * MAX_PROBES
        self._calls = Budget(self.max_calls, 0, half_of(self.max_calls))
        self._lock = threading.Lock()
        self._probes: list[Callable[[], object]] = []  # cancels of running ones, the oldest first
        messages = max(int(memory_limit * FIRST_MESSAGES), MIN_OTHER_BYTES)
        self.messages = Budget(messages, self.max_calls, half_of(messages))
        self.models = Budget(
            memory_limit, queue_size, lambda tenant: Quota(tenant.memory, tenant.requests)
        )
        other = max(int(memory_limit * OTHER), MIN_OTHER_BYTES)
        self.other = Budget(other, 0, half_of(other))
        self._cores = Budget(1, self.max_calls)

    @contextmanager
    def call(self, context: RequestContext) -> Iterator[None]:
        """Admits a call for the block, in which it occupies threads.

        A named tenant gets at most half of the calls, so that its silent calls block nobody.

        Raises:
            QueueFull: Too many calls run or wait.
        """
        try:
            self._calls.acquire(context, 1)
        except Full as full:
            raise QueueFull(
                "call",
                f"too many concurrent calls: {full.held} of {self.max_calls}, "
                f"{full.mine.amount} from this tenant; retry in {MIN_RETRY_SECONDS:g} s",
                MIN_RETRY_SECONDS,
            ) from None
        try:
            yield
        finally:
            for size in context.charges:
                self.other.release(context.tenant, size)
            self._calls.release(context.tenant, 1)

    @contextmanager
    def probe(self, cancel: Callable[[], object]) -> Iterator[None]:
        """Admits a health probe, which never waits.

        `cancel` ends the probe. It is called if MAX_PROBES other probes arrive before its end.
        """
        with self._lock:
            self._probes.append(cancel)
            oldest = self._probes.pop(0) if len(self._probes) > MAX_PROBES else None
        if oldest is not None:
            oldest()
        try:
            yield
        finally:
            with self._lock, suppress(ValueError):  # a later probe may have ended this one
                self._probes.remove(cancel)

    @contextmanager
    def first_message(self, context: RequestContext) -> Iterator[Callable[[int], None]]:
        """Reserves the memory of a request's first message. gRPC receives at most 1 MiB before.

        Yields:
            A function to call with the size of the message, once it is received.

        Raises:
            Cancelled: The request was cancelled while it waited.
        """
        with context.waiting(self._describe_messages):
            self.messages.acquire(context, MAX_MESSAGE_BYTES)
        held = MAX_MESSAGE_BYTES

        def shrink(size: int) -> None:
            nonlocal held
            self.messages.release(context.tenant, held - size, requests=0)
            held = size

        try:
            yield shrink
        finally:
            self.messages.release(context.tenant, held)

    @contextmanager
    def model(self, context: RequestContext, field: str, size: int) -> Iterator[None]:
        """Reserves the memory of a request's state_dict for the block.

        Args:
            context: The request.
            field: The field of its header that announces the bytes.
            size: The bytes of the state_dict.

        Raises:
            ModelTooLarge: They would never fit.
            QuotaExceeded: They would never fit the tenant's quota.
            QueueFull: Too many requests wait.
            Cancelled: The request was cancelled while it waited.
        """
        tenant = context.tenant
        self._check_model(tenant, field, size)

        def describe() -> str:
            return f"memory: {self._describe(tenant, self.models.state(tenant, size))}"

        with context.queueing(), context.waiting(describe):
            try:
                self.models.acquire(context, size)
            except Full as full:
                raise QueueFull(
                    "call",
                    f"{self._describe(tenant, full)}, and {full.waiting} requests wait",
                    min(max(full.longest, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS),
                ) from None
        context.reserved = size
        try:
            yield
        finally:
            context.reserved = 0
            self.models.release(tenant, size)

    @contextmanager
    def working_memory(
        self, context: RequestContext, field: str, size: int, what: str
    ) -> Iterator[None]:
        """Reserves memory beside the state_dict, out of the same budget, for the block.

        The request does not wait, since it holds a part of the budget.

        Args:
            context: The request, which holds the memory of its state_dict.
            field: The field of the request that needs it.
            size: An upper bound of its bytes.
            what: Describes the work that needs them, for the error.

        Raises:
            RequestTooLarge: They would never fit.
            QueueFull: They do not fit beside those of other requests.
        """
        if size < SMALL_BYTES:
            yield
            return
        tenant, most = context.tenant, self.models.limit_for(context.tenant)
        needs = (
            f"{what} takes up to {size} bytes of memory beside the {context.reserved} of the data"
        )
        if context.reserved + size > most:
            raise RequestTooLarge(
                field,
                f"{needs}, and at most {most} may be used at once (--memory-limit, or the tenant's "
                "`memory`); send fewer or smaller tensors, or ask the operator to raise it",
            )
        full = self.models.acquire_more(tenant, size)
        if full is not None:
            raise QueueFull(
                field, f"{needs}, and {self._describe(tenant, full)}", MIN_RETRY_SECONDS
            )
        try:
            yield
        finally:
            self.models.release(tenant, size, requests=0)

    def _describe_messages(self) -> str:
        held = f"those of other calls may take {self.messages.held} of {self.messages.limit}"
        return f"memory of its first message: {held} bytes"

    def _describe(self, tenant: Tenant, full: Full) -> str:
        """Describes what blocks a request."""
        who, mine = f"tenant {tenant.name!r} has", full.mine
        if full.quota == "requests":
            served = f"{mine.requests} of {tenant.requests} requests in service"
            return f"{who} {served} (`requests` in the tokens file)"
        if full.quota:
            served = f"{mine.amount} of {tenant.memory} bytes in service"
            return f"{who} {served} (`memory` in the tokens file)"
        return f"{full.held} of {self.models.limit} bytes are in service"

    def _check_model(self, tenant: Tenant, field: str, size: int) -> None:
        if size > self.models.limit:
            raise ModelTooLarge(
                field,
                f"{size} bytes are more than this server's {self.models.limit} (--memory-limit); "
                "send a smaller model, or ask the operator to raise the limit",
            )
        if size > self.models.limit_for(tenant):
            raise QuotaExceeded(
                field,
                f"{size} bytes are more than the {tenant.memory} of tenant {tenant.name!r}; send a "
                "smaller model, or ask the operator to raise `memory` in the tokens file",
            )

    def charge(self, context: RequestContext, field: str, size: int, what: str) -> None:
        """Counts the memory of headers, specs and plans until the request ends.

        The arguments and errors are those of RequestContext.charge.
        """
        if size < SMALL_BYTES:
            return
        most = self.other.limit_for(context.tenant)
        if size + sum(context.charges) > most:
            held = f" beside {sum(context.charges)} that the request already holds"
            raise RequestTooLarge(
                field,
                f"{what} takes up to {size} bytes of memory{held if context.charges else ''}, and "
                f"this server has {most} for it: split the request, or ask the operator to raise "
                "--memory-limit",
            )
        try:
            self.other.acquire(context, size)
        except Full as full:
            others = f"other requests hold {full.held} of {self.other.limit}"
            if full.quota:
                others = f"other requests of this tenant hold {full.mine.amount} of its {most}"
            raise QueueFull(
                field,
                f"{what} takes up to {size} bytes of memory, and {others}; retry later",
                MIN_RETRY_SECONDS,
            ) from None
        context.charges.append(size)

    @contextmanager
    def cores(self, context: RequestContext, size: int) -> Iterator[None]:
        """Reserves the cores for a state_dict of `size` bytes. A large one gets all cores.

        Several large ones at once would share the caches, and all would take longer.

        Raises:
            Cancelled: The request was cancelled while it waited.
        """
        if size <= ONE_CORE_BYTES:
            yield
            return
        with context.waiting(lambda: "the cores: another large model is using them"):
            self._cores.acquire(context, 1)
        try:
            yield
        finally:
            self._cores.release(context.tenant, 1)
