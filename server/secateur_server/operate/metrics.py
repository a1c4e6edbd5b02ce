"""What Prometheus sees. The RPC level has go-grpc-prometheus's names, which dashboards know."""

import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version

import grpc
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

from secateur_proto.report_pb2 import SparsityReport
from secateur_server.operate.around import Method
from secateur_server.pruning.spec import Parameter

# From a LeNet, about 1 ms, to tens of GB, minutes.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180, 600)

_METHOD = ("grpc_type", "grpc_service", "grpc_method")
_PRUNER = "secateur.v1.Pruner"
_CHECKPOINTS = "secateur.v1.Checkpoints"
_METHODS = (
    Method(_PRUNER, "Prune", "bidi_stream"),
    Method(_PRUNER, "Report", "client_stream"),
    Method(_PRUNER, "Finalize", "bidi_stream"),
    Method(_CHECKPOINTS, "Upload", "client_stream"),
    Method(_CHECKPOINTS, "QueryUpload", "unary"),
    Method(_CHECKPOINTS, "Download", "server_stream"),
    Method(_CHECKPOINTS, "Get", "unary"),
    Method(_CHECKPOINTS, "List", "unary"),
    Method(_CHECKPOINTS, "Delete", "unary"),
)
_KIND_OF = {(method.service, method.name): method.kind for method in _METHODS}


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, device: torch.device) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._started = Counter(
            "grpc_server_started_total", "RPCs started on the server.", _METHOD, registry=registry
        )
        self._handled = Counter(
            "grpc_server_handled_total",
            "RPCs completed on the server, regardless of success or failure.",
            (*_METHOD, "grpc_code"),
            registry=registry,
        )
        self._handling = Histogram(
            "grpc_server_handling_seconds",
            "Response latency of RPCs that the server handled, in seconds.",
            _METHOD,
            buckets=SECONDS,
            registry=registry,
        )
        self._received = Counter(
            "secateur_received_bytes_total", "Bytes of models received.", registry=registry
        )
        self._sent = Counter(
            "secateur_sent_bytes_total", "Bytes of masks and models sent.", registry=registry
        )
        self._pruned = Counter(
            "secateur_pruned_elements_total",
            "Elements that were pruned and had not been before.",
            registry=registry,
        )
        self._in_flight = Gauge(
            "secateur_requests_in_flight", "RPCs that are being served.", registry=registry
        )
        self._held = Gauge(
            "secateur_model_bytes", "Bytes of the models that are being served.", registry=registry
        )
        self._store_bytes = Gauge(
            "secateur_store_bytes", "Bytes of checkpoints on disk.", registry=registry
        )
        self._store_limit = Gauge(
            "secateur_store_limit_bytes", "Bytes that checkpoints may take.", registry=registry
        )
        self._checkpoints = Gauge("secateur_checkpoints", "Checkpoints kept.", registry=registry)
        self._evictions = Counter(
            "secateur_evictions_total",
            "Checkpoints that were let go, by reason: room for others, or ttl.",
            ("reason",),
            registry=registry,
        )
        self._evicted = Counter(
            "secateur_evicted_bytes_total", "Bytes on disk that evictions freed.", registry=registry
        )
        self._resumed = Counter(
            "secateur_uploads_resumed_total", "Uploads that went on.", registry=registry
        )
        for reason in ("room", "ttl"):
            self._evictions.labels(reason)
        Info("secateur_build", "Versions, and the device.", registry=registry).info(
            {
                "version": version("secateur"),
                "torch": torch.__version__,
                "python": platform.python_version(),
                "device": str(device),
            }
        )
        for method in _METHODS:  # a counter that is not there yet hides its first increase
            self._started.labels(method.kind, method.service, method.name)
            self._handled.labels(method.kind, method.service, method.name, "OK")

    @contextmanager
    def calls(self, method: Method, context: grpc.ServicerContext) -> Iterator[None]:
        """Counts and times a call."""
        # A Prune of one message is served as if it were unary.
        kind = _KIND_OF.get((method.service, method.name), method.kind)
        labels = (kind, method.service, method.name)
        self._started.labels(*labels).inc()
        begun, failed = time.perf_counter(), True
        try:
            with self._in_flight.track_inprogress():
                yield
            failed = False
        finally:
            self._handling.labels(*labels).observe(time.perf_counter() - begun)
            self._handled.labels(*labels, code_of(context, failed)).inc()

    @contextmanager
    def holding(self, model_bytes: int) -> Iterator[None]:
        """Counts a model as held."""
        self._held.inc(model_bytes)
        try:
            yield
        finally:
            self._held.dec(model_bytes)

    def of_store(self, used: Callable[[], int], count: Callable[[], int], limit: int) -> None:
        """Shows a store: the bytes and the number of its checkpoints, and its limit."""
        self._store_bytes.set_function(used)
        self._checkpoints.set_function(count)
        self._store_limit.set(limit)

    def evicted(self, reason: str, count: int) -> None:
        """Counts a checkpoint that was let go, and the bytes that this freed."""
        self._evictions.labels(reason).inc()
        self._evicted.inc(count)

    def resumed(self) -> None:
        """Counts an upload that went on from where it broke."""
        self._resumed.inc()

    def received(self, count: int) -> None:
        """Counts bytes of models that came."""
        self._received.inc(count)

    def sent(self, count: int) -> None:
        """Counts bytes of results that went."""
        self._sent.inc(count)

    def pruned(self, before: Mapping[str, Parameter], report: SparsityReport) -> None:
        """Counts the elements that became pruned."""
        for tensor in report.tensors:
            mask = before[tensor.name].mask
            pruned_before = 0 if mask is None else mask.elements - mask.kept
            self._pruned.inc(tensor.pruned - pruned_before)


def code_of(context: grpc.ServicerContext, failed: bool) -> str:
    """The status of a call that has ended, as Go spells it."""
    code: grpc.StatusCode | None = context.code()  # type: ignore[attr-defined]
    if code is not None:
        name = code.name
    elif not failed:
        name = "OK"
    elif context.is_active():
        name = "UNKNOWN"
    else:  # it ended from outside: by its deadline, or by its caller
        left = context.time_remaining()
        name = "DEADLINE_EXCEEDED" if left is not None and left <= 0 else "CANCELLED"
    return {"OK": "OK", "CANCELLED": "Canceled"}.get(name, name.title().replace("_", ""))
