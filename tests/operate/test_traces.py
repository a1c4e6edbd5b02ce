"""Traces, as a collector receives them."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

import secateur
from secateur_proto import pruner_pb2, pruner_pb2_grpc
from secateur_proto.framing import file_header
from tests.conftest import inner_server, run_command, start_server, stop_server

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
MODEL = {"w": np.arange(1, 9, dtype=np.float32).reshape(2, 4)}


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resources: list[Any] = []
        self.lock = threading.Lock()

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        with self.lock:
            for of_resource in request.resource_spans:
                self.resources.append(of_resource.resource)
                for scope in of_resource.scope_spans:
                    self.spans += scope.spans
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    found = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    add = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
    add(found, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield found, f"http://127.0.0.1:{port}"
    server.stop(None).wait()


def test_a_call_is_a_span_of_its_callers_trace_and_its_stages_lie_within(
    collector: tuple[Collector, str],
) -> None:
    found, endpoint = collector
    server = start_server("--otlp-endpoint", endpoint)
    data = file_header([("w", "F32", (8,))]) + MODEL["w"].tobytes()
    header = pruner_pb2.ReportHeader(data_bytes=len(data))
    with grpc.insecure_channel(server.address) as channel:
        pruner_pb2_grpc.PrunerStub(channel).Report(
            iter([pruner_pb2.ReportRequest(header=header, data=data)]),
            metadata=(("traceparent", f"00-{TRACE}-{PARENT}-01"), ("x-request-id", "traced")),
        )
    with secateur.Client(server.address) as client:
        client.prune(MODEL, secateur.l1_unstructured("w", 0.5))
    stop_server(server)  # it sends the remaining spans

    rpc = {span.name.strip("/"): span for span in found.spans}
    called = rpc["secateur.v1.Pruner/Report"]
    assert (called.trace_id.hex(), called.parent_span_id.hex()) == (TRACE, PARENT)
    values = {pair.key: pair.value.string_value for pair in called.attributes}
    assert values["secateur.request_id"] == "traced"
    pruned = rpc["secateur.v1.Pruner/Prune"]
    stages = [span for span in found.spans if span.parent_span_id == pruned.span_id]
    assert {span.name for span in stages} == {"receive", "score", "select", "encode"}
    for span in stages:
        assert pruned.start_time_unix_nano <= span.start_time_unix_nano
        assert span.start_time_unix_nano <= span.end_time_unix_nano <= pruned.end_time_unix_nano
    names = {pair.key: pair.value.string_value for pair in found.resources[0].attributes}
    assert names["service.name"] == "secateur"


def test_missing_collector_blocks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")  # for the spans that it sends at its end
    with (
        inner_server("--otlp-endpoint", "http://127.0.0.1:1") as server,
        secateur.Client(server.address, timeout=300) as client,
    ):
        assert client.prune(MODEL, secateur.l1_unstructured("w", 0.5)).report.zeros == 4


def test_missing_packages_error_says_what_to_install(tmp_path: Any) -> None:
    hidden = tmp_path / "opentelemetry"
    hidden.mkdir()
    (hidden / "__init__.py").write_text("raise ImportError('hidden', name='opentelemetry')")
    free = "--address", "127.0.0.1:0", "--metrics-address", ""
    ended = run_command(*free, "--otlp-endpoint", "http://127.0.0.1:1", PYTHONPATH=str(tmp_path))
    assert ended.returncode == 1
    assert "--otlp-endpoint needs opentelemetry: pip install 'secateur[otel]'" in ended.stderr
