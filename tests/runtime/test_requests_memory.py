"""For any requests, the memory of a server is within its limits, and is released."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc
import numpy as np
import pytest

import secateur
from secateur_proto import checkpoints_pb2, checkpoints_pb2_grpc, pruner_pb2, pruner_pb2_grpc
from secateur_proto.codec import SINGLE
from secateur_server.errors import RequestTooLarge
from secateur_server.runtime.context import RequestContext
from secateur_server.runtime.scheduler import Scheduler
from tests.conftest import PATIENCE, RunningServer, eventually, start_server, stop_server
from tests.contract.raw import OWN_CONNECTION, check_failed, failure, open_streams, send
from tests.operate.test_metrics import sample
from tests.operate.test_threads import is_serving
from tests.processes import memory

MIB = 1 << 20
LIMIT = 64 * MIB
# First messages and headers may each take this much, for any --memory-limit.
OTHER = 64 * MIB
# The allocator's own, and gRPC's windows of 1 MiB a call.
SLACK = 160 * MIB


@pytest.fixture(scope="module")
def running() -> Iterator[RunningServer]:
    started = start_server("--memory-limit", str(LIMIT))
    with secateur.Client(started.address) as client:  # loads libraries
        client.prune({"w": np.ones(1000, np.float32)}, secateur.l1_unstructured("w", 0.5))
    yield started
    stop_server(started)


@pytest.fixture
def before(running: RunningServer) -> int:
    return anonymous(running)


def anonymous(server: RunningServer) -> int:
    """Returns the bytes of memory that are not pages of files."""
    return memory(server.process.pid, "RssAnon")


@contextmanager
def many_calls(server: RunningServer, count: int, begin: Any) -> Iterator[list[Any]]:
    """Begins calls over several connections, and cancels them after the block."""
    with ExitStack() as opened:
        calls = []
        for number in range(count):
            if number % 16 == 0:
                channel = grpc.insecure_channel(server.address, [OWN_CONNECTION])
                opened.enter_context(channel)
            calls.append(begin(channel))
            opened.callback(calls[-1].cancel)
        yield calls


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_waiting_first_messages_are_not_received(
    running: RunningServer, before: int, compression: grpc.Compression
) -> None:
    """One call holds all memory of state_dicts, while 32 others try to send 15 MiB."""
    header = pruner_pb2.ReportHeader(data_bytes=LIMIT)
    short, long = (
        pruner_pb2.ReportRequest(header=header, data=b"\x10" + bytes(size))
        for size in (0, 15 * MIB)
    )

    def begin(channel: grpc.Channel, first: pruner_pb2.ReportRequest = long) -> Any:
        stub = pruner_pb2_grpc.PrunerStub(channel)
        return stub.Report.future(stream([first]), compression=compression)

    with open_streams() as stream, many_calls(running, 1, lambda channel: begin(channel, short)):
        eventually(lambda: sample(running, "secateur_model_bytes"), LIMIT)
        with many_calls(running, 32, begin) as calls:
            eventually(lambda: sample(running, "secateur_messages_waiting") >= 20, True)
            assert is_serving(running)
            assert anonymous(running) - before < OTHER + SLACK
            # On a busy machine a message may take so long that its call is refused.
            assert sum(call.done() for call in calls) <= 8
    eventually(lambda: sample(running, "secateur_requests_in_flight"), 0)
    eventually(lambda: anonymous(running) - before < SLACK, True)


def test_downloads_wait_for_memory(running: RunningServer) -> None:
    generator = np.random.default_rng(0)
    model = {f"w{i}": generator.standard_normal((1000, 1000), np.float32) for i in range(12)}
    spec = secateur.global_unstructured("*", 0.5)
    with secateur.Client(running.address, timeout=PATIENCE) as client:
        checkpoint = client.prune(model, spec, keep=True, output="none").checkpoint
        assert checkpoint is not None
        before = anonymous(running)
        request = checkpoints_pb2.DownloadRequest(name=checkpoint.name)

        def begin(channel: grpc.Channel) -> Any:
            return checkpoints_pb2_grpc.CheckpointsStub(channel).Download(request)

        with many_calls(running, 40, begin):
            eventually(lambda: sample(running, "secateur_requests_waiting") >= 37, True)
            eventually(lambda: sample(running, "secateur_model_bytes") > 0, True)
            assert anonymous(running) - before < LIMIT + SLACK
        client.delete(checkpoint)
    eventually(lambda: sample(running, "secateur_requests_in_flight"), 0)
    eventually(lambda: anonymous(running) - before < SLACK, True)


def test_too_large_header_is_refused_before_it_arrives(running: RunningServer, before: int) -> None:
    length = 50_000_000
    header = pruner_pb2.ReportHeader(data_bytes=length + 8)
    first = pruner_pb2.ReportRequest(header=header, data=length.to_bytes(8, "little"))
    with grpc.insecure_channel(running.address) as channel:
        found = failure(send, channel, "Report", [first])
    found = check_failed(found, grpc.StatusCode.RESOURCE_EXHAUSTED, "REQUEST_TOO_LARGE")
    assert found.message.startswith(f"data: reading a header of {length} bytes takes up to ")
    assert anonymous(running) - before < SLACK


def test_too_many_tensors_are_refused(running: RunningServer, before: int) -> None:
    model = {f"w{number}": np.zeros(1, np.float32) for number in range(20_000)}
    with (
        secateur.Client(running.address) as client,
        pytest.raises(secateur.SecateurError) as caught,
    ):
        client.report(model, progress=False)
    assert "serving 20000 tensors takes up to " in str(caught.value)
    assert anonymous(running) - before < OTHER + SLACK


@pytest.mark.parametrize(
    "spec",
    [secateur.l1_unstructured("*", 0.5), secateur.ln_structured("*", 0.5, n=2, dim=0)],
    ids=["elements", "slices"],
)
def test_too_large_plan_is_refused_before_its_data_arrives(
    running: RunningServer, before: int, spec: secateur.Spec
) -> None:
    model = {f"w{number}": np.ones((2, 2), np.float32) for number in range(2000)}
    amounts = [number / 1000 for number in range(1, 1001)]
    with (
        secateur.Client(running.address) as client,
        pytest.raises(secateur.ModelTooLarge) as caught,
    ):
        client.plan(model, spec, amounts, progress=False)
    assert "a plan of 1000 amounts of 2000 tensors takes up to " in str(caught.value)
    assert anonymous(running) - before < OTHER + SLACK


def messages_of(size: int) -> dict[str, list[bytes]]:
    """Makes requests whose headers have as many of the smallest messages as fit in `size` bytes."""
    rules = b"\x0a\x00" * (size // 2)  # PruningSpec.rules
    field = pruner_pb2.PruneHeader.DESCRIPTOR.fields_by_name["spec"].number
    header = b"".join((bytes((field << 3 | 2,)), encoded(len(rules)), rules))
    whole = b"".join((b"\x0a", encoded(len(header)), header))
    return {
        "one header": [whole],
        "an empty header before it": [b"\x0a\x00" + whole],
        "a header in the second message": [b"\x0a\x02\x08\x0a\x12\x01x", whole],
    }


def encoded(length: int) -> bytes:
    """Encodes a varint."""
    parts = bytearray()
    while length > 0x7F:
        parts.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes((*parts, length))


@pytest.mark.parametrize("case", messages_of(0))
def test_a_header_of_the_smallest_messages_is_refused_before_it_is_decoded(
    running: RunningServer, before: int, case: str
) -> None:
    messages = messages_of(15 * MIB)[case]
    with grpc.insecure_channel(running.address) as channel:
        call: Any = channel.stream_stream("/secateur.v1.Pruner/Prune")
        found = failure(lambda: list(call(iter(messages))))
    assert found is not None
    assert found.code.name in ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT"), found
    assert anonymous(running) - before < OTHER + SLACK


def test_many_empty_digests_are_refused_before_they_are_decoded(
    running: RunningServer, before: int
) -> None:
    with grpc.insecure_channel(running.address) as channel:
        call: Any = channel.unary_unary("/secateur.v1.Checkpoints/QueryUpload")
        found = failure(call, b"\x0a\x00" * (7 * MIB))
    assert found is not None
    assert found.reason == "REQUEST_TOO_LARGE", found
    assert anonymous(running) - before < OTHER + SLACK


def test_request_whose_own_charges_never_fit_has_no_retry() -> None:
    scheduler = Scheduler(MIB, 0)
    context = RequestContext(charge=scheduler.charge)
    with scheduler.call(context):
        context.charge("header", OTHER // 2, "decoding it")
        with pytest.raises(RequestTooLarge, match="beside 33554432 that the request already holds"):
            context.charge("data", OTHER // 2 + 1, "reading it")


def test_silent_calls_end_when_others_wait(running: RunningServer) -> None:

    def begin(channel: grpc.Channel) -> Any:
        return pruner_pb2_grpc.PrunerStub(channel).Report.future(silent())

    with open_streams() as silent, many_calls(running, 4, begin) as calls:
        eventually(lambda: sample(running, "secateur_request_bytes"), 4 * 16 * MIB)
        with secateur.Client(running.address, timeout=PATIENCE) as client:
            assert client.server_info().version
        eventually(lambda: any(call.done() for call in calls), True)
        refused = next(call for call in calls if call.done())
        assert "no first message for" in refused.details()
        assert refused.code().name == "RESOURCE_EXHAUSTED"


def test_a_prune_of_one_message_carries_its_model(running: RunningServer) -> None:
    header = pruner_pb2.PruneHeader(checkpoint="checkpoints/x")
    request = pruner_pb2.PruneRequest(header=header)
    with grpc.insecure_channel(running.address) as channel:
        prune: Any = channel.unary_unary(
            "/secateur.v1.Pruner/Prune",
            request_serializer=pruner_pb2.PruneRequest.SerializeToString,
        )
        found = failure(prune, request, metadata=[SINGLE])
    assert found is not None
    assert (found.reason, found.fields) == ("INVALID_REQUEST", ("header",))
