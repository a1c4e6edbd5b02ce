"""Who sends nothing, or takes nothing, is cut off; who is merely slow, or waits, is not."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
import safetensors.torch
import torch

import secateur
from secateur_proto import checkpoints_pb2
from secateur_proto import pruner_pb2 as pb
from secateur_proto.checkpoint_pb2 import File
from secateur_proto.codec import SINGLE
from secateur_proto.framing import cut
from secateur_proto.pruner_pb2_grpc import PrunerStub
from secateur_proto.spec_pb2 import PruningSpec
from tests.conftest import RunningServer, eventually, start_server, stop_server
from tests.contract.raw import (
    Failure,
    check_serves,
    failure,
    header,
    message,
    series,
    spec,
)

IDLE = 1.0
ROOM = 256 << 20
GET = "/secateur.v1.Checkpoints/Get"
PRUNE = "/secateur.v1.Pruner/Prune"

FILE = safetensors.torch.save({"w": torch.arange(1.0, 1001)})


@pytest.fixture(scope="module")
def impatient() -> Iterator[RunningServer]:
    """A server that waits for a second."""
    running = start_server("--idle-timeout", str(IDLE), "--memory-limit", str(ROOM))
    yield running
    logged = stop_server(running)
    assert "Traceback" not in logged, logged


@pytest.fixture
def line(impatient: RunningServer) -> Iterator[grpc.Channel]:
    """A connection; nothing is left of what the test does with it."""
    with grpc.insecure_channel(impatient.address) as channel:
        yield channel
        check_serves(impatient, channel)


class Pausing:
    """Messages of a caller who then sends nothing, and does not end its stream."""

    def __init__(self, messages: Iterable[Any], pause: float = 0.0) -> None:
        self._messages, self._pause = messages, pause
        self.ended = threading.Event()

    def __iter__(self) -> Iterator[bytes]:
        for item in self._messages:
            yield item if isinstance(item, bytes) else item.SerializeToString()
            self.ended.wait(self._pause)
        self.ended.wait(30)


def raw(channel: grpc.Channel, method: str) -> Any:
    """A method as one that takes a stream of any bytes."""
    made: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(method)
    return made


def cut_off(channel: grpc.Channel, method: str, messages: Pausing, **options: Any) -> float:
    """Makes a call that is to be cut off.  Returns: after how many seconds."""
    call = raw(channel, method)(iter(messages), timeout=20, **options)
    begun = time.monotonic()
    found = failure(list, call)
    messages.ended.set()
    check_idle(found)
    return time.monotonic() - begun


def check_idle(found: Failure | None) -> None:
    assert found is not None, "the call succeeded"
    assert (found.code.name, found.reason) == ("DEADLINE_EXCEEDED", "IDLE_TIMEOUT"), found
    assert f"no message has come for {IDLE:g} seconds" in found.message


def pruning(size: int = len(FILE), data: bytes = b"", **fields: Any) -> pb.PruneRequest:
    first: pb.PruneRequest = message("Prune", header=header("Prune", size, **fields), data=data)
    return first


def rest(data: bytes) -> pb.PruneRequest:
    following: pb.PruneRequest = message("Prune", data=data)
    return following


SLOW: dict[str, tuple[str, Callable[[], list[Any]], dict[str, Any]]] = {
    "before the first message of a stream": (PRUNE, list, {}),
    "before the message of a call that has one": (GET, list, {}),
    "before the message of a prune of one message": (PRUNE, list, {"metadata": (SINGLE,)}),
    "behind the header": (PRUNE, lambda: [pruning()], {}),
    "in the middle of a file's header": (PRUNE, lambda: [pruning(data=FILE[:11])], {}),
    "in the middle of the data": (PRUNE, lambda: [pruning(), rest(FILE[:2000])], {}),
    "behind the data": (PRUNE, lambda: [pruning(data=FILE)], {}),
    "before the data of what is kept": (PRUNE, lambda: [pruning(keep=True)], {}),
    "in the middle of an upload": (
        "/secateur.v1.Checkpoints/Upload",
        lambda: [
            checkpoints_pb2.UploadRequest(
                header=checkpoints_pb2.UploadHeader(
                    files=[
                        checkpoints_pb2.UploadFile(
                            file=File(filename="a.safetensors", size_bytes=len(FILE))
                        )
                    ]
                ),
                data=FILE[:2000],
            )
        ],
        {},
    ),
}


def test_a_sender_that_stops_anywhere_is_cut_off_and_holds_nothing(
    impatient: RunningServer, line: grpc.Channel
) -> None:
    """All at once, that the test does not take a second for each."""
    before = rejected(impatient)
    with ThreadPoolExecutor(len(SLOW)) as pool:
        calls = {
            place: pool.submit(cut_off, line, method, Pausing(messages()), **options)
            for place, (method, messages, options) in SLOW.items()
        }
        eventually(lambda: series(impatient, "secateur_model_bytes") > 0, True)
        took = {place: call.result() for place, call in calls.items()}
    assert {place: seconds for place, seconds in took.items() if not 0.9 < seconds < 4} == {}
    assert rejected(impatient) == before + len(SLOW)
    eventually(lambda: series(impatient, "secateur_model_bytes"), 0.0, within=1)


def rejected(server: RunningServer) -> float:
    return series(server, "secateur_rejected_requests_total", reason="IDLE_TIMEOUT")


def handled(server: RunningServer, code: str) -> float:
    return series(server, "grpc_server_handled_total", grpc_code=code, grpc_method="Prune")


def test_a_call_of_one_message_needs_no_end_behind_it(line: grpc.Channel) -> None:
    messages = Pausing([checkpoints_pb2.GetRequest(name="checkpoints/none")])
    found = failure(list, raw(line, GET)(iter(messages), timeout=20))
    messages.ended.set()
    assert found is not None
    assert found.code == grpc.StatusCode.NOT_FOUND


def test_a_sender_that_is_slow_but_steady_is_served(line: grpc.Channel) -> None:
    pieces = [FILE[begin : begin + 500] for begin in range(0, len(FILE), 500)]

    def messages() -> Iterator[pb.PruneRequest]:
        yield pruning()
        for piece in pieces:
            time.sleep(0.3)
            yield rest(piece)

    begun = time.monotonic()
    assert failure(list, PrunerStub(line).Prune(messages(), timeout=20)) is None
    assert time.monotonic() - begun > 2 * IDLE


def test_who_waits_for_room_is_not_cut_off(impatient: RunningServer, line: grpc.Channel) -> None:
    """One caller holds all the room, slow but steady, while others wait for it."""
    ended = threading.Event()

    def steady() -> Iterator[pb.PruneRequest]:
        yield pruning(ROOM, data=(1 << 20).to_bytes(8, "little"))  # a header of 1 MiB follows
        while not ended.wait(0.3):
            yield rest(b"\0")

    holder = PrunerStub(line).Prune(steady(), timeout=30)
    eventually(lambda: series(impatient, "secateur_model_bytes"), float(ROOM))
    with secateur.Client(channel=line, timeout=30) as client, ThreadPoolExecutor() as pool:
        model = {"w": torch.randn(1 << 20)}
        halves = secateur.l1_unstructured("w", 0.5)
        answers = [
            pool.submit(client.prune, model, halves, output=output) for output in ("masks", "dense")
        ]
        eventually(lambda: series(impatient, "secateur_requests_waiting"), 2.0)
        time.sleep(2.5 * IDLE)
        assert series(impatient, "secateur_requests_waiting") == 2
        holder.cancel()
        ended.set()
        for answer in answers:
            assert answer.result().report.zeros == 1 << 19


def test_what_is_worked_on_for_longer_is_not_cut_off(line: grpc.Channel) -> None:
    """As many rules as take some seconds here and now."""
    data = safetensors.torch.save({"w": torch.randn(8 << 20)})
    (rule,) = spec("*", fraction=0.01).rules

    def seconds(rules: int) -> float:
        of_rules = PruningSpec(rules=[rule] * rules)
        first = message("Prune", header=header("Prune", len(data), spec=of_rules))
        requests = [first, *(rest(bytes(piece)) for piece in cut([data]))]
        begun = time.monotonic()
        answer = list(PrunerStub(line).Prune(iter(requests), timeout=60))
        assert answer[0].result.report.zeros
        return time.monotonic() - begun

    rules = 20
    while (took := seconds(rules)) < 2 * IDLE:
        rules = int(rules * min(10, 3 * IDLE / took))


LARGE = safetensors.torch.save({"w": torch.randn(16 << 20)})


def dense(line: grpc.Channel) -> Any:
    first = pruning(len(LARGE), output=pb.OUTPUT_DENSE)
    requests = [first, *(rest(bytes(piece)) for piece in cut([LARGE]))]
    return PrunerStub(line).Prune(iter(requests), timeout=60)


def test_a_reader_that_takes_nothing_is_cut_off_and_holds_nothing(
    impatient: RunningServer, line: grpc.Channel
) -> None:
    before = rejected(impatient), handled(impatient, "DeadlineExceeded")
    call = dense(line)
    assert next(call).result.data_bytes == len(LARGE)
    assert series(impatient, "secateur_model_bytes") == len(LARGE)
    begun = time.monotonic()
    eventually(lambda: series(impatient, "secateur_model_bytes"), 0.0)
    assert 0.5 * IDLE < time.monotonic() - begun < 2 * IDLE + 2
    after = rejected(impatient), handled(impatient, "DeadlineExceeded")
    assert after == (before[0] + 1, before[1] + 1)
    found = failure(list, call)  # HTTP/2 brings no status behind data that nobody takes
    assert found is not None
    assert found.code in (grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)


def test_a_reader_that_is_slow_but_steady_is_served(line: grpc.Channel) -> None:
    call = dense(line)
    size, begun = 0, time.monotonic()
    for index, answer in enumerate(call):
        if index % 8 == 0:
            time.sleep(0.4)
        size += len(answer.data)
    assert size == len(LARGE)
    assert time.monotonic() - begun > 2 * IDLE


def test_a_reader_of_progress_that_takes_nothing_is_served_or_cut_off(
    impatient: RunningServer, line: grpc.Channel
) -> None:
    """Messages of progress are small: they wait in gRPC's buffers, and stop nobody."""
    with secateur.Client(channel=line, timeout=30) as client:
        uploaded = client.upload({"w": torch.randn(1 << 20)})
        first = pruning(0, checkpoint=uploaded.name)
        call = PrunerStub(line).Prune(iter([first]), timeout=30)
        eventually(lambda: series(impatient, "secateur_requests_in_flight"), 0.0)
        *_, result = call
        assert result.HasField("result")
        client.delete(uploaded)
