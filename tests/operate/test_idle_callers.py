"""Callers that neither send nor receive are cut off. Slow callers and waiting ones are not."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
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
from secateur_server.app import App
from secateur_server.config import read_config
from secateur_server.cut.prune import prune
from secateur_server.operate import interceptor
from tests.clock import Clock, install
from tests.conftest import PATIENCE, eventually, start_server, stop_server
from tests.contract.raw import (
    Failure,
    check_failed,
    check_serves,
    failure,
    header,
    kept_open,
    message,
    series,
)

IDLE = 100.0  # seconds of the tests' clock
ROOM = 256 << 20
GET = "/secateur.v1.Checkpoints/Get"
PRUNE = "/secateur.v1.Pruner/Prune"

FILE = safetensors.torch.save({"w": torch.arange(1.0, 1001)})


class Errors(logging.Handler):
    """Collects log records with a traceback."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.found.append(self.format(record))


@pytest.fixture(scope="module")
def clock() -> Iterator[Clock]:
    with pytest.MonkeyPatch.context() as patch:
        made = Clock()
        install(made, patch)
        # The clock jumps, so that silent calls that block others would be refused before.
        patch.setattr(interceptor, "SILENT_SECONDS", math.inf)
        yield made


@pytest.fixture(scope="module")
def impatient(clock: Clock) -> Iterator[App]:
    """A server in this process, which measures idle times by the clock of the tests."""
    addresses = ("--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0")
    options = ("--idle-timeout", str(IDLE), "--memory-limit", str(ROOM))
    errors = Errors()
    logging.getLogger().addHandler(errors)
    with App(read_config([*addresses, *options], {}), is_warm=False) as running:
        yield running
    logging.getLogger().removeHandler(errors)
    assert errors.found == []


@pytest.fixture
def line(impatient: App) -> Iterator[grpc.Channel]:
    """A connection. After the test the server must hold nothing of its calls."""
    with grpc.insecure_channel(impatient.address) as channel:
        yield channel
        check_serves(impatient, channel)


def raw(channel: grpc.Channel, method: str) -> Any:
    """Makes a method that sends and receives streams of bytes."""
    made: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(method)
    return made


def silent(channel: grpc.Channel, method: str, messages: Iterable[Any], **options: Any) -> Any:
    """Makes a call whose stream neither continues nor ends. Returns how it fails."""
    sent = [item if isinstance(item, bytes) else item.SerializeToString() for item in messages]
    with kept_open(sent) as stream:
        return failure(list, raw(channel, method)(stream, timeout=PATIENCE, **options))


def check_idle(found: Failure | None) -> None:
    found = check_failed(found, grpc.StatusCode.DEADLINE_EXCEEDED, "IDLE_TIMEOUT")
    assert f"no message has arrived for {IDLE:g} seconds" in found.message


def test_idle_timeout_is_in_real_seconds() -> None:
    server = start_server("--idle-timeout", "0.3")
    with grpc.insecure_channel(server.address) as channel:
        found = silent(channel, GET, [])
        assert found is not None
        assert found.reason == "IDLE_TIMEOUT"
        assert "no message has arrived for 0.3 seconds" in found.message
    stop_server(server)


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


def test_sender_that_stops_is_cut_off_and_holds_nothing(
    impatient: App, clock: Clock, line: grpc.Channel
) -> None:
    before = rejected(impatient)
    with ThreadPoolExecutor(len(SLOW)) as pool:
        calls = {
            place: pool.submit(silent, line, method, messages(), **options)
            for place, (method, messages, options) in SLOW.items()
        }
        eventually(lambda: series(impatient, "secateur_requests_in_flight"), float(len(SLOW)))
        eventually(lambda: series(impatient, "secateur_model_bytes") > 0, True)
        clock.advance(0.9 * IDLE)
        assert [place for place, call in calls.items() if call.done()] == []

        def are_over() -> bool:  # the idle time of a call begins with its last message
            clock.advance(0.2 * IDLE)
            return all(call.done() for call in calls.values())

        eventually(are_over, True)
        for call in calls.values():
            check_idle(call.result())
    eventually(lambda: rejected(impatient), before + len(SLOW))
    eventually(lambda: series(impatient, "secateur_model_bytes"), 0.0)


def rejected(server: App) -> float:
    return series(server, "secateur_rejected_requests_total", reason="IDLE_TIMEOUT")


def handled(server: App, code: str) -> float:
    return series(server, "grpc_server_handled_total", grpc_code=code, grpc_method="Prune")


def received(server: App) -> float:
    return series(server, "secateur_received_bytes_total")


def test_call_of_one_message_needs_no_half_close(line: grpc.Channel) -> None:
    found = silent(line, GET, [checkpoints_pb2.GetRequest(name="checkpoints/none")])
    assert found is not None
    assert found.code == grpc.StatusCode.NOT_FOUND


def test_sender_of_64_kib_a_second_is_served(
    impatient: App, clock: Clock, line: grpc.Channel
) -> None:
    begun, before = clock.now, received(impatient)
    model = safetensors.torch.save({"w": torch.randn(7 << 19)})

    def messages() -> Iterator[pb.PruneRequest]:
        yield pruning(len(model))
        for begin in range(0, len(model), 1 << 20):
            yield rest(model[begin : begin + (1 << 20)])
            sent = min(begin + (1 << 20), len(model))
            eventually(lambda sent=sent: received(impatient) - before, float(sent))  # type: ignore[misc]
            clock.advance(16)

    assert failure(list, PrunerStub(line).Prune(messages(), timeout=PATIENCE)) is None
    assert clock.now - begun > 2 * IDLE


LARGE = safetensors.torch.save({"w": torch.randn(16 << 20)})


@pytest.mark.parametrize("begin", [0, 4, 1000, len(LARGE) // 8])
def test_too_slow_sender_is_cut_off_and_holds_nothing(
    impatient: App, clock: Clock, line: grpc.Channel, begin: int
) -> None:
    """At any position of the model, also after a fast beginning."""
    before, pieces = received(impatient), SimpleQueue[bytes]()

    def trickle() -> Iterator[pb.PruneRequest]:
        yield pruning(len(LARGE))
        yield from map(rest, map(bytes, cut([LARGE[:begin]])))
        yield from map(rest, iter(pieces.get, b""))

    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(failure, list, PrunerStub(line).Prune(trickle(), timeout=PATIENCE))

        def has_arrived() -> bool:
            return call.done() or received(impatient) - before == sent

        sent = begin
        while not call.done() and sent < begin + 20:
            eventually(has_arrived, True)
            clock.advance(0.6 * IDLE)
            pieces.put(LARGE[sent : sent + 1])
            sent += 1
        found = call.result()
        pieces.put(b"")
    found = check_failed(found, grpc.StatusCode.DEADLINE_EXCEEDED, "IDLE_TIMEOUT")
    assert "--min-throughput" in found.message


def test_caller_that_waits_for_memory_is_not_cut_off(
    impatient: App, clock: Clock, line: grpc.Channel
) -> None:
    """One slow but steady caller holds all memory, while others wait for it."""
    pieces: SimpleQueue[bytes] = SimpleQueue()

    def steady() -> Iterator[pb.PruneRequest]:
        yield pruning(ROOM, data=(7 << 20).to_bytes(8, "little"))  # a header of 7 MiB follows
        while piece := pieces.get():
            yield rest(piece)

    holder = PrunerStub(line).Prune(steady(), timeout=PATIENCE)
    eventually(lambda: series(impatient, "secateur_model_bytes"), float(ROOM))
    with secateur.Client(channel=line, timeout=PATIENCE) as client, ThreadPoolExecutor() as pool:
        model = {"w": torch.randn(1 << 20)}
        halves = secateur.l1_unstructured("w", 0.5)
        answers = [
            pool.submit(client.prune, model, halves, output=output) for output in ("masks", "dense")
        ]
        eventually(lambda: series(impatient, "secateur_requests_waiting"), 2.0)
        for _ in range(3):
            before = received(impatient)
            clock.advance(0.6 * IDLE)
            pieces.put(bytes(2 << 20))
            eventually(lambda before=before: received(impatient) > before, True)  # type: ignore[misc]
        assert series(impatient, "secateur_requests_waiting") == 2
        holder.cancel()
        pieces.put(b"")
        for answer in answers:
            assert answer.result().report.zeros == 1 << 19


def test_long_work_is_not_cut_off(
    clock: Clock, line: grpc.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = clock.now

    def slowly(*arguments: Any) -> Any:
        clock.advance(3 * IDLE)
        return prune(*arguments)

    monkeypatch.setattr("secateur_server.api.prune.prune", slowly)
    requests = iter([pruning(data=FILE)])
    answer = list(PrunerStub(line).Prune(requests, timeout=PATIENCE))
    assert answer[0].result.report.zeros == 500
    assert clock.now - begun == 3 * IDLE


def dense(line: grpc.Channel) -> Any:
    first = pruning(len(LARGE), output=pb.OUTPUT_DENSE)
    requests = [first, *(rest(bytes(piece)) for piece in cut([LARGE]))]
    return PrunerStub(line).Prune(iter(requests), timeout=PATIENCE)


def test_reader_that_takes_nothing_is_cut_off_and_holds_nothing(
    impatient: App, clock: Clock, line: grpc.Channel
) -> None:
    def ended() -> tuple[float, float]:
        return rejected(impatient), handled(impatient, "DeadlineExceeded")

    before = ended()
    call = dense(line)
    assert next(call).result.data_bytes == len(LARGE)
    clock.advance(0.9 * IDLE)
    assert series(impatient, "secateur_model_bytes") == len(LARGE)

    def held() -> float:  # the idle time begins with the last message that gRPC accepted
        clock.advance(0.2 * IDLE)
        return series(impatient, "secateur_model_bytes")

    eventually(held, 0.0)
    eventually(ended, (before[0] + 1, before[1] + 1))
    found = failure(list, call)  # HTTP/2 delivers no status after data that was not read
    assert found is not None
    assert found.code in (grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)


def test_a_reader_that_is_slow_but_steady_is_served(
    impatient: App, clock: Clock, line: grpc.Channel
) -> None:
    begun, at_first = clock.now, series(impatient, "secateur_sent_bytes_total")

    def sent() -> float:
        return series(impatient, "secateur_sent_bytes_total") - at_first

    call, size, before = dense(line), 0, 0.0
    for answer in call:
        size += len(answer.data)
        # The server began to send these messages after the last step of the clock.
        if before < len(LARGE) and sent() > before:
            clock.advance(0.6 * IDLE)
            before = sent()
    assert size == len(LARGE)
    assert clock.now - begun > 2 * IDLE


def test_reader_that_takes_no_progress_is_served_or_cut_off(
    impatient: App, line: grpc.Channel
) -> None:
    """Messages of progress are small: gRPC buffers them, and the server continues."""
    with secateur.Client(channel=line, timeout=PATIENCE) as client:
        uploaded = client.upload({"w": torch.randn(1 << 20)})
        first = pruning(0, checkpoint=uploaded.name)
        call = PrunerStub(line).Prune(iter([first]), timeout=PATIENCE)
        eventually(lambda: series(impatient, "secateur_requests_in_flight"), 0.0)
        *_, result = call
        assert result.HasField("result")
        client.delete(uploaded)
