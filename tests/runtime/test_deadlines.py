"""Cancellation and deadlines end the work soon, in every phase.

Soon means little CPU time of the server after the end, because wall time depends on the load of the
machine.
"""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
import torch
from torch import Tensor

import secateur
from secateur_proto import pruner_pb2 as pb
from secateur_proto.checkpoint_pb2 import PHASE_PRUNE
from secateur_proto.framing import cut, file_header
from secateur_proto.plan_pb2 import Amount
from secateur_proto.pruner_pb2_grpc import PrunerStub
from secateur_proto.spec_pb2 import (
    Block,
    GuardRails,
    Magnitude,
    Pattern,
    PruningSpec,
    Rail,
    Random,
)
from tests.conftest import RunningServer, eventually, start_server, stop_server
from tests.contract.raw import check_serves, failure, header, message, series, spec
from tests.processes import cpu_seconds, memory

# CPU seconds that the server may use after the end of a call, including requests for its metrics.
SOON = 2.0

ELEMENTS = 100 << 20
SHAPE = (ELEMENTS >> 12, 1 << 12)
SLICE, N_M, BLOCK = 2, 3, 4  # as granularity
GLOBAL, LAMP, Z_SCORE = 2, 4, 4
CAP = Rail(max_sparsity=0.9)
SPECS: dict[str, PruningSpec] = {
    "unstructured": spec("w"),
    "random": spec("w", random=Random(seed=1)),
    "structured": spec("w", granularity=SLICE, dim=1, magnitude=Magnitude(p=2)),
    "2:4": spec("w", fraction=1.0, granularity=N_M, dim=1, pattern=Pattern(n=2, m=4)),
    "blocks": spec("w", granularity=BLOCK, block=Block(shape=[8, 8], as_matrix=True)),
    "lamp": spec("w", scope=GLOBAL, allocation=LAMP),
    "z-scores": spec("w", normalization=Z_SCORE, guard_rails=GuardRails(rails=[CAP])),
}
LIMIT = 1 << 30


@dataclass(frozen=True)
class LargeModel:
    """A server with a checkpoint of a large model, and a connection to it."""

    server: RunningServer
    channel: grpc.Channel
    client: secateur.Client
    weights: Tensor
    checkpoint: str
    rss_at_rest: int

    def series(self, name: str) -> float:
        return series(self.server, f"secateur_{name}")

    def rss(self) -> int:
        return memory(self.server.process.pid, "VmRSS")

    def mapped(self) -> int:
        """Returns how many files of models the server has mapped."""
        maps = Path(f"/proc/{self.server.process.pid}/maps").read_text()
        return maps.count("/blobs/")

    def cpu_seconds(self) -> float:
        return cpu_seconds(self.server.process.pid)

    def begin(
        self, name: str, rpc: str = "Prune", timeout: float = 300, **fields: Any
    ) -> grpc.Call:
        """Begins a call on the large model: on the checkpoint, or with its data."""
        if rpc in ("Prune", "Plan"):
            fields |= {"spec": SPECS[name.removeprefix("sent ")]}
        stub = getattr(PrunerStub(self.channel), rpc)
        call = stub.future if rpc in ("Report", "Plan") else stub
        if not name.startswith("sent "):
            first = header(rpc, 0, checkpoint=self.checkpoint, **fields)
            found: grpc.Call = call(iter([message(rpc, header=first)]), timeout=timeout)
        else:
            found = call(self._messages(rpc, fields), timeout=timeout)
        return found

    def _messages(self, rpc: str, fields: dict[str, Any]) -> Iterator[Any]:
        head = file_header([("w", "F16", SHAPE)])
        data = self.weights.view(torch.uint8).numpy().reshape(-1).data
        yield message(rpc, header=header(rpc, len(head) + len(data), **fields), data=head)
        for piece in cut([data]):
            yield message(rpc, data=bytes(piece))

    def check_ends(self, stop: Callable[[], object], most: float = SOON) -> float:
        """Stops a call, and checks that the server soon holds nothing of it.

        Returns:
            The CPU seconds that it used meanwhile.
        """
        stop()
        before = self.cpu_seconds()
        for name in ("requests_in_flight", "model_bytes", "requests_waiting"):
            eventually(lambda name=name: self.series(name), 0.0)  # type: ignore[misc]
        used = self.cpu_seconds() - before
        assert used < most
        return used


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LargeModel]:
    folder = tmp_path_factory.mktemp("deadlines")
    server = start_server("--memory-limit", str(LIMIT), "--store-dir", str(folder))
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 15), 1 << 15, SHAPE, dtype=torch.int16, generator=generator)
    weights = (bits & ~0x4000).view(torch.float16)  # without the largest exponents, so without NaN
    with (
        grpc.insecure_channel(server.address) as channel,
        secateur.Client(channel=channel, timeout=300) as client,
    ):
        uploaded = client.upload({"w": weights}, progress=False)
        # Load libraries and compile kernels.
        client.prune(uploaded, secateur.l1_unstructured("w", 0.5), progress=False)
        client.prune({"w": weights}, secateur.ln_structured("w", 0.5, 2, 1), progress=False)
        rss = memory(server.process.pid, "VmRSS")
        yield LargeModel(server, channel, client, weights, uploaded.name, rss)
    logged = stop_server(server)
    assert "Traceback" not in logged, logged


@pytest.fixture(autouse=True)
def _server_still_serves(large: LargeModel) -> Iterator[None]:
    """After each test the server serves, and has released memory except what malloc keeps."""
    yield
    check_serves(large.server, large.channel)
    eventually(lambda: large.rss() - large.rss_at_rest < large.weights.nbytes, True)


def moments(
    large: LargeModel, begin: Callable[[], Any], count: int, is_report: bool = False
) -> tuple[list[float], float]:
    """Measures a call. Returns moments before its result, in seconds, and its CPU seconds."""
    ended = threading.Event()
    begun, before = time.monotonic(), large.cpu_seconds()
    call = begin()
    call.add_done_callback(lambda call: ended.set())
    if not is_report:
        next((answer for answer in call if answer.HasField("result")), None)
        call.cancel()
    ended.wait()
    whole = time.monotonic() - begun
    used = large.cpu_seconds() - before
    eventually(lambda: large.series("requests_in_flight"), 0.0)
    return [whole * (index + 1) / (count + 1) for index in range(count)], used


def check_all_moments(
    large: LargeModel, begin: Callable[[], Any], count: int, is_report: bool = False
) -> None:
    """Checks that a cancelled call uses at most half of the CPU time of a whole one afterwards."""
    when, whole = moments(large, begin, count, is_report)
    used = []
    for moment in when:
        call = begin()
        time.sleep(moment)
        used.append(large.check_ends(call.cancel, min(SOON, max(whole / 2, 0.5))))
    print(f"used {', '.join(f'{seconds:.2f}' for seconds in used)} s of CPUs, of {whole:.2f}")


@pytest.mark.parametrize("name", ["unstructured", "random", "structured", "sent unstructured"])
def test_cancellation_ends_the_work(large: LargeModel, name: str) -> None:
    check_all_moments(large, lambda: large.begin(name), 2)


@pytest.mark.slow
@pytest.mark.parametrize("output", [pb.OUTPUT_MASKS, pb.OUTPUT_DENSE, pb.OUTPUT_REPARAMETRIZED])
@pytest.mark.parametrize("name", [*SPECS, *(f"sent {name}" for name in SPECS)])
def test_cancellation_at_any_moment_ends_the_work(
    large: LargeModel, name: str, output: Any
) -> None:
    check_all_moments(large, lambda: large.begin(name, output=output), 12)


@pytest.mark.slow
@pytest.mark.parametrize("rpc", ["Report", "Finalize"])
@pytest.mark.parametrize("name", ["kept", "sent "])
def test_cancellation_of_other_calls_at_any_moment_ends_the_work(
    large: LargeModel, name: str, rpc: str
) -> None:
    check_all_moments(large, lambda: large.begin(name, rpc), 6, rpc == "Report")


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_cancellation_of_a_plan_at_any_moment_ends_the_work(large: LargeModel, name: str) -> None:
    amounts = [Amount(fraction=0.1 * tenths) for tenths in range(1, 10)]
    check_all_moments(large, lambda: large.begin(name, "Plan", amounts=amounts), 6, True)


@pytest.mark.parametrize("name", ["unstructured", "sent structured"])
def test_a_deadline_ends_the_work(large: LargeModel, name: str) -> None:
    seconds, ended = 0.1, 0
    while (found := failure(list, cast(Any, large.begin(name, timeout=seconds)))) is not None:
        assert found.code == grpc.StatusCode.DEADLINE_EXCEEDED
        large.check_ends(lambda: None)
        seconds, ended = seconds * 2, ended + 1
    assert ended


def test_a_deadline_ends_a_call_that_receives(large: LargeModel) -> None:
    held = Held(large, 1000, timeout=0.5)
    eventually(lambda: large.series("model_bytes"), 1000.0)
    found = failure(held.call.result)
    assert found is not None
    assert found.code == grpc.StatusCode.DEADLINE_EXCEEDED
    large.check_ends(lambda: None)


class Held:
    """A call that announces its model but does not send it."""

    def __init__(self, large: LargeModel, size: int, timeout: float = 300) -> None:
        self._ended = threading.Event()
        first = message("Report", header=header("Report", size), data=b"\x10")

        def messages() -> Iterator[Any]:
            yield first
            self._ended.wait(300)

        self.call = PrunerStub(large.channel).Report.future(messages(), timeout=timeout)
        self.call.add_done_callback(lambda call: self._ended.set())


@pytest.mark.parametrize("how", ["cancel", "deadline"])
@pytest.mark.parametrize("name", ["unstructured", "sent unstructured"])
def test_cancelled_request_leaves_the_queue_at_once(large: LargeModel, name: str, how: str) -> None:
    holder = Held(large, LIMIT)
    eventually(lambda: large.series("model_bytes"), float(LIMIT))
    for seconds in (1, 10, 100):  # a busy machine may need more than a second to queue it
        call: Any = large.begin(name, timeout=seconds if how == "deadline" else 300)
        eventually(lambda: large.series("requests_waiting") == 1 or not call.is_active(), True)  # noqa: B023
        if call.is_active():
            break
    if how == "cancel":
        call.cancel()
    else:
        assert (found := failure(list, call))
        assert found.code == grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(lambda: large.series("requests_waiting"), 0.0)
    eventually(lambda: large.series("requests_in_flight"), 1.0)
    assert large.series("model_bytes") == LIMIT  # the other call is unaffected
    large.check_ends(holder.call.cancel)


def test_request_that_waits_for_the_cores_can_be_cancelled(large: LargeModel) -> None:
    """One large model is processed at a time."""
    long = PruningSpec(rules=[*SPECS["structured"].rules] * 100)
    first = header("Prune", 0, checkpoint=large.checkpoint, spec=long)
    stub = PrunerStub(large.channel)
    working = stub.Prune(iter([message("Prune", header=first)]), timeout=300)
    while next(working).progress.phase != PHASE_PRUNE:  # then it has the cores
        pass
    before = large.series("received_bytes_total")
    waiting = large.begin("sent unstructured")
    received = len(file_header([("w", "F16", SHAPE)])) + large.weights.nbytes
    eventually(lambda: large.series("received_bytes_total") - before, float(received))
    waiting.cancel()
    eventually(lambda: large.series("requests_in_flight"), 1.0)
    assert working.is_active()
    large.check_ends(working.cancel)


def test_cancellation_during_the_answer_ends_the_work(large: LargeModel) -> None:
    for name in ("unstructured", "sent unstructured"):
        call: Any = large.begin(name, output=pb.OUTPUT_DENSE)
        result = next(answer for answer in call if answer.HasField("result"))
        assert result.result.data_bytes > large.weights.nbytes
        assert large.series("model_bytes") > large.weights.nbytes
        large.check_ends(call.cancel)


def test_mapped_file_is_released_with_its_call(large: LargeModel) -> None:
    """It does not wait for the garbage collector, which may run many calls later."""
    for moment in moments(large, lambda: large.begin("unstructured"), 8)[0]:
        call = large.begin("unstructured")
        time.sleep(moment)
        large.check_ends(call.cancel)
        eventually(large.mapped, 0)


MANY = 40


def test_many_calls_on_checkpoints_wait_in_the_visible_queue(large: LargeModel) -> None:
    holder = Held(large, LIMIT)
    eventually(lambda: large.series("model_bytes"), float(LIMIT))
    waiting = [large.begin("unstructured") for _ in range(MANY)]
    try:
        eventually(lambda: large.series("requests_in_flight"), float(1 + len(waiting)))
        eventually(lambda: large.series("requests_waiting"), float(len(waiting)))
        for call in waiting[MANY // 2 :]:
            call.cancel()
        eventually(lambda: large.series("requests_in_flight"), float(1 + MANY // 2))
    finally:
        for call in [*waiting, holder.call]:
            call.cancel()
        eventually(lambda: large.series("requests_in_flight"), 0.0)
