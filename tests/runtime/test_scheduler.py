"""Models are admitted by their size, in a fair order, and the queue is limited."""

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from grpc_status import rpc_status
from hypothesis import example, given
from hypothesis import strategies as st

import secateur
from secateur import errors
from secateur.literals import Output
from secateur_proto.pruner_pb2_grpc import PrunerStub
from secateur_server.errors import Cancelled, ModelTooLarge, QueueFull, QuotaExceeded
from secateur_server.runtime import budget
from secateur_server.runtime.context import RequestContext, Tenant
from secateur_server.runtime.scheduler import MAX_PROBES, WORKERS, Scheduler
from tests.conftest import RunningServer, eventually, inner_server, start_server, stop_server
from tests.contract.raw import (
    OWN_CONNECTION,
    Failure,
    bearer,
    check_failed,
    check_serves,
    failure,
    file,
    header,
    kept_open,
    message,
    open_streams,
    series,
    unhurried,
)
from tests.processes import thread_ids

# The class by itself -----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _short_check_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "CHECK_SECONDS", 0.01)


class Caller:
    """A call in its own thread, which holds its model until `leave`."""

    def __init__(self, scheduler: Scheduler, tenant: Tenant, size: int) -> None:
        self.tenant, self.size = tenant, size
        self.state = "waiting"
        self.error: BaseException | None = None
        self.context = RequestContext()
        self._scheduler = scheduler
        self._leaves = threading.Event()
        self._thread = threading.Thread(target=self._call, daemon=True)
        self._thread.start()

    def _call(self) -> None:
        self.context.tenant = self.tenant
        try:
            with self._scheduler.model(self.context, "header.data_bytes", self.size):
                self.state = "served"
                self._leaves.wait()
            self.state = "left"
        except (QueueFull, Cancelled, ModelTooLarge, QuotaExceeded) as error:
            self.error = error
            self.state = "refused" if isinstance(error, QueueFull) else "stopped"

    def leave(self) -> None:
        self._leaves.set()
        self._thread.join(300)

    def stop(self) -> None:
        self.context.cancel()
        self._thread.join(300)


@dataclass(eq=False)
class Modelled:
    """The state of a request by the documented rule."""

    tenant: Tenant
    size: int
    state: str = "waiting"


@dataclass
class Rule:
    """The documented rule, by brute force over all requests in the order of their arrival."""

    limit: int
    max_waiting: int
    requests: list[Modelled] = field(default_factory=list)
    admitted: list[str] = field(default_factory=list)  # owners, in the order of their turns

    def all(self, state: str, owner: str | None = None) -> list[Modelled]:
        return [
            one for one in self.requests if one.state == state and owner in (None, one.tenant.owner)
        ]

    def held(self, owner: str | None = None) -> int:
        return sum(one.size for one in self.all("served", owner))

    def arrive(self, tenant: Tenant, size: int) -> Modelled:
        one = Modelled(tenant, size)
        self.requests.append(one)
        self.settle()
        waiting = self.all("waiting")
        if one in waiting and len(waiting) > self.max_waiting:
            most = max(len(self.all("waiting", other.tenant.owner)) for other in waiting)
            full = [w for w in waiting if len(self.all("waiting", w.tenant.owner)) == most]
            full[-1].state = "refused"
        return one

    def end(self, one: Modelled, state: str) -> None:
        one.state = state
        self.settle()

    def settle(self) -> None:
        while able := [one for one in self.all("waiting") if self.is_able(one)]:
            least = min(self.held(one.tenant.owner) for one in able)
            of_least = [one for one in able if self.held(one.tenant.owner) == least]
            longest_ago = min(self.turn(one.tenant.owner) for one in of_least)
            following = next(one for one in of_least if self.turn(one.tenant.owner) == longest_ago)
            if self.held() + following.size > self.limit:
                return
            following.state = "served"
            self.admitted.append(following.tenant.owner)

    def is_able(self, one: Modelled) -> bool:
        tenant = one.tenant
        served = self.all("served", tenant.owner)
        return (
            self.all("waiting", tenant.owner)[0] is one
            and (tenant.requests is None or len(served) < tenant.requests)
            and (tenant.memory is None or self.held(tenant.owner) + one.size <= tenant.memory)
        )

    def turn(self, owner: str) -> int:
        """Returns when a tenant that has always had requests was last admitted, or -1."""
        turns = [index for index, name in enumerate(self.admitted) if name == owner]
        return turns[-1] if turns else -1

    def forget(self) -> None:
        """Forgets the turns of tenants without requests."""
        present = {one.tenant.owner for one in self.all("waiting") + self.all("served")}
        self.admitted = [owner if owner in present else "" for owner in self.admitted]


def states(requests: Sequence[Caller | Modelled]) -> list[str]:
    return [one.state for one in requests]


TENANTS = (
    Tenant("a", "a"),
    Tenant("b", "b"),
    Tenant("of memory", "c", memory=6),
    Tenant("of requests", "d", requests=1),
)
LIMIT = 10

Step = tuple[str, int, int]
ARRIVALS = st.tuples(st.just("arrive"), st.integers(0, 3), st.integers(1, LIMIT))
ENDS = st.tuples(st.sampled_from(["leave", "stop"]), st.integers(0, 9), st.just(0))


@unhurried
@given(max_waiting=st.integers(0, 6), steps=st.lists(ARRIVALS | ARRIVALS | ENDS, max_size=30))
# One tenant floods with models that fill the limit, and another one arrives in between.
@example(6, [("arrive", 0, LIMIT)] * 5 + [("arrive", 1, LIMIT)] + [("leave", 0, 0)] * 6)
@example(2, [("arrive", 0, LIMIT)] * 3 + [("arrive", 1, 1), ("stop", 0, 0), ("leave", 0, 0)])
def test_every_order_of_arrivals_and_ends_follows_the_rule(
    max_waiting: int, steps: list[Step]
) -> None:
    scheduler, rule = Scheduler(LIMIT, max_waiting), Rule(LIMIT, max_waiting)
    callers: list[Caller] = []

    def end(kind: str, which: int) -> None:
        found = rule.all("served" if kind == "leave" else "waiting")
        if found:
            one = found[which % len(found)]
            caller = callers[rule.requests.index(one)]
            rule.end(one, "left" if kind == "leave" else "stopped")
            caller.leave() if kind == "leave" else caller.stop()

    def check() -> None:
        rule.forget()
        expected = rule.held(), len(rule.all("waiting")), states(rule.requests)
        eventually(
            lambda: (scheduler.models.held, scheduler.models.waiting, states(callers)), expected
        )
        assert rule.held() <= LIMIT
        assert len(rule.all("waiting")) <= max_waiting

    for kind, which, size in steps:
        if kind == "arrive":
            tenant = TENANTS[which]
            size = min(size, tenant.memory or LIMIT)
            callers.append(Caller(scheduler, tenant, size))
            rule.arrive(tenant, size)
        else:
            end(kind, which)
        check()
    while rule.all("served"):  # waiting requests are admitted as others leave
        end("leave", 0)
        check()
    assert scheduler.models.held == scheduler.models.waiting == 0
    assert {caller.state for caller in callers} <= {"left", "refused", "stopped"}


def arrived(
    scheduler: Scheduler, *requests: tuple[Tenant, int], after: Sequence[Caller] = ()
) -> list[Caller]:
    """Starts callers one after another, each when the states of all earlier ones are known."""
    callers = list(after)
    for tenant, size in requests:
        callers.append(Caller(scheduler, tenant, size))
        eventually(lambda: states(callers).count("waiting") == scheduler.models.waiting, True)
    return callers[len(after) :]


A, B, OF_MEMORY, OF_REQUESTS = TENANTS


def test_flooding_tenant_is_served_in_turn_with_others() -> None:
    """Each model fills the limit, so no tenant holds memory when the next one is chosen."""
    scheduler = Scheduler(LIMIT, 10)
    flood = arrived(scheduler, *[(A, LIMIT)] * 4)
    (other,) = arrived(scheduler, (B, LIMIT), after=flood)
    flood[0].leave()
    eventually(lambda: states([*flood[1:], other]), ["waiting"] * 3 + ["served"])
    other.leave()
    eventually(lambda: states(flood[1:]), ["served", "waiting", "waiting"])
    for caller in flood[1:]:
        caller.leave()
    assert scheduler.models.held == 0


def test_small_models_do_not_overtake_a_large_one() -> None:
    scheduler = Scheduler(LIMIT, 10)
    held, large, small = arrived(scheduler, (A, 5), (B, 8), (A, 1))
    assert states([held, large, small]) == ["served", "waiting", "waiting"]
    held.leave()
    eventually(lambda: states([large, small]), ["served", "served"])
    large.leave()
    small.leave()


def test_full_queue_refuses_the_newest_request_of_the_largest_tenant() -> None:
    scheduler = Scheduler(LIMIT, 3)
    callers = arrived(scheduler, (A, LIMIT), (A, 1), (A, 2), (A, 3), (B, 4))
    eventually(lambda: states(callers), ["served", "waiting", "waiting", "refused", "waiting"])
    error = callers[3].error
    assert isinstance(error, QueueFull)
    assert error.retry_after is not None
    assert 1 <= error.retry_after <= 30
    assert "10 of 10 bytes are in service, and 3 requests wait" in str(error)
    for caller in callers[:3]:
        caller.leave()
    callers[4].leave()
    assert scheduler.models.held == scheduler.models.waiting == 0


def test_cancelled_waiter_unblocks_those_behind_it() -> None:
    scheduler = Scheduler(LIMIT, 2)
    held, large, small = arrived(scheduler, (A, 5), (B, 8), (B, 5))
    large.stop()
    assert isinstance(large.error, Cancelled)
    eventually(lambda: states([held, small]), ["served", "served"])
    assert scheduler.models.waiting == 0
    held.leave()
    small.leave()


def test_tenant_that_waits_for_its_quota_blocks_nobody() -> None:
    scheduler = Scheduler(LIMIT, 10)
    callers = arrived(
        scheduler,
        *[(OF_MEMORY, 5), (OF_MEMORY, 2), (OF_REQUESTS, 1), (OF_REQUESTS, 1)],
        *[(B, 2), (A, 2)],
    )
    by_the_limit = ["served", "waiting", "served", "waiting", "served", "served"]
    eventually(lambda: states(callers), by_the_limit)
    callers[0].leave()
    callers[2].leave()
    eventually(lambda: states(callers[1:2] + callers[3:4]), ["served", "served"])
    for caller in callers:
        caller.leave()
    assert scheduler.models.held == 0


@pytest.mark.parametrize(
    ("requests", "waits_for"),
    [
        (
            [(OF_REQUESTS, 2), (OF_REQUESTS, 1), (OF_REQUESTS, 1)],
            "tenant 'of requests' has 1 of 1 requests in service (`requests` in the tokens file)",
        ),
        (
            [(OF_MEMORY, 4), (OF_MEMORY, 3), (OF_MEMORY, 3)],
            "tenant 'of memory' has 4 of 6 bytes in service (`memory` in the tokens file)",
        ),
        ([(A, 8), (OF_REQUESTS, 3), (OF_REQUESTS, 3)], "8 of 10 bytes are in service"),
    ],
)
def test_refusal_says_what_blocked_the_request(
    requests: list[tuple[Tenant, int]], waits_for: str
) -> None:
    scheduler = Scheduler(LIMIT, 1)
    holder, waiting, refused = arrived(scheduler, *requests)
    assert states([holder, waiting, refused]) == ["served", "waiting", "refused"]
    assert str(refused.error) == f"call: {waits_for}, and 1 requests wait"
    assert scheduler.models.waiting_for_quota == ("tokens file" in waits_for)
    waiting.stop()
    holder.leave()


def test_waits_for_memory_and_for_a_quota_are_counted_apart() -> None:
    scheduler = Scheduler(LIMIT, 10)
    callers = arrived(scheduler, (OF_REQUESTS, 1), (A, 9), (OF_REQUESTS, 1), (OF_MEMORY, 2), (B, 1))
    assert states(callers) == ["served", "served", "waiting", "waiting", "waiting"]
    assert scheduler.models.waiting == 3
    assert scheduler.models.waiting_for_quota == 1
    for caller in callers:
        caller.leave()


def test_request_that_never_fits_is_refused_at_once_and_holds_nothing() -> None:
    scheduler = Scheduler(LIMIT, 10)
    large, above_quota = arrived(scheduler, (A, LIMIT + 1), (OF_MEMORY, 7))
    eventually(lambda: states([large, above_quota]), ["stopped", "stopped"])
    assert isinstance(large.error, ModelTooLarge)
    assert isinstance(above_quota.error, QuotaExceeded)
    assert scheduler.models.held == scheduler.models.waiting == 0


def test_racing_threads_keep_within_the_limit_and_all_finish() -> None:
    """The callers add up what they hold, and some of them cancel while they wait."""
    scheduler, lock = Scheduler(100, 1000), threading.Lock()
    held, most = 0, 0
    ended: list[str] = []

    def call(seed: int) -> None:
        nonlocal held, most
        chance = random.Random(seed)
        for _ in range(60):
            size, context = chance.randint(1, 100), RequestContext()
            if chance.random() < 0.3:
                threading.Timer(chance.uniform(0, 0.02), context.cancel).start()
            context.tenant = chance.choice(TENANTS[:2])
            how = "stopped"
            with contextlib.suppress(Cancelled), scheduler.model(context, "", size):
                with lock:
                    held += size
                    most = max(most, held)
                threading.Event().wait(chance.uniform(0, 0.001))
                with lock:
                    held -= size
                how = "served"
            ended.append(how)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(call, range(16)))
    assert len(ended) == 16 * 60
    assert ended.count("served") > 16 * 60 // 2
    assert 50 < most <= 100
    assert scheduler.models.held == scheduler.models.waiting == held == 0


# A real server ------------------------------------------------------------------------------------

LIMIT_BYTES = 4 << 20
QUEUE_SIZE = 3
FLOOD, POLITE, SMALL = "flood-0123456789", "polite-0123456789", "small-0123456789"
TENANTS_FILE = f"""
[tenants.flood]
tokens = ["{FLOOD}"]
[tenants.polite]
tokens = ["{POLITE}"]
[tenants.small]
tokens = ["{SMALL}"]
memory = "1MiB"
requests = 1
"""


@pytest.fixture(scope="module")
def small_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that admits 4 MiB of models, and has a queue of 3 requests."""
    tokens = tmp_path_factory.mktemp("tokens") / "tokens.toml"
    tokens.write_text(TENANTS_FILE)
    options = ("--memory-limit", str(LIMIT_BYTES), "--queue-size", str(QUEUE_SIZE))
    with inner_server(*options, "--tokens-file", str(tokens)) as running:
        yield running


@pytest.fixture
def calls(small_server: RunningServer) -> Iterator["Calls"]:
    with grpc.insecure_channel(small_server.address) as channel, open_streams() as stream:
        made = Calls(small_server, channel, stream)
        yield made
        made.end()
        for name in ("model_bytes", "requests_waiting", "requests_in_flight"):
            eventually(lambda name=name: made.series(name), 0.0)  # type: ignore[misc]


class Calls:
    """Calls to a server that last until the test ends them."""

    def __init__(
        self,
        server: RunningServer,
        channel: grpc.Channel,
        stream: Callable[[Sequence[Any]], Iterator[Any]],
    ) -> None:
        self._server, self._stub, self._stream = server, PrunerStub(channel), stream
        self._made: list[Any] = []

    def series(self, name: str, **labels: str) -> float:
        return series(self._server, f"secateur_{name}", **labels)

    def begin(self, who: str, size: int) -> Any:
        """Begins a call that announces `size` bytes and sends one. Returns when it has arrived."""
        before = self._begun()
        first = message("Report", header=header("Report", size), data=b"\x10")
        messages = self._stream([first])
        call = self._stub.Report.future(messages, metadata=bearer(who), timeout=300)
        self._made.append(call)
        eventually(lambda: call.done() or self._begun() > before, True)
        return call

    def _begun(self) -> float:
        return self.series("model_bytes") + self.series("requests_waiting")

    def report(self, who: str, data: bytes) -> Any:
        """Begins a complete call."""
        first = message("Report", header=header("Report", len(data)), data=data)
        return self._stub.Report.future(iter([first]), metadata=bearer(who), timeout=300)

    def fill(self) -> Any:
        """Fills the memory and the queue. Returns the call that holds the memory."""
        holder = self.begin(FLOOD, LIMIT_BYTES)
        for _ in range(QUEUE_SIZE):
            self.begin(FLOOD, 1000)
        assert self.series("model_bytes") == self.series("memory_limit_bytes") == LIMIT_BYTES
        assert self.series("requests_waiting") == self.series("queue_limit") == QUEUE_SIZE
        return holder

    def refused(self) -> float:
        return self.series("rejected_requests_total", reason="QUEUE_FULL")

    def end(self) -> None:
        for call in self._made:
            call.cancel()


def ending(call: Any) -> Failure | None:
    """Waits for the end of a call. Returns how it failed, or None."""
    return failure(call.result, timeout=300)


def retry_delay(call: Any) -> float | None:
    """Returns the delay of google.rpc.RetryInfo of a failed call, in seconds."""
    retry, status = RetryInfo(), rpc_status.from_call(call)
    found = [detail.Unpack(retry) for detail in (status.details if status else ())]
    return retry.retry_delay.ToTimedelta().total_seconds() if any(found) else None


SMALL_FILE = file({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8)


def client_of(server: RunningServer, who: str, timeout: float) -> secateur.Client:
    return secateur.Client(server.address, token=who, timeout=timeout)


MODEL = {"w": np.ones(100, np.float32)}


def test_request_that_does_not_fit_waits_for_memory(calls: Calls) -> None:
    holder = calls.begin(FLOOD, LIMIT_BYTES - len(SMALL_FILE))
    assert ending(calls.report(POLITE, SMALL_FILE)) is None  # it fits to the byte
    calls.begin(FLOOD, len(SMALL_FILE))
    waiting = [calls.report(FLOOD, SMALL_FILE) for _ in range(QUEUE_SIZE)]
    eventually(lambda: calls.series("requests_waiting"), float(QUEUE_SIZE))
    assert calls.series("model_bytes") == LIMIT_BYTES
    assert calls.series("requests_waiting_for_quota") == 0
    assert not any(call.done() for call in waiting)
    holder.cancel()
    assert [ending(call) for call in waiting] == [None] * QUEUE_SIZE


def test_request_beyond_the_queue_gets_a_retry_delay(calls: Calls) -> None:
    calls.fill()
    before = calls.refused()
    call = calls.report(FLOOD, SMALL_FILE)
    found = ending(call)
    found = check_failed(found, grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert (
        f"{LIMIT_BYTES} of {LIMIT_BYTES} bytes are in service, and 3 requests wait" in found.message
    )
    delay = retry_delay(call)
    assert delay is not None
    assert 1 <= delay <= 30
    assert calls.refused() == before + 1


def test_client_retries_by_itself(small_server: RunningServer, calls: Calls) -> None:
    calls.fill()
    before = calls.refused()
    with client_of(small_server, FLOOD, 60) as client, ThreadPoolExecutor() as pool:
        answer = pool.submit(client.prune, MODEL, secateur.l1_unstructured("w", 0.5))
        eventually(lambda: calls.refused() > before, True)
        calls.end()
        assert answer.result(timeout=300).report.zeros == 50


def test_client_gives_up_at_its_deadline(
    small_server: RunningServer, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server asks for a delay of 1 s or more, which is beyond the deadline."""
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: pytest.fail("it waits"))
    monkeypatch.setattr("secateur.calls.patience.time", clock)
    monkeypatch.setattr("secateur.blocking.time", clock)
    calls.fill()
    with client_of(small_server, FLOOD, 0.9) as client:
        error = error_of_a_full_server(client)
    assert error.retry_after is not None
    assert error.retry_after >= 1
    assert error.request_id


def error_of_a_full_server(client: secateur.Client) -> secateur.ServerBusy:
    """Calls a full server until it answers within the deadline, and returns the error."""
    for _ in range(60):
        try:
            client.prune(MODEL, secateur.l1_unstructured("w", 0.5))
        except secateur.ServerBusy as error:
            return error
        except secateur.DeadlineExceeded:
            pass
    raise AssertionError("a minute without an answer")


def test_flooding_tenant_does_not_block_others(small_server: RunningServer, calls: Calls) -> None:
    """The flood fills the memory and the queue; each of its models fills all memory."""
    holder, *waiting = (calls.begin(FLOOD, LIMIT_BYTES) for _ in range(1 + QUEUE_SIZE))
    with client_of(small_server, POLITE, 30) as polite, ThreadPoolExecutor() as pool:
        answer = pool.submit(polite.report, MODEL)
        found = ending(waiting[-1])  # it is removed from the queue
        assert found is not None
        assert found.reason == "QUEUE_FULL"
        assert not answer.done()
        holder.cancel()
        assert answer.result(timeout=300).total == 100
    eventually(lambda: calls.series("requests_waiting"), 1.0)  # then the flood continues
    assert not any(call.done() for call in waiting[:-1])


def test_quota_blocks_its_own_tenant_only(small_server: RunningServer, calls: Calls) -> None:
    calls.begin(SMALL, 1000)
    second = calls.begin(SMALL, 1000)
    assert calls.series("requests_waiting") == calls.series("requests_waiting_for_quota") == 1
    assert ending(calls.report(POLITE, SMALL_FILE)) is None
    assert not second.done()
    found = ending(calls.begin(SMALL, (1 << 20) + 1))
    check_failed(found, grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
    large = {"w": np.ones(1 << 19, np.float32)}
    with client_of(small_server, SMALL, 20) as small, pytest.raises(errors.QuotaExceeded):
        small.report(large)


def test_request_that_never_fits_is_refused_at_once_behind_a_queue(
    small_server: RunningServer, calls: Calls
) -> None:
    calls.fill()
    call = calls.begin(POLITE, LIMIT_BYTES + 1)
    found = ending(call)
    check_failed(found, grpc.StatusCode.RESOURCE_EXHAUSTED, "MODEL_TOO_LARGE")
    assert retry_delay(call) is None
    large = {"w": np.ones(LIMIT_BYTES // 4, np.float32)}
    with client_of(small_server, POLITE, 20) as polite, pytest.raises(secateur.ModelTooLarge):
        polite.prune(large, secateur.l1_unstructured("w", 0.5))


def test_limits_hold_under_load(small_server: RunningServer, calls: Calls) -> None:
    spec = secateur.l1_unstructured("w", 0.5)
    is_seen = threading.Event()  # set once memory and queue have been in use

    def work(seed: int) -> None:
        chance, count = random.Random(seed), 0
        with client_of(small_server, chance.choice([FLOOD, POLITE]), 300) as client:
            while count < 4 or not is_seen.is_set():
                elements = chance.randint(1000, LIMIT_BYTES // 4 - 100)
                report = client.prune({"w": np.ones(elements, np.float32)}, spec).report
                assert report.total == elements
                count += 1

    most_held = max_waiting = 0.0
    with ThreadPoolExecutor() as pool:
        workers = [pool.submit(work, seed) for seed in range(10)]
        while not all(worker.done() for worker in workers):
            most_held = max(most_held, calls.series("model_bytes"))
            max_waiting = max(max_waiting, calls.series("requests_waiting"))
            if most_held > LIMIT_BYTES / 4 and max_waiting > 0:
                is_seen.set()
        for worker in workers:
            worker.result()
    assert LIMIT_BYTES / 4 < most_held <= LIMIT_BYTES
    assert 0 < max_waiting <= QUEUE_SIZE


# Storms -------------------------------------------------------------------------------------------


Action = Callable[[grpc.Channel, secateur.Client, random.Random], object]


def _cancelled(channel: grpc.Channel, client: secateur.Client, chance: random.Random) -> None:
    """Makes a call of any size that ends at any moment, by cancellation or by its deadline."""
    head = header("Prune", chance.randint(100, LIMIT_BYTES))
    timeout = chance.uniform(0.001, 0.3)
    with kept_open([message("Prune", header=head, data=b"\x10")]) as messages:
        call = PrunerStub(channel).Prune(messages, timeout=timeout)
        if chance.random() < 0.5:
            threading.Event().wait(chance.uniform(0, 0.1))
            call.cancel()
        with contextlib.suppress(grpc.RpcError):
            list(call)


def _hurried(channel: grpc.Channel, client: secateur.Client, chance: random.Random) -> None:
    """Prunes a model, if the deadline allows it."""
    model = {"w": np.ones(chance.randint(1, LIMIT_BYTES // 4 - 100), np.float32)}
    with contextlib.suppress(secateur.SecateurError):
        outputs: list[Output] = ["masks", "dense", "none"]
        output = chance.choice(outputs)
        client.prune(model, secateur.l1_unstructured("w", 0.5), output=output)


def _malformed(channel: grpc.Channel, client: secateur.Client, chance: random.Random) -> None:
    data = chance.randbytes(chance.randint(0, 100))
    first = header("Report", chance.randint(0, 2 * LIMIT_BYTES))
    requests = iter([message("Report", header=first, data=data)])
    failure(PrunerStub(channel).Report, requests, timeout=300)


ACTIONS: tuple[Action, ...] = (_cancelled, _cancelled, _hurried, _malformed)


def storm(server: RunningServer, callers: int, calls: int) -> None:
    """Runs callers that each make `calls` random calls."""

    def rage(seed: int) -> None:
        chance = random.Random(seed)
        own = [OWN_CONNECTION] if seed % 4 == 0 else []
        with (
            grpc.insecure_channel(server.address, own) as channel,
            secateur.Client(channel=channel, timeout=chance.uniform(0.1, 2)) as client,
        ):
            for _ in range(calls):
                chance.choice(ACTIONS)(channel, client, chance)

    with ThreadPoolExecutor(callers) as pool:
        list(pool.map(rage, range(callers)))


@pytest.mark.parametrize(
    ("callers", "calls"), [(30, 6), pytest.param(200, 60, marks=pytest.mark.slow)]
)
def test_budgets_are_empty_after_a_burst(callers: int, calls: int) -> None:
    server = start_server("--memory-limit", str(LIMIT_BYTES), "--queue-size", "16")
    with grpc.insecure_channel(server.address) as channel:
        storm(server, callers, calls)
        assert series(server, "grpc_server_started_total") > callers
        check_serves(server, channel)
        assert series(server, "secateur_requests_waiting") == 0
        # The threads of the pools for calls, for receiving and for work; and gRPC's own.
        calls, extra = WORKERS + 16, 2 * MAX_PROBES
        assert len(thread_ids(server.process.pid)) <= 2 * (calls + extra) + calls + 40
        check_all_workers_are_available(server, channel)
    logged = stop_server(server)
    assert "Traceback" not in logged, logged


def check_all_workers_are_available(server: RunningServer, channel: grpc.Channel) -> None:
    """Checks that the server still accepts as many calls at once as it has workers."""
    first = message("Report", header=header("Report", 1000), data=b"\x10")
    report = PrunerStub(channel).Report
    with open_streams() as stream:
        calls = [report.future(stream([first]), timeout=300) for _ in range(WORKERS + 16)]
        eventually(lambda: series(server, "secateur_model_bytes"), 1000.0 * (WORKERS + 16))
        for call in calls:
            call.cancel()
    check_serves(server, channel)
