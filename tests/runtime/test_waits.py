"""Messages and logs of calls that are cancelled while they wait."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import torch

import secateur
from secateur.errors import DeadlineExceeded
from secateur.progress import noting_waits
from secateur_proto.checkpoint_pb2 import PHASE_READ, PHASE_WAIT, Progress
from secateur_proto.pruner_pb2_grpc import PrunerStub
from secateur_server.api.convert.checkpoint import progress_message
from secateur_server.errors import Cancelled
from secateur_server.runtime.context import RequestContext, Tenant
from secateur_server.runtime.scheduler import ONE_CORE_BYTES, Scheduler
from tests.conftest import RunningServer, eventually, inner_server
from tests.contract.raw import failure, header, kept_open, message, series

LIMIT = 1 << 20
TENANT = Tenant("alice", "a" * 32, memory=100, requests=2)


def model(scheduler: Scheduler, context: RequestContext) -> Any:
    return scheduler.model(context, "header.data_bytes", 60)


def another(context: RequestContext) -> RequestContext:
    made = RequestContext()
    made.tenant = context.tenant
    return made


LIMITS: dict[str, tuple[Tenant, Callable[[Scheduler, RequestContext], Any], str]] = {
    "memory": (replace(TENANT, name="", memory=None), model, "memory: 60 of 100 bytes are in"),
    "memory of a tenant": (TENANT, model, "memory: tenant 'alice' has 60 of 100 bytes in"),
    "requests of a tenant": (
        replace(TENANT, memory=None, requests=1),
        model,
        "memory: tenant 'alice' has 1 of 1 requests in service (`requests` in the tokens file)",
    ),
    "cores": (
        TENANT,
        lambda scheduler, context: scheduler.cores(context, ONE_CORE_BYTES + 1),
        "the cores: another large model is using them",
    ),
    "first messages": (
        TENANT,
        lambda scheduler, context: scheduler.first_message(context),
        "memory of its first message: those of other calls may take 33554432 of 67108864 bytes",
    ),
}


@pytest.mark.parametrize("name", LIMITS)
def test_cancelled_request_says_what_it_waited_for(name: str) -> None:
    tenant, enter, what = LIMITS[name]
    scheduler, holder = Scheduler(100 if "tenant" not in name else 1000, 5), RequestContext()
    holder.tenant = tenant
    waiting, phases = another(holder), list[int]()
    with ExitStack() as held:
        held.enter_context(enter(scheduler, holder))
        if name == "first messages":  # a tenant may send two at once
            held.enter_context(enter(scheduler, another(holder)))
        stopped = threading.Thread(target=_enter, args=(enter, scheduler, waiting))
        stopped.start()
        eventually(lambda: waiting.is_waiting, True)
        phases.append(progress_message(waiting).phase)
        waiting.cancel()
        stopped.join(300)
        phases.append(progress_message(waiting).phase)
    assert f" s for {what}" in waiting.waited_for
    assert phases == [PHASE_WAIT, PHASE_READ]
    assert holder.waited_for == ""


def _enter(enter: Any, scheduler: Scheduler, context: RequestContext) -> None:
    with pytest.raises(Cancelled), enter(scheduler, context):
        pass


def test_running_request_waited_for_nothing() -> None:
    scheduler, context = Scheduler(100, 5), RequestContext()
    with model(scheduler, context):
        context.cancel()
        with pytest.raises(Cancelled):
            context.check()
    assert context.waited_for == ""


# A real server -------------------------------------------------------------------------------


@pytest.fixture
def small() -> Iterator[RunningServer]:
    """A server that admits 1 MiB of models, and does not cut silent calls off during a test."""
    with inner_server("--memory-limit", str(LIMIT), "--idle-timeout", "300") as running:
        yield running


@contextmanager
def held(server: RunningServer, channel: grpc.Channel) -> Iterator[None]:
    """In the block one call holds all memory for models."""
    first = message("Report", header=header("Report", LIMIT), data=b"\x10")
    with kept_open([first]) as messages:
        call = PrunerStub(channel).Report.future(messages, timeout=300)
        eventually(lambda: series(server, "secateur_model_bytes"), float(LIMIT))
        try:
            yield
        finally:
            call.cancel()


def until_queued(server: RunningServer, begin: Callable[[float], Any]) -> Any:
    """Begins a call with a short deadline that waits. A busy machine may need a longer one."""
    for seconds in (1, 10, 100):
        eventually(lambda: queued(server), False)
        call = begin(seconds)
        eventually(lambda: queued(server) or call.done(), True)  # noqa: B023
        if queued(server):
            return call
    raise AssertionError("it never waited")


def queued(server: RunningServer) -> bool:
    return series(server, "secateur_requests_waiting") == 1


def lines(caplog: pytest.LogCaptureFixture, **fields: str) -> list[dict[str, Any]]:
    calls = [record.call for record in caplog.records if hasattr(record, "call")]
    return [call for call in calls if all(call[name] == fields[name] for name in fields)]


def test_the_log_says_that_a_call_waited_until_its_deadline(
    small: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "secateur_server")
    first = message("Report", header=header("Report", 1000), data=b"\x10")
    ids = list[str]()
    with grpc.insecure_channel(small.address) as channel, held(small, channel):

        def begin(seconds: float) -> Any:
            ids.append(f"late-{seconds}")
            named = (("x-request-id", ids[-1]),)
            return PrunerStub(channel).Report.future(iter([first]), timeout=seconds, metadata=named)

        found = failure(until_queued(small, begin).result)
        assert found is not None
        assert found.code == grpc.StatusCode.DEADLINE_EXCEEDED
        eventually(lambda: bool(lines(caplog, code="DeadlineExceeded", id=ids[-1])), True)
        (line,) = lines(caplog, code="DeadlineExceeded", id=ids[-1])
    what = f"memory: {LIMIT} of {LIMIT} bytes are in service"
    assert line["waited_for"].endswith(f" s for {what}")
    assert line["error"] == f"call: deadline exceeded; it waited {line['waited_for']}"
    assert line["queue_seconds"] > 0
    eventually(lambda: len(lines(caplog, code="Canceled")), 1)  # the holder
    assert "waited_for" not in lines(caplog, code="Canceled")[0]


def test_log_says_that_a_call_waited_until_it_was_cancelled(
    small: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A call on a checkpoint reports to the caller that it waits."""
    caplog.set_level("INFO", "secateur_server")
    with (
        secateur.Client(small.address, timeout=300) as client,
        grpc.insecure_channel(small.address) as channel,
    ):
        name = client.upload({"w": torch.ones(8)}).name
        with held(small, channel):
            first = message("Prune", header=header("Prune", 0, checkpoint=name))
            call = PrunerStub(channel).Prune(iter([first]), timeout=300)
            assert any(answer.progress.phase == PHASE_WAIT for answer in call)
            call.cancel()
            eventually(lambda: len(lines(caplog, code="Canceled")), 1)
            (line,) = lines(caplog, code="Canceled")
    assert line["waited_for"].endswith(" bytes are in service")


def test_the_client_says_that_a_call_waited(small: RunningServer) -> None:
    """In its own error, or in the server's, whichever arrives first."""
    found: list[Exception] = []

    def prune(seconds: float) -> Any:
        def call() -> None:
            with (
                secateur.Client(small.address, timeout=seconds) as hurried,
                pytest.raises(DeadlineExceeded) as caught,
            ):
                hurried.prune(checkpoint, secateur.l1_unstructured("w", 0.5))
            found.append(caught.value)

        thread = threading.Thread(target=call)
        thread.start()
        return SimpleNamespace(done=lambda: not thread.is_alive(), result=thread.join)

    with (
        secateur.Client(small.address, timeout=300) as client,
        grpc.insecure_channel(small.address) as channel,
    ):
        checkpoint = client.upload({"w": torch.ones(8)})
        with held(small, channel):
            until_queued(small, prune).result()
    assert " waited " in str(found[-1])
    assert " memory" in str(found[-1])


def test_client_reports_the_last_state_that_it_received() -> None:
    def fails_after(*phases: Any, error: Exception) -> str:
        seen: list[Any] = []

        def call() -> None:
            with noting_waits(seen.append) as told:
                for phase in phases:
                    told(Progress(phase=phase))
                raise error

        with pytest.raises(DeadlineExceeded) as caught:
            call()
        assert [progress.phase for progress in seen] == list(phases)
        return str(caught.value)

    late, of_server = DeadlineExceeded("late"), DeadlineExceeded("call: deadline exceeded")
    of_server.request_id = "1"
    assert fails_after(PHASE_READ, PHASE_WAIT, error=late).startswith(
        "late; until then the call wa"
    )
    assert fails_after(PHASE_WAIT, PHASE_READ, error=late) == "late"
    assert fails_after(error=late) == "late"
    assert fails_after(PHASE_WAIT, error=of_server) == "call: deadline exceeded"
