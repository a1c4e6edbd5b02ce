"""Small requests with large consequences: the server keeps serving, and holds nothing of them."""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
import safetensors.torch
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

import secateur
from secateur_proto import checkpoints_pb2, pruner_pb2, spec_pb2
from secateur_proto.checkpoints_pb2_grpc import CheckpointsStub
from secateur_proto.framing import cut
from tests.conftest import RunningServer
from tests.contract.raw import (
    RPCS,
    TIMEOUT,
    Failure,
    check_invalid,
    check_serves,
    entry,
    failure,
    file,
    header,
    masks,
    message,
    send,
    send_file,
    spec,
)
from tests.processes import cpu_seconds, memory, reset_peak
from tests.storage.stored import file_message, send_upload, upload_file, upload_requests

MIB = 1 << 20
ONE = torch.ones(1).numpy().tobytes()
INVALID_STATE_DICT, INVALID_REQUEST = "INVALID_STATE_DICT", "INVALID_REQUEST"
Measured = Callable[[Callable[[], Any]], int]


@pytest.fixture(autouse=True)
def _server_still_serves(server: RunningServer, channel: grpc.Channel) -> Iterator[None]:
    yield
    health = health_pb2_grpc.HealthStub(channel)
    answer = health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    check_serves(server, channel)


@pytest.fixture
def memory_growth(server: RunningServer, channel: grpc.Channel) -> Measured:
    """Measures by how many MiB the memory of the server grows at the peak of a call."""

    def measured(call: Callable[[], Any]) -> int:
        check_serves(server, channel)
        pid = server.process.pid
        reset_peak(pid)
        before = memory(pid, "VmRSS")
        call()
        return (memory(pid, "VmHWM") - before) >> 20

    return measured


def send_chunks(
    channel: grpc.Channel, rpc: str, data: bytes, announced: int | None = None
) -> Failure | None:
    """Sends a file in messages of the usual size."""
    first = header(rpc, len(data) if announced is None else announced)
    rest = (message(rpc, data=bytes(piece)) for piece in cut([data]))
    return failure(send, channel, rpc, [message(rpc, header=first), *rest], timeout=300)


# The head of a file -------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2**63 - 1, 2**63, 2**64 - 1, 100_000_001])
def test_a_too_long_header_is_refused_at_its_first_bytes(
    channel: grpc.Channel, memory_growth: Measured, length: int
) -> None:
    data = length.to_bytes(8, "little") + b"{" + b" " * 100

    def call() -> None:
        found = send_chunks(channel, "Report", data, announced=2**30)
        check_invalid(found, INVALID_STATE_DICT, "data", [str(length), "100000000"])

    assert memory_growth(call) < 16


def test_an_announced_header_takes_only_the_memory_of_what_arrives(
    channel: grpc.Channel, memory_growth: Measured
) -> None:
    data = (100_000_000).to_bytes(8, "little") + b"{" + b" " * MIB

    def call() -> None:
        found = send_chunks(channel, "Report", data, announced=100_000_008)
        check_invalid(found, INVALID_STATE_DICT, "data", ["100000008", str(len(data))])

    assert memory_growth(call) < 16


def header_with_shape_of(value: str) -> bytes:
    """Makes a header of 12 MiB with a shape of invalid values."""
    values = ",".join([value] * (12 * MIB // (len(value) + 1)))
    return b'{"w":{"dtype":"U8","data_offsets":[0,0],"shape":[%b]}}' % values.encode()


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: header_with_shape_of("[]"), id="lists"),
        pytest.param(lambda: header_with_shape_of("{}"), id="maps"),
        pytest.param(lambda: header_with_shape_of("1e9"), id="numbers"),
        pytest.param(lambda: b'{"w":' + b"[" * (12 * MIB), id="deep lists"),
        pytest.param(lambda: b'{"w":' * (2 * MIB), id="deep maps"),
        pytest.param(
            lambda: b"{" + b",".join(b'"%x":0' % n for n in range(MIB)) + b"}",
            id="entries of nothing",
        ),
        pytest.param(
            lambda: b'{"__metadata__":{' + b",".join(b'"%x":""' % n for n in range(MIB)) + b"}}",
            id="texts",
        ),
    ],
)
def test_a_header_of_many_objects_is_refused_before_they_are_created(
    channel: grpc.Channel, memory_growth: Measured, make: Callable[[], bytes]
) -> None:
    """json.loads would take 27 times its size, and block other calls for seconds."""
    text = make()

    def call() -> None:
        found = send_chunks(channel, "Report", file(text))
        assert found is not None
        assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, INVALID_STATE_DICT)
        assert len(found.message) < 1000

    assert memory_growth(call) < 64


@pytest.mark.parametrize(
    "shape",
    [[2**32, 2**32], [2**62, 4], [2**63 - 1, 2**63 - 1, 2**63 - 1], [3, 2**62 // 3 + 1]],
    ids=str,
)
def test_a_shape_with_an_overflowing_product_is_refused(
    channel: grpc.Channel, shape: list[int]
) -> None:
    """In 64 bits 2^32 * 2^32 is 0, and so are its bytes."""
    for rpc in RPCS:
        found = send_chunks(channel, rpc, file({"w": entry("F32", shape, 0, 0)}))
        check_invalid(found, INVALID_STATE_DICT, "data['w']", [str(shape[0])])


@pytest.mark.parametrize("shape", [[0, 2**61], [2**61, 0], [0, 2**30, 2**31], [2**30, 0, 2**31]])
def test_a_tensor_without_elements_takes_no_memory(
    channel: grpc.Channel, memory_growth: Measured, shape: list[int]
) -> None:
    data = file({"w": entry("F32", shape, 0, 0)})

    def call() -> None:
        for rpc in RPCS:
            found = send_chunks(channel, rpc, data)
            assert found is None or found.code == grpc.StatusCode.INVALID_ARGUMENT, found

    assert memory_growth(call) < 16


@pytest.mark.parametrize(
    "text",
    [
        b'{"w":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{}}',
        b'{"__metadata__":{"k":"1","k":"2"},"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"__metadata__":{},"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"__metadata__":{}}',
    ],
    ids=["field", "tensor", "text", "metadata"],
)
def test_a_duplicate_key_is_refused(channel: grpc.Channel, text: bytes) -> None:
    """Readers do not agree on which one counts."""
    found = send_chunks(channel, "Report", file(text, ONE))
    assert found is not None
    assert found.reason == INVALID_STATE_DICT
    assert "occurs twice" in found.message


# Many tensors, long names -------------------------------------------------------------------------


def test_ten_thousand_tiny_tensors_take_little_cpu_time(
    client: secateur.Client, server: RunningServer, memory_growth: Measured
) -> None:
    model = {f"layers.{n}.weight": torch.tensor([1.0, float(n + 2)]) for n in range(10_000)}
    begin = total_cpu_seconds(server)

    def call() -> None:
        result = client.prune(model, secateur.l1_unstructured("*", 1), output="dense")
        pruned = result.state_dict("dense")
        assert len(pruned) == len(result.report.tensors) == 10_000
        assert pruned["layers.9999.weight"].tolist() == [0.0, 10_001.0]
        assert result.report.sparsity == 0.5

    assert memory_growth(call) < 256
    assert total_cpu_seconds(server) - begin < 20


def total_cpu_seconds(server: RunningServer) -> float:
    """Returns the CPU time of this process and the server, which does not depend on the load."""
    return time.process_time() + cpu_seconds(server.process.pid)


def test_twenty_thousand_empty_tensors_take_little_cpu_time(
    client: secateur.Client, server: RunningServer
) -> None:
    """It once took minutes: the work grew with the square of the number of tensors."""
    model = {f"layers.{n}.weight": torch.empty(0) for n in range(20_000)}
    begin = total_cpu_seconds(server)
    result = client.prune(model, secateur.l1_unstructured("*", 0.5), output="none")
    assert len(result.report.tensors) == 20_000
    assert total_cpu_seconds(server) - begin < 30


def test_a_tensor_name_may_have_1_mb(channel: grpc.Channel, memory_growth: Measured) -> None:
    """The format has no limit."""
    name = "n" * 10**6
    data = file({name: entry("F32", [2], 0, 8)}, ONE * 2)
    first = header("Finalize", len(data))

    def call() -> None:
        answer = send(channel, "Finalize", [message("Finalize", header=first, data=data)])
        (reported,) = answer[0].result.report.tensors
        assert reported.name == name
        written = b"".join(part.data for part in answer)
        assert list(safetensors.torch.load(written)) == [name]

    assert memory_growth(call) < 32


def test_an_error_abbreviates_a_long_name(channel: grpc.Channel) -> None:
    data = file({"n" * 10**6: entry("F32", [2], 0, 4)}, ONE)
    found = send_chunks(channel, "Prune", data)
    check_invalid(found, INVALID_STATE_DICT, f"data['{'n' * 59}...{'n' * 59}']", ["2"])
    assert found is not None
    assert len(found.message) < 1000


# Names that are paths -----------------------------------------------------------------------------

TRICKS = [
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    "a\0b",
    "a\nb",
    "\r\n\r\nHTTP/1.1 200 OK",
    "..\\..\\windows",
    "\x1b[2J",
]


@pytest.mark.parametrize("name", TRICKS)
def test_the_name_of_a_tensor_is_never_used_as_a_path(channel: grpc.Channel, name: str) -> None:
    """It is a key: a result has it unchanged, and an error quotes it."""
    data = file({name: entry("F32", [1], 0, 4)}, ONE)
    for output in (pruner_pb2.OUTPUT_DENSE, pruner_pb2.OUTPUT_MASKS):
        first = header("Prune", len(data), output=output, spec=spec("*"))
        answer = send(channel, "Prune", [message("Prune", header=first, data=data)])
        written = b"".join(part.data for part in answer)
        assert list(safetensors.torch.load(written)) == [name]
    first = header("Prune", len(data), spec=masks(**{name: name + "?"}))
    found = failure(send, channel, "Prune", [message("Prune", header=first, data=data)])
    assert found is not None
    assert found.code == grpc.StatusCode.INVALID_ARGUMENT
    assert not set("\0\r\n\x1b") & set(found.message)


@pytest.mark.parametrize("name", [*TRICKS, ".", "é" * 128, "n" * 10**6])
def test_the_name_of_a_file_is_never_used_as_a_path(
    client: secateur.Client, channel: grpc.Channel, name: str
) -> None:
    """A name that could be a path is refused, and the store never uses the others."""
    data = file({"w": entry("F32", [1], 0, 4)}, ONE)
    requests = upload_requests([upload_file(file_message(data, name))], data)
    made: list[Any] = []
    found = failure(lambda: made.append(send_upload(channel, requests)))
    if "/" in name or "\0" in name or name in (".", "..") or len(name.encode()) > 255:
        check_invalid(
            found, INVALID_REQUEST, "header.files[0].file.filename", ["not the name of a file"]
        )
        return
    assert found is None
    assert [stored.filename for stored in made[0].files] == [name]
    client.delete(made[0].name)


@pytest.mark.parametrize("name", TRICKS)
def test_an_index_names_only_files_of_the_upload(channel: grpc.Channel, name: str) -> None:
    data = file({"w": entry("F32", [1], 0, 4)}, ONE)
    index = json.dumps({"weight_map": {"w": name}}).encode()
    files = [
        upload_file(file_message(data, "a.safetensors")),
        upload_file(file_message(index, "model.safetensors.index.json")),
    ]
    found = failure(send_upload, channel, upload_requests(files, data + index))
    check_invalid(
        found, INVALID_STATE_DICT, "data['model.safetensors.index.json']", ["not among the files"]
    )
    assert found is not None
    assert not set("\0\r\n\x1b") & set(found.message)


@pytest.mark.parametrize(
    "make_more",
    [
        pytest.param(lambda: "[" + ",".join(["[]"] * (4 * MIB)) + "]", id="lists"),
        pytest.param(lambda: "[" + ",".join(["1e9"] * (3 * MIB)) + "]", id="numbers"),
        pytest.param(lambda: ",".join(["0", *(f'"{n:x}":0' for n in range(MIB))]), id="keys"),
        pytest.param(lambda: "[" * 900 + "]" * 900, id="deep"),
    ],
)
def test_an_index_of_many_objects_is_refused_before_they_are_created(
    channel: grpc.Channel, memory_growth: Measured, make_more: Callable[[], str]
) -> None:
    data = file({"w": entry("F32", [1], 0, 4)}, ONE)
    index = f'{{"weight_map":{{"w":"a.safetensors"}},"more":{make_more()}}}'.encode()
    files = [
        upload_file(file_message(data, "a.safetensors")),
        upload_file(file_message(index, "model.safetensors.index.json")),
    ]

    def call() -> None:
        found = failure(send_upload, channel, upload_requests(files, data + index))
        field = "data['model.safetensors.index.json']"
        check_invalid(found, INVALID_STATE_DICT, field, ["no index"])

    assert memory_growth(call) < 64


@pytest.mark.parametrize("name", [*TRICKS, "n" * 10**6])
def test_the_name_of_a_checkpoint_is_never_used_as_a_path(channel: grpc.Channel, name: str) -> None:
    for wanted in (name, f"checkpoints/{name}"):
        for call in (get, delete, download, report):
            found = failure(call, channel, wanted)
            assert found is not None
            status = found.code, found.reason
            assert status == (grpc.StatusCode.NOT_FOUND, "CHECKPOINT_NOT_FOUND")
            assert len(found.message) < 1000


def get(channel: grpc.Channel, name: str) -> None:
    CheckpointsStub(channel).Get(checkpoints_pb2.GetRequest(name=name), timeout=TIMEOUT)


def delete(channel: grpc.Channel, name: str) -> None:
    CheckpointsStub(channel).Delete(checkpoints_pb2.DeleteRequest(name=name), timeout=TIMEOUT)


def download(channel: grpc.Channel, name: str) -> None:
    request = checkpoints_pb2.DownloadRequest(name=name)
    list(CheckpointsStub(channel).Download(request, timeout=TIMEOUT))


def report(channel: grpc.Channel, name: str) -> None:
    send(channel, "Report", [message("Report", header=pruner_pb2.ReportHeader(checkpoint=name))])


# Compression --------------------------------------------------------------------------------------


@pytest.fixture(params=[grpc.Compression.Gzip, grpc.Compression.Deflate], ids=["gzip", "deflate"])
def compressing(server: RunningServer, request: pytest.FixtureRequest) -> Iterator[grpc.Channel]:
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(server.address, options, request.param) as opened:
        yield opened


def test_a_message_that_decompresses_beyond_the_limit_is_refused(
    compressing: grpc.Channel, memory_growth: Measured
) -> None:
    """128 KiB of gzip are 128 MiB of zeros; the limit of a message is 16 MiB."""
    size = 128 * MIB
    request = message("Report", header=header("Report", size), data=bytes(size))

    def call() -> None:
        found = failure(send, compressing, "Report", [request], timeout=300)
        assert found is not None
        assert found.code == grpc.StatusCode.RESOURCE_EXHAUSTED, found

    assert memory_growth(call) < 48


def test_a_message_within_the_limit_may_be_compressed(compressing: grpc.Channel) -> None:
    data = file({"w": entry("F32", [2 * MIB], 0, 8 * MIB)}, bytes(8 * MIB))
    request = message("Report", header=header("Report", len(data)), data=data)
    (answer,) = send(compressing, "Report", [request])
    assert answer.report.zeros == 2 * MIB


def test_a_group_of_millions_of_indices_takes_memory_in_proportion(
    memory_growth: Measured, channel: grpc.Channel
) -> None:
    member = spec_pb2.Member(tensor="a", indices=bytes(8 * MIB))
    group = spec_pb2.Group(name="g", members=[member])
    selection = spec("*").rules[0].selection
    selection.ClearField("tensors")
    selection.granularity, selection.magnitude.p = spec_pb2.GRANULARITY_GROUP, 1
    selection.groups.append(group)
    rules = spec_pb2.PruningSpec(rules=[spec_pb2.Rule(selection=selection)])
    data = file({"a": entry("F32", [1], 0, 4)}, ONE)

    def call() -> None:
        found = send_file(channel, "Prune", data, spec=rules)
        check_invalid(
            found, "INVALID_SPEC", "spec.rules[0].selection.groups[0].members[0].indices", []
        )

    assert memory_growth(call) < 400
