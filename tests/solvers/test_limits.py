"""What solvers may take: they end when their call is cancelled, and reserve their memory."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
import torch

from secateur_proto import pruner_pb2
from secateur_proto import spec_pb2 as pb
from secateur_proto.pruner_pb2_grpc import PrunerStub
from secateur_server.errors import Cancelled, QueueFull, RequestTooLarge
from secateur_server.runtime.context import RequestContext, Tenant
from secateur_server.runtime.scheduler import Scheduler
from secateur_server.solvers import factor
from secateur_server.solvers.factor import cholesky, cholesky_solve, product
from tests.conftest import RunningServer, eventually, start_server, stop_server
from tests.contract import raw
from tests.solvers.test_rubbish import (
    ALPS,
    METHODS,
    REFIT,
    SPARSEGPT,
    Method,
    file_of,
    gram_of,
    of_all_methods,
    prune,
    refused,
    rules_of,
    triangle_of,
)

FIELDS = {"output": pruner_pb2.OUTPUT_DENSE}


@pytest.fixture
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factor, "_BLOCK", 5)
    monkeypatch.setattr(factor, "_STEPS", 100)
    monkeypatch.setattr(factor, "_LEAST_ROWS", 3)


@pytest.mark.usefixtures("_small_steps")
@pytest.mark.parametrize("size", [0, 1, 5, 6, 33])
def test_steps_give_what_lapack_gives(size: int) -> None:
    matrix, context = gram_of(size).double() + torch.eye(size), RequestContext()
    lower = matrix.clone()
    assert cholesky(context, lower) == 0
    torch.testing.assert_close(lower, torch.linalg.cholesky(matrix))
    rows = torch.randn(7, size, dtype=torch.float64)
    torch.testing.assert_close(product(context, rows, matrix), rows @ matrix)
    torch.testing.assert_close(cholesky_solve(context, lower, rows @ matrix), rows)


@pytest.mark.usefixtures("_small_steps")
@pytest.mark.parametrize("index", [0, 4, 5, 17, 32])
def test_the_first_minor_that_is_not_positive_is_named(index: int) -> None:
    matrix = torch.eye(33)
    matrix[index, index] = -1
    assert cholesky(RequestContext(), matrix) == index + 1


@pytest.mark.usefixtures("_small_steps")
def test_each_step_checks_for_cancellation() -> None:
    context = RequestContext()
    context.cancel()
    matrix = gram_of(33) + torch.eye(33)
    for work in (
        lambda: cholesky(context, matrix.clone()),
        lambda: cholesky_solve(context, matrix, torch.ones(2, 33)),
        lambda: product(context, torch.ones(2, 33), matrix),
    ):
        with pytest.raises(Cancelled):
            work()


@contextmanager
def running(
    channel: grpc.Channel, rules: list[pb.Rule], data: bytes, **options: Any
) -> Iterator[Any]:
    """A call that sends data, and then waits for its end."""
    announced = options.pop("announced", len(data))
    first = raw.header("Prune", announced, spec=pb.PruningSpec(rules=rules), **FIELDS)
    parts = [data[i : i + 1_000_000] for i in range(0, len(data), 1_000_000)]
    messages = [
        pruner_pb2.PruneRequest(header=first),
        *(pruner_pb2.PruneRequest(data=part) for part in parts),
    ]
    with raw.kept_open(messages) as stream:
        yield PrunerStub(channel).Prune(stream, **options)


def in_flight(server: RunningServer) -> float:
    return raw.series(server, "secateur_requests_in_flight")


@pytest.fixture(scope="module")
def layer() -> bytes:
    """A layer of 2048 x 2048 that is solved 100 times."""
    gram = triangle_of(gram_of(2048, rows=64) + torch.eye(2048))
    return file_of({"w": torch.randn(2048, 2048), "g": gram})


@of_all_methods
@pytest.mark.parametrize("has_deadline", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_solver_ends_when_its_call_does(
    server: RunningServer,
    channel: grpc.Channel,
    layer: bytes,
    method: Method,
    has_deadline: bool,
) -> None:
    """By itself, a call would take minutes."""
    rules = rules_of(method, **({} if method is REFIT else {"count": 20_000}))
    rules = [*rules[:-1], *rules[-1:] * 100]
    received = len(layer) + raw.series(server, "secateur_received_bytes_total")
    eventually(lambda: in_flight(server), 0.0)
    options = {"timeout": 4.0} if has_deadline else {}
    with running(channel, rules, layer, **options) as call:
        if not has_deadline:
            eventually(
                lambda: raw.series(server, "secateur_received_bytes_total") >= received, True
            )
            time.sleep(1)  # the solver has begun; nothing else tells
            call.cancel()
        with pytest.raises(grpc.RpcError):
            list(call)
        expected = grpc.StatusCode.DEADLINE_EXCEEDED if has_deadline else grpc.StatusCode.CANCELLED
        assert call.code() == expected
        eventually(lambda: in_flight(server), 0.0)


@pytest.mark.parametrize("share", [0.2, 0.6, 0.999])
def test_a_caller_leaves_in_the_middle_of_a_gram_matrix(
    server: RunningServer, channel: grpc.Channel, layer: bytes, share: float
) -> None:
    part = layer[: int(share * len(layer))]
    eventually(lambda: in_flight(server), 0.0)
    with running(channel, rules_of(SPARSEGPT), part, announced=len(layer)) as call:
        eventually(lambda: in_flight(server), 1.0)
        call.cancel()
        eventually(lambda: in_flight(server), 0.0)
    raw.check_serves(server, channel)


def test_a_gram_matrix_that_stops_arriving_ends_its_call(layer: bytes) -> None:
    server = start_server("--idle-timeout", "1")
    try:
        with grpc.insecure_channel(server.address) as channel:
            part = layer[: -len(layer) // 4]
            with running(channel, rules_of(REFIT), part, announced=len(layer)) as call:
                with pytest.raises(grpc.RpcError):
                    list(call)
                found = raw.read_failure(call)
            raw.check_failed(found, grpc.StatusCode.DEADLINE_EXCEEDED, "IDLE_TIMEOUT")
            raw.check_serves(server, channel)
    finally:
        stop_server(server)


def test_two_calls_that_stream_gram_matrices_do_not_block_each_other(
    channel: grpc.Channel,
) -> None:
    gram = triangle_of(gram_of(512))
    names = [f"w{i}" for i in range(8)]
    weights = {name: torch.randn(512, 512) for name in names}
    tensors = {**weights, **{f"g{name}": gram for name in names}}
    grams = {name: pb.Gram(holder=f"g{name}") for name in names}
    rules = rules_of(SPARSEGPT, tensors=["w*"], grams=grams)
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(prune(channel, rules, tensors)[1]))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert all(torch.equal(found[0][n] == 0, other[n] == 0) for other in found for n in names)


def test_memory_is_refused_before_it_is_allocated() -> None:
    """A Gram matrix, and the copies of a wide layer, with a server of little memory."""
    server = start_server("--max-model-bytes", "64MiB", "--memory-limit", "64MiB")
    try:
        with grpc.insecure_channel(server.address) as channel:
            size = 20_000
            table = {
                "w": raw.entry("F32", [1, size], 0, 4 * size),
                "g": raw.entry(
                    "F32", [size * (size + 1) // 2], 4 * size, 4 * size + 2 * size * (size + 1)
                ),
            }
            head = raw.file(table)
            announced = len(head) + 4 * size + 2 * size * (size + 1)
            with running(channel, rules_of(SPARSEGPT), head, announced=announced) as call:
                with pytest.raises(grpc.RpcError):
                    list(call)
                found = raw.read_failure(call)
            raw.check_failed(found, grpc.StatusCode.RESOURCE_EXHAUSTED, "MODEL_TOO_LARGE")
            assert "Gram" in found.message
            wide = {"w": torch.randn(60_000, 16), "g": triangle_of(gram_of(16))}
            data = file_of(wide)
            for method, fails in ((SPARSEGPT, False), (ALPS, True)):
                spec = pb.PruningSpec(rules=rules_of(method))
                failed = raw.send_file(channel, "Prune", data, spec=spec, **FIELDS)
                assert (failed is not None) == fails, failed
            raw.check_failed(failed, grpc.StatusCode.RESOURCE_EXHAUSTED, "REQUEST_TOO_LARGE")
            raw.check_serves(server, channel)
    finally:
        stop_server(server)


def test_working_memory_is_refused_and_never_waited_for() -> None:
    mib = 1 << 20
    scheduler = Scheduler(100 * mib, 4)
    first, second = RequestContext(), RequestContext()
    with scheduler.model(first, "f", 30 * mib), scheduler.model(second, "f", 30 * mib):
        with (
            pytest.raises(RequestTooLarge, match="71"),
            scheduler.working_memory(first, "f", 71 * mib, f"{71}"),
        ):
            pass
        with scheduler.working_memory(first, "f", 30 * mib, "a solver"):
            with pytest.raises(QueueFull), scheduler.working_memory(second, "f", 30 * mib, "it"):
                pass
            assert scheduler.models.held == 90 * mib
        with scheduler.working_memory(second, "f", 40 * mib, "a solver"):
            assert scheduler.models.held == 100 * mib
    assert scheduler.models.held == 0


def test_working_memory_counts_for_the_tenant() -> None:
    mib = 1 << 20
    scheduler, contexts = Scheduler(100 * mib, 4), [RequestContext(), RequestContext()]
    for context in contexts:
        context.tenant = Tenant("a", "a" * 32, memory=50 * mib)
    with scheduler.model(contexts[0], "f", 20 * mib), scheduler.model(contexts[1], "f", 20 * mib):
        with (
            pytest.raises(RequestTooLarge),
            scheduler.working_memory(contexts[0], "f", 31 * mib, "a solver"),
        ):
            pass
        with (
            pytest.raises(QueueFull, match="tenant 'a'"),
            scheduler.working_memory(contexts[0], "f", 20 * mib, "a solver"),
        ):
            pass


@pytest.mark.parametrize(("method", "repeated"), [(ALPS, 50), (SPARSEGPT, 9_000)])
def test_the_steps_of_a_gram_matrix_are_limited(
    channel: grpc.Channel, method: Method, repeated: int
) -> None:
    """Before any of the data arrives."""
    rows, inputs = 4096, 4096
    ends = 4 * rows * inputs, 4 * rows * inputs + 2 * inputs * (inputs + 1)
    table = {
        "w": raw.entry("F32", [rows, inputs], 0, ends[0]),
        "g": raw.entry("F32", [inputs * (inputs + 1) // 2], *ends),
    }
    head = raw.file(table)
    rules = rules_of(method) * repeated
    with running(channel, rules, head, announced=len(head) + ends[1]) as call:
        with pytest.raises(grpc.RpcError):
            list(call)
        found = raw.read_failure(call)
    raw.check_failed(found, raw.INVALID_ARGUMENT, "INVALID_SPEC")
    assert "steps" in found.message


def test_warnings_say_what_solvers_could_not_do(channel: grpc.Channel) -> None:
    weight, gram = torch.randn(4, 8), triangle_of(gram_of(8))
    zero = torch.zeros_like(gram)

    def codes(rules: list[pb.Rule], **tensors: torch.Tensor) -> set[str]:
        report, _ = prune(channel, rules, {"w": weight, **tensors})
        return {warning.code for warning in report.warnings if warning.severity == 2}

    refit = rules_of(REFIT)
    assert codes(refit, g=gram) == set()
    assert codes(refit[1:], g=gram) == {"NOTHING_TO_REFIT"}
    assert codes(refit, g=zero) == {"ZERO_GRAM"}
    for method in METHODS.values():
        assert "ZERO_GRAM" in codes(rules_of(method), g=zero)
        if method is not REFIT:
            assert codes(rules_of(method, fraction=1.0), g=gram) == set(), "it was asked for"
            assert codes(rules_of(method, count=32), g=gram) == {"WHOLLY_ZERO"}
    given = pb.Activation(inputs={"w": "f"})
    by_factors = list(raw.spec("w", magnitude=None, activation=given).rules)
    assert codes(by_factors, f=torch.ones(8)) == set()
    assert codes(by_factors, f=torch.zeros(8)) == {"ZERO_FACTORS"}


def test_blocks_are_limited(channel: grpc.Channel) -> None:
    rules = rules_of({"sparsegpt": pb.SparseGpt(block_size=4097)})
    tensors = {"w": torch.randn(4, 8), "g": triangle_of(gram_of(8))}
    found = refused(channel, rules, tensors)
    assert found.fields == ("spec.rules[0].solver.sparsegpt.block_size",), found
    prune(channel, rules_of({"sparsegpt": pb.SparseGpt(block_size=4096)}), tensors)
