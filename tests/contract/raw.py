"""Calls that the Python client cannot make: any bytes, in any order."""

import json
import resource
import shutil
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import grpc
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RequestInfo, RetryInfo
from grpc_status import rpc_status
from hypothesis import settings
from prometheus_client.parser import text_string_to_metric_families

from secateur_proto import pruner_pb2 as pb
from secateur_proto import spec_pb2
from secateur_proto.pruner_pb2_grpc import PrunerStub
from tests.conftest import PATIENCE, RunningServer, eventually, start_server

TIMEOUT = PATIENCE

unhurried = settings(deadline=None)

INVALID_ARGUMENT = grpc.StatusCode.INVALID_ARGUMENT
# An option of channels: by default channels with the same options share a connection.
OWN_CONNECTION = ("grpc.use_local_subchannel_pool", 1)
RPCS = ("Prune", "Report", "Plan", "Finalize")
_REQUESTS: dict[str, Any] = {
    "Prune": (pb.PruneRequest, pb.PruneHeader),
    "Report": (pb.ReportRequest, pb.ReportHeader),
    "Plan": (pb.PlanRequest, pb.PlanHeader),
    "Finalize": (pb.FinalizeRequest, pb.FinalizeHeader),
}
Message = TypeVar("Message")


@dataclass(frozen=True)
class Failure:
    """The status of a call that failed, with google.rpc's details."""

    code: grpc.StatusCode
    message: str
    reason: str
    domain: str
    fields: tuple[str, ...]
    descriptions: tuple[str, ...]


def failure(call: Callable[..., object], *arguments: Any, **options: Any) -> Failure | None:
    """Makes a call. Returns how it failed, or None if it succeeded."""
    try:
        call(*arguments, **options)
    except grpc.RpcError as error:
        return read_failure(cast(grpc.Call, error))
    return None


def read_failure(call: grpc.Call) -> Failure:
    """Reads the status of a failed call."""
    info, bad_request = ErrorInfo(), BadRequest()
    status = rpc_status.from_call(call)
    for detail in status.details if status else ():
        assert any(map(detail.Unpack, (info, bad_request, RequestInfo(), RetryInfo()))), detail
    return Failure(
        call.code(),
        call.details(),
        info.reason,
        info.domain,
        tuple(violation.field for violation in bad_request.field_violations),
        tuple(violation.description for violation in bad_request.field_violations),
    )


def check_failed(found: Failure | None, code: grpc.StatusCode, reason: str) -> Failure:
    """Checks the code and the reason of a failed call, and returns its status."""
    assert found is not None, "the call succeeded"
    assert (found.code, found.reason) == (code, reason), found
    return found


def check_invalid(found: Failure | None, reason: str, field: str, parts: Iterable[str]) -> None:
    """Checks the status that the contract demands for every bad request."""
    assert found is not None, "the call succeeded"
    assert found.code == INVALID_ARGUMENT, found
    assert (found.domain, found.reason, found.fields) == ("secateur", reason, (field,)), found
    assert field in found.message, found
    assert found.descriptions[0] in found.message, found
    missing = [part for part in parts if part not in found.message]
    assert not missing, f"{missing} not in {found.message!r}"


def is_served(found: Failure | None) -> bool:
    """Whether a call succeeded, or failed with an error that blames the caller."""
    return found is None or (found.code == INVALID_ARGUMENT and found.domain == "secateur")


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """Returns the metadata of a caller with a token; none for an empty token."""
    return (("authorization", f"Bearer {token}"),) if token else ()


def header(rpc: str, data_bytes: int, **fields: Any) -> Any:
    """Makes the header of an rpc. The default spec fits any model of floats."""
    if rpc in ("Prune", "Plan"):
        fields.setdefault("spec", spec("*"))
    return _REQUESTS[rpc][1](data_bytes=data_bytes, **fields)


def message(rpc: str, **fields: Any) -> Any:
    """Makes a request message of an rpc."""
    return _REQUESTS[rpc][0](**fields)


def send(
    channel: grpc.Channel, rpc: str, messages: Iterable[Any], timeout: float = TIMEOUT
) -> list[Any]:
    """Sends messages. Returns the messages of the answer, or raises grpc.RpcError."""
    answer: Any = getattr(PrunerStub(channel), rpc)(iter(messages), timeout=timeout)
    return [answer] if rpc in ("Report", "Plan") else list(answer)


def send_file(
    channel: grpc.Channel, rpc: str, data: bytes, announced: int | None = None, **fields: Any
) -> Failure | None:
    """Sends a file in one message."""
    first = header(rpc, len(data) if announced is None else announced, **fields)
    return failure(send, channel, rpc, [message(rpc, header=first, data=data)])


@contextmanager
def open_streams() -> Iterator[Callable[..., Iterator[Any]]]:
    """Yields a function that makes streams of messages, which do not end while the block runs."""
    ended = threading.Event()

    def stream(messages: Iterable[Any] = ()) -> Iterator[Any]:
        yield from messages
        ended.wait(300)

    try:
        yield stream
    finally:
        ended.set()


@contextmanager
def kept_open(messages: Iterable[Message]) -> Iterator[Iterator[Message]]:
    """Yields a stream of messages that does not end while the block runs."""
    with open_streams() as stream:
        yield stream(messages)


def file(table: Mapping[str, Any] | bytes, data: bytes = b"") -> bytes:
    """Makes a safetensors file, possibly a wrong one, from a header and data.

    Args:
        table: The header as an object, or its bytes.
        data: The bytes after the header.
    """
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: Any, shape: Any, *offsets: Any) -> dict[str, Any]:
    """Makes the entry of a tensor in a safetensors header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def spec(*tensors: str, **fields: Any) -> spec_pb2.PruningSpec:
    """Makes a spec of one rule. By default it prunes half of each tensor's elements.

    Args:
        tensors: Names and globs.
        fields: Fields of Selection; None leaves a field out.
    """
    choices: dict[str, Any] = {
        "granularity": spec_pb2.GRANULARITY_ELEMENT,
        "scope": spec_pb2.SCOPE_PER_TENSOR,
        "magnitude": None if "random" in fields else spec_pb2.Magnitude(p=1),
        "fraction": None if "count" in fields else 0.5,
        **fields,
    }
    given = {name: value for name, value in choices.items() if value is not None}
    selection = spec_pb2.Selection(tensors=tensors, **given)
    return spec_pb2.PruningSpec(rules=[spec_pb2.Rule(selection=selection)])


def masks(**holders: str) -> spec_pb2.PruningSpec:
    """Makes a spec of one rule with custom masks."""
    rule = spec_pb2.Rule(custom_masks=spec_pb2.CustomMasks(masks=holders))
    return spec_pb2.PruningSpec(rules=[rule])


@contextmanager
def confined_server(*options: str) -> Iterator[RunningServer]:
    """Runs a server in its own process with little memory, for requests that might exhaust it."""
    running = start_server(*options)
    # The stacks of its threads reserve about 4 GiB of this, and use hardly any.
    resource.prlimit(running.process.pid, resource.RLIMIT_DATA, (8 << 30, 8 << 30))
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()
        shutil.rmtree(running.log.parent)


class HasMetrics(Protocol):
    """A server, in its own process or in this one."""

    @property
    def metrics_address(self) -> str | None:
        """The address of its metrics."""


def samples(server: HasMetrics, name: str, **labels: str) -> list[float]:
    """Returns the values of the samples of a metric that have these labels."""
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=300) as answer:
        text = answer.read().decode()
    # Parsing all of them would take longer than most calls.
    lines = (line for line in text.splitlines(keepends=True) if line.startswith(name))
    return [
        sample.value
        for family in text_string_to_metric_families("".join(lines))
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]


def series(server: HasMetrics, name: str, **labels: str) -> float:
    """Returns the sum of the samples of a metric that have these labels."""
    return sum(samples(server, name, **labels))


def check_serves(server: HasMetrics, channel: grpc.Channel) -> None:
    """Checks that the server serves a good request, and has released everything of earlier ones."""
    data = file({"w": entry("F32", [2], 0, 8)}, b"\0" * 8)
    assert send_file(channel, "Prune", data) is None
    eventually(lambda: series(server, "secateur_model_bytes"), 0.0)
    eventually(lambda: series(server, "secateur_requests_in_flight"), 0.0)
