"""Choices of a newer client are refused, and the server lists the choices that it supports."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor import Descriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

import secateur
from secateur_proto import checkpoints_pb2, pruner_pb2, spec_pb2
from secateur_server.granularity import GRANULARITIES
from secateur_server.spec.decode import ALLOCATIONS, SCOPES
from tests.conftest import inner_server
from tests.contract.raw import TIMEOUT, Failure, check_invalid, failure, message, send, spec

SERVICES = (
    pruner_pb2.DESCRIPTOR.services_by_name["Pruner"],
    checkpoints_pb2.DESCRIPTOR.services_by_name["Checkpoints"],
)
METHODS = {method.full_name: method for service in SERVICES for method in service.methods}
# Field 1000, of one byte.
UNKNOWN = b"\xc2\x3e\x01x"
Path = tuple[str, ...]


def paths(kind: Descriptor, path: Path = ()) -> Iterator[Path]:
    """Yields the paths to all messages that a type may contain, its own first."""
    yield path
    for field in kind.fields:
        if field.message_type and not field.message_type.GetOptions().map_entry:
            yield from paths(field.message_type, (*path, field.name))


def part(whole: Message, path: Path) -> tuple[Message, str]:
    """Creates the message at a path in `whole`. Returns it, and the path as errors write it."""
    found, names = whole, []
    for name in path:
        field = getattr(found, name)
        is_repeated = not isinstance(field, Message)
        found = field.add() if is_repeated else field
        found.SetInParent()
        names.append(f"{name}[0]" if is_repeated else name)
    return found, ".".join(names) or "message"


def called(channel: grpc.Channel, method: MethodDescriptor, request: bytes) -> Failure | None:
    rpc: Any = channel.stream_stream(f"/{method.containing_service.full_name}/{method.name}")
    return failure(lambda: list(rpc(iter([request]), timeout=TIMEOUT)))


@pytest.mark.parametrize("name", METHODS)
def test_every_message_of_every_request_refuses_an_unknown_field(
    channel: grpc.Channel, name: str
) -> None:
    method = METHODS[name]
    for path in paths(method.input_type):
        request = GetMessageClass(method.input_type)()
        at_fault, field = part(request, path)
        at_fault.MergeFromString(UNKNOWN)
        found = called(channel, method, request.SerializeToString())
        words = [at_fault.DESCRIPTOR.full_name, "field 1000", "is older than the client"]
        check_invalid(found, "INVALID_REQUEST", field, [*words, secateur.__version__])


def test_an_unknown_field_after_the_header_is_refused(channel: grpc.Channel) -> None:
    head = pruner_pb2.ReportHeader(data_bytes=100)
    requests = [message("Report", header=head), message("Report", data=b"x")]
    requests[1].MergeFromString(UNKNOWN)
    found = failure(send, channel, "Report", requests)
    check_invalid(found, "INVALID_REQUEST", "message", ["secateur.v1.ReportRequest"])


def test_an_entry_of_a_map_with_an_unknown_field_is_refused(channel: grpc.Channel) -> None:
    """protobuf would drop the entry, and with it a choice of the user."""
    entry = b"\x0a\x01a\x12\x01b" + UNKNOWN
    request = pruner_pb2.PruneRequest(header=pruner_pb2.PruneHeader(data_bytes=100, spec=spec("*")))
    selection = request.header.spec.rules[0].selection
    selection.MergeFromString(b"\x4a" + bytes([len(entry)]) + entry)
    method = METHODS["secateur.v1.Pruner.Prune"]
    found = called(channel, method, request.SerializeToString())
    field = "header.spec.rules[0].selection"
    check_invalid(found, "INVALID_REQUEST", field, ["secateur.v1.Selection", "field 9"])


@pytest.mark.parametrize(("count", "field"), [(3, "groups[2]"), (30_000, None)])
def test_a_long_spec_is_searched_only_up_to_a_limit(
    channel: grpc.Channel, count: int, field: str | None
) -> None:
    selection = spec_pb2.Selection(tensors=[f"layers.{i}.weight" for i in range(20_000)])
    for _ in range(count):
        selection.groups.add()
    selection.groups[-1].MergeFromString(UNKNOWN)
    whole = spec_pb2.PruningSpec(rules=[spec_pb2.Rule(selection=selection)])
    request = pruner_pb2.PruneRequest(header=pruner_pb2.PruneHeader(data_bytes=100, spec=whole))
    method = METHODS["secateur.v1.Pruner.Prune"]
    found = called(channel, method, request.SerializeToString())
    at = f"header.spec.rules[0].selection.{field}" if field else "header"
    kind = "secateur.v1.Group" if field else "secateur.v1.PruneHeader"
    check_invalid(found, "INVALID_REQUEST", at, [kind])


# The Python client --------------------------------------------------------------------------------


def test_the_error_of_the_client_has_both_versions(
    client: secateur.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = secateur.Spec.encode

    def newer(self: secateur.Spec, tensors: Any) -> Any:
        encoded, arrays = encode(self, tensors)
        encoded.rules[0].selection.MergeFromString(UNKNOWN)
        return encoded, arrays

    monkeypatch.setattr(secateur.Spec, "encode", newer)
    monkeypatch.setattr("secateur.errors.VERSION", "98.7.6")
    with pytest.raises(secateur.InvalidRequest) as error:
        client.prune({"w": np.ones(4, np.float32)}, secateur.l1_unstructured("w", 0.5))
    assert error.value.field == "header.spec.rules[0].selection"
    text = str(error.value)
    assert f"the server (secateur {secateur.__version__}) is older than the client" in text
    assert "this client is secateur 98.7.6" in text


def test_the_info_of_a_server_lists_its_choices(client: secateur.Client) -> None:
    info = client.server_info()
    assert info.version == secateur.__version__
    assert set(info.outputs) == {"masks", "reparametrized", "dense", "none", "shrunk", "packed"}
    assert {"magnitude", "random"} <= set(info.importances)
    assert {"fraction", "count", "threshold", "bytes"} <= set(info.amounts)
    for names, enum, served in (
        (info.granularities, spec_pb2.Granularity, {*GRANULARITIES, spec_pb2.GRANULARITY_GROUP}),
        (info.scopes, spec_pb2.Scope, SCOPES),
        (info.allocations, spec_pb2.Allocation, ALLOCATIONS),
    ):
        prefix = enum.DESCRIPTOR.name.upper()
        assert {enum.Value(f"{prefix}_{name.upper()}") for name in names} == set(served) - {0}
    assert info.max_model_bytes == 1 << 30


def test_the_info_of_a_server_has_the_lower_limit_of_a_model() -> None:
    options = ("--max-model-bytes", "4MiB", "--memory-limit", "1MiB")
    with inner_server(*options) as running, secateur.Client(running.address) as client:
        assert client.server_info().max_model_bytes == 1 << 20


def test_the_client_reports_a_server_without_the_method_as_older() -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with (
        secateur.Client(f"127.0.0.1:{port}", timeout=TIMEOUT) as client,
        pytest.raises(secateur.InvalidRequest, match=r"it is older than this client \(secateur"),
    ):
        client.server_info()
    server.stop(None).wait()
