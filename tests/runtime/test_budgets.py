"""Shared resources other than the memory of state_dicts: calls, messages, headers, cores."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur_server.errors import Cancelled, QueueFull, RequestTooLarge
from secateur_server.runtime import budget
from secateur_server.runtime.budget import Budget, Full, Quota
from secateur_server.runtime.context import RequestContext, Tenant
from secateur_server.runtime.scheduler import (
    MAX_MESSAGE_BYTES,
    MAX_PROBES,
    MIN_OTHER_BYTES,
    ONE_CORE_BYTES,
    WORKERS,
    Scheduler,
)
from tests.conftest import eventually
from tests.contract.raw import unhurried

MIB = 1 << 20
ALICE, BOB = Tenant("alice", "a"), Tenant("bob", "b")


@pytest.fixture(autouse=True)
def _short_check_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "CHECK_SECONDS", 0.01)


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler(MIB, 0)


def request(scheduler: Scheduler, tenant: Tenant | None = None) -> RequestContext:
    context = RequestContext(charge=scheduler.charge)
    context.tenant = tenant or context.tenant
    return context


def test_charges_count_until_the_call_ends(scheduler: Scheduler) -> None:
    context = request(scheduler)
    with scheduler.call(context):
        context.charge("header", 3 * MIB, "decoding it")
        context.charge("data", 2 * MIB, "reading it")
        context.charge("data", 100, "less than is counted")
        assert scheduler.other.held == sum(context.charges) == 5 * MIB
    assert scheduler.other.held == 0


def test_failed_call_returns_its_charges(scheduler: Scheduler) -> None:
    context = request(scheduler)
    with suppress(RequestTooLarge), scheduler.call(context):
        context.charge("header", 3 * MIB, "decoding it")
        context.charge("header", MIN_OTHER_BYTES + 1, "decoding more")
    assert scheduler.other.held == 0


def test_charge_that_never_fits_is_refused_with_its_size(scheduler: Scheduler) -> None:
    with pytest.raises(RequestTooLarge) as caught:
        request(scheduler).charge("header.amounts", MIN_OTHER_BYTES + 1, "the plan")
    assert str(caught.value) == (
        f"header.amounts: the plan takes up to {MIN_OTHER_BYTES + 1} bytes of memory, and this "
        f"server has {MIN_OTHER_BYTES} for it: split the request, or ask the operator to "
        "raise --memory-limit"
    )
    assert caught.value.retry_after is None
    assert scheduler.other.held == 0


def test_charge_that_does_not_fit_beside_others_may_be_retried(scheduler: Scheduler) -> None:
    first, second = request(scheduler), request(scheduler)
    with scheduler.call(first), scheduler.call(second):
        first.charge("header", MIN_OTHER_BYTES - MIB, "decoding it")
        with pytest.raises(QueueFull, match=f"{MIN_OTHER_BYTES - MIB} of") as caught:
            second.charge("data", MIB + 1, "reading it")
        assert caught.value.retry_after
        second.charge("data", MIB, "reading it")


def test_named_tenant_gets_half_of_everything(scheduler: Scheduler) -> None:
    with ExitStack() as held:
        contexts = [request(scheduler, ALICE) for _ in range(WORKERS // 2)]
        for context in contexts:
            held.enter_context(scheduler.call(context))
        with pytest.raises(QueueFull, match="32 of 64, 32 from this tenant"):
            held.enter_context(scheduler.call(request(scheduler, ALICE)))
        contexts[0].charge("header", MIB, "decoding it")
        half = MIN_OTHER_BYTES // 2
        with pytest.raises(QueueFull, match=f"requests of this tenant hold {MIB} of its {half}"):
            contexts[1].charge("header", half, "decoding it")
        held.enter_context(scheduler.call(request(scheduler, BOB)))
        with pytest.raises(RequestTooLarge):
            contexts[0].charge("header", MIN_OTHER_BYTES // 2 + 1, "decoding it")
        for _ in range(MIN_OTHER_BYTES // MAX_MESSAGE_BYTES // 2):
            held.enter_context(scheduler.first_message(request(scheduler, ALICE)))
        waiting = Waiting(scheduler.first_message, request(scheduler, ALICE))
        eventually(lambda: scheduler.messages.waiting, 1)
        held.enter_context(scheduler.first_message(request(scheduler, BOB)))
        waiting.cancel()


class Waiting:
    """A request in its own thread, which waits to enter a block, and leaves it immediately."""

    def __init__(
        self,
        enter: Callable[[RequestContext], AbstractContextManager[object]],
        context: RequestContext,
    ) -> None:
        self.error: Exception | None = None
        self.has_entered = False
        self._enter, self._context = enter, context
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with self._enter(self._context):
                self.has_entered = True
        except Cancelled as error:
            self.error = error

    def join(self) -> None:
        self._thread.join(300)

    def cancel(self) -> None:
        self._context.cancel()
        self.join()
        assert self.error is not None


def test_received_message_frees_memory_for_the_next_one(scheduler: Scheduler) -> None:
    with ExitStack() as held:
        count = MIN_OTHER_BYTES // MAX_MESSAGE_BYTES
        messages = [
            held.enter_context(scheduler.first_message(request(scheduler))) for _ in range(count)
        ]
        waiting = Waiting(scheduler.first_message, request(scheduler))
        eventually(lambda: scheduler.messages.waiting, 1)
        messages[0](MIB)  # the next one still does not fit
        assert not waiting.has_entered
        for message in messages[1:]:
            message(MIB)
        waiting.join()
        assert waiting.has_entered
        assert scheduler.messages.held == count * MIB
    assert scheduler.messages.held == scheduler.messages.waiting == 0


def test_one_large_state_dict_has_the_cores_and_small_ones_do_not_wait(
    scheduler: Scheduler,
) -> None:
    def enter(context: RequestContext) -> AbstractContextManager[None]:
        return scheduler.cores(context, ONE_CORE_BYTES + 1)

    with enter(request(scheduler)):
        waiting = Waiting(enter, request(scheduler))
        left = Waiting(enter, request(scheduler))
        with scheduler.cores(request(scheduler), ONE_CORE_BYTES):
            pass
        left.cancel()
        assert not waiting.has_entered
    waiting.join()
    assert waiting.has_entered


def test_a_new_probe_ends_the_oldest_one(scheduler: Scheduler) -> None:
    ended: list[int] = []
    with ExitStack() as held:
        for number in range(MAX_PROBES + 2):
            held.enter_context(scheduler.probe(lambda number=number: ended.append(number)))  # type: ignore[misc]
    assert ended == [0, 1]


@unhurried
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 12)), max_size=30))
def test_a_budget_without_a_queue_grants_what_fits_and_no_more(
    asked: list[tuple[int, int]],
) -> None:
    """Each request is granted or refused immediately, compared with plain sums."""
    tenants = [ALICE, BOB, RequestContext().tenant]
    shared = Budget(20, 0, lambda tenant: Quota(10 if tenant.name else None, 3))
    granted: list[tuple[Tenant, int]] = []
    for which, amount in asked:
        tenant = tenants[which]
        mine = [size for owner, size in granted if owner is tenant]
        fits = sum(size for _, size in granted) + amount <= 20 and len(mine) < 3
        fits = fits and (not tenant.name or sum(mine) + amount <= 10)
        context = RequestContext()
        context.tenant = tenant
        if fits:
            shared.acquire(context, amount)
            granted.append((tenant, amount))
        else:
            with pytest.raises(Full):
                shared.acquire(context, amount)
        assert shared.held == sum(size for _, size in granted)
        if len(granted) == 5:
            tenant, size = granted.pop(0)
            shared.release(tenant, size)
    for tenant, size in granted:
        shared.release(tenant, size)
    assert shared.held == shared.waiting == 0
