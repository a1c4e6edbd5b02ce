"""The metrics for Prometheus. RPCs have go-grpc-prometheus's names, which dashboards know."""

import platform
from collections.abc import Callable, Iterator
from importlib.metadata import version

import torch
from grpc import StatusCode
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

from secateur_proto.report_pb2 import SparsityReport
from secateur_server.backends.memory import memory_of
from secateur_server.errors import RequestError
from secateur_server.runtime.context import Method, RequestContext
from secateur_server.runtime.scheduler import Scheduler

# From a LeNet, about 1 ms, to tens of GB, which take minutes.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180, 600)
SHARES = (0.1, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1)
STAGES = ("receive", "score", "select", "encode", "send")

_METHOD = ("grpc_type", "grpc_service", "grpc_method")
_PRUNER = "secateur.v1.Pruner"
_CHECKPOINTS = "secateur.v1.Checkpoints"
_METHODS = (
    Method(_PRUNER, "Prune", "bidi_stream"),
    Method(_PRUNER, "Report", "client_stream"),
    Method(_PRUNER, "Plan", "client_stream"),
    Method(_PRUNER, "Finalize", "bidi_stream"),
    Method(_PRUNER, "GetServerInfo", "unary"),
    Method(_CHECKPOINTS, "Upload", "client_stream"),
    Method(_CHECKPOINTS, "QueryUpload", "unary"),
    Method(_CHECKPOINTS, "Download", "server_stream"),
    Method(_CHECKPOINTS, "Get", "unary"),
    Method(_CHECKPOINTS, "List", "unary"),
    Method(_CHECKPOINTS, "Delete", "unary"),
)
_KIND_OF = {(method.service, method.name): method.kind for method in _METHODS}


class Metrics:
    """The metrics of one server, in a registry of their own.

    Args:
        device: The server's.

    Attributes:
        registry: Of Prometheus.
    """

    def __init__(self, device: torch.device) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._add_call_metrics()
        self._add_work_metrics()
        self._add_store_metrics()
        self._add_device_metrics(device)
        self._reloads = Counter(
            "secateur_reloads_total",
            "Reloads of changed files, by result.",
            ("file", "result"),
            registry=self.registry,
        )

    def _add_call_metrics(self) -> None:
        registry = self.registry
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
        self._messages_received = Counter(
            "grpc_server_msg_received_total",
            "RPC stream messages received on the server.",
            _METHOD,
            registry=registry,
        )
        self._messages_sent = Counter(
            "grpc_server_msg_sent_total",
            "RPC stream messages sent by the server.",
            _METHOD,
            registry=registry,
        )
        self._in_flight = self._gauge(
            "requests_in_flight", "RPCs that have begun and not ended, including waiting ones."
        )
        self._rejected = Counter(
            "secateur_rejected_requests_total",
            "RPCs that failed, by the reason in google.rpc.ErrorInfo.",
            ("reason",),
            registry=registry,
        )
        self._message_counters: dict[Method, tuple[Counter, Counter]] = {}
        self._method_series: dict[Method, tuple[Counter, Histogram, _Codes]] = {}
        for method in _METHODS:  # Prometheus misses the first increase of a new series
            codes = self._series(method)[2]
            for code in StatusCode:
                codes[go_code_name(code.name)]
            self.messages(method)
        for reason in _reasons():
            self._rejected.labels(reason)

    def _add_work_metrics(self) -> None:
        self._received = self._counter("received_bytes_total", "Bytes of models received.")
        self._sent = self._counter("sent_bytes_total", "Bytes of masks and models sent.")
        self._elements = self._counter("elements_total", "Elements of tensors that were reported.")
        self._pruned = self._counter("pruned_elements_total", "Elements that became pruned.")
        self._stages = Histogram(
            "secateur_stage_seconds",
            "Time of a call in each stage, summed over threads.",
            ("stage",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self._stage_times = {stage: self._stages.labels(stage) for stage in STAGES}
        self._queue = self._histogram(
            "queue_seconds", "Time that a call waited for memory.", SECONDS
        )
        self._time_to_report = self._histogram(
            "time_to_report_seconds", "Time from the start of a call to its report.", SECONDS
        )
        self._sparsity = self._histogram(
            "result_sparsity_ratio", "Share of zeros in the tensors that were pruned.", SHARES
        )

    def _add_store_metrics(self) -> None:
        self._store_bytes = self._gauge("store_bytes", "Bytes of checkpoints on disk.")
        self._store_limit = self._gauge("store_limit_bytes", "Bytes that checkpoints may take.")
        self._checkpoints = self._gauge("checkpoints", "Checkpoints kept.")
        self._evictions = Counter(
            "secateur_evictions_total",
            "Evicted checkpoints, by reason: room (for others), quota, or ttl.",
            ("reason",),
            registry=self.registry,
        )
        for reason in ("room", "quota", "ttl"):
            self._evictions.labels(reason)
        self._evicted = self._counter("evicted_bytes_total", "Bytes on disk that evictions freed.")
        self._fetched = self._counter("fetched_bytes_total", "Bytes fetched from URIs.")
        self._fetched_disk = self._gauge(
            "fetched_disk_bytes", "Bytes on disk of fetched files of running calls."
        )
        self._broken = self._counter("uploads_broken_total", "Uploads whose connection broke.")
        self._resumed = self._counter("uploads_resumed_total", "Uploads that were resumed.")

    def _add_device_metrics(self, device: torch.device) -> None:
        used = self._gauge(
            "device_memory_used_bytes", "Memory of the device in use by any process."
        )
        free = self._gauge("device_memory_free_bytes", "Free memory of the device.")
        used.set_function(lambda: memory_of(device)[0])
        free.set_function(lambda: memory_of(device)[1])
        Info("secateur_build", "Versions and the device.", registry=self.registry).info(
            {
                "version": version("secateur"),
                "torch": torch.__version__,
                "python": platform.python_version(),
                "device": str(device),
            }
        )

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"secateur_{name}", text, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"secateur_{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"secateur_{name}", text, buckets=buckets, registry=self.registry)

    def began(self, call: RequestContext) -> None:
        """Counts a call that begins."""
        self._series(call.method)[0].inc()
        self._in_flight.inc()

    def ended(self, call: RequestContext) -> None:
        """Counts a call that has ended, with its times."""
        _, handling, handled = self._series(call.method)
        self._in_flight.dec()
        handling.observe(call.seconds)
        handled[call.code].inc()
        if call.reason:
            self._rejected.labels(call.reason).inc()
        for name, stage in call.stages.items():
            self._stage_times[name].observe(stage.seconds)
        if call.queued is not None:
            self._queue.observe(call.queued)
        if call.time_to_report is not None:
            self._time_to_report.observe(call.time_to_report)

    def _series(self, method: Method) -> tuple[Counter, Histogram, "_Codes"]:
        """The series of a method, cached: looking them up by labels is slower than counting."""
        if method not in self._method_series:
            labels = _labels(method)
            self._method_series[method] = (
                self._started.labels(*labels),
                self._handling.labels(*labels),
                _Codes(lambda code: self._handled.labels(*labels, code)),
            )
        return self._method_series[method]

    def messages(self, method: Method) -> tuple[Counter, Counter]:
        """The counters of a method's messages, received and sent."""
        if method not in self._message_counters:
            counters = self._messages_received, self._messages_sent
            received, sent = (counter.labels(*_labels(method)) for counter in counters)
            self._message_counters[method] = received, sent
        return self._message_counters[method]

    def show_scheduler(self, scheduler: Scheduler) -> None:
        """Shows the budgets of a scheduler, and its queues."""
        models = scheduler.models
        self._gauge(
            "model_bytes", "Bytes of memory of the models that are being served."
        ).set_function(lambda: models.held)
        self._gauge("memory_limit_bytes", "The limit of secateur_model_bytes.").set(models.limit)
        self._gauge(
            "requests_waiting", "RPCs that wait for memory, or for a quota of their tenant."
        ).set_function(lambda: models.waiting)
        self._gauge(
            "requests_waiting_for_quota", "RPCs that wait for a quota of their tenant."
        ).set_function(lambda: models.waiting_for_quota)
        self._gauge(
            "messages_waiting", "RPCs whose first message waits to be received."
        ).set_function(lambda: scheduler.messages.waiting)
        self._gauge("queue_limit", "RPCs that may wait.").set(models.max_waiting)
        self._gauge(
            "request_bytes", "Bytes of memory of first messages, headers, specs and plans."
        ).set_function(lambda: scheduler.messages.held + scheduler.other.held)
        self._gauge("request_limit_bytes", "The limit of secateur_request_bytes.").set(
            scheduler.messages.limit + scheduler.other.limit
        )

    def show_store(self, used: Callable[[], int], count: Callable[[], int], limit: int) -> None:
        """Shows a store.

        Args:
            used: Returns the bytes of its checkpoints.
            count: Returns their number.
            limit: Its limit in bytes.
        """
        self._store_bytes.set_function(used)
        self._checkpoints.set_function(count)
        self._store_limit.set(limit)

    def show_fetched(self, held: Callable[[], int]) -> None:
        """Shows the bytes on disk of fetched files.

        Args:
            held: Returns them.
        """
        self._fetched_disk.set_function(held)

    def fetched(self, count: int) -> None:
        """Counts bytes fetched from URIs."""
        self._fetched.inc(count)

    def reloaded(self, file: str, is_good: bool) -> None:
        """Counts a file that has changed, with whether it could be used."""
        self._reloads.labels(file, "ok" if is_good else "failed").inc()

    def evicted(self, reason: str, count: int) -> None:
        """Counts an evicted checkpoint, and the bytes that this freed."""
        self._evictions.labels(reason).inc()
        self._evicted.inc(count)

    def broken(self) -> None:
        """Counts an upload whose connection broke."""
        self._broken.inc()

    def resumed(self) -> None:
        """Counts an upload that was resumed."""
        self._resumed.inc()

    def received(self, context: RequestContext, count: int) -> None:
        """Counts received bytes of state_dicts."""
        self._received.inc(count)
        context.received += count

    def sent(self, context: RequestContext, count: int) -> None:
        """Counts sent bytes of results."""
        self._sent.inc(count)
        context.sent += count

    def reported(self, context: RequestContext, report: SparsityReport) -> None:
        """Counts the elements of a report, and notes the time until it was made."""
        self._elements.inc(report.total)
        context.elements, context.sparsity = report.total, report.sparsity
        context.time_to_report = context.seconds

    def pruned(self, context: RequestContext, count: int, sparsity: float) -> None:
        """Counts elements that became pruned, and observes the sparsity of the result."""
        self._pruned.inc(count)
        self._sparsity.observe(sparsity)
        context.pruned = count


class _Codes(dict[str, Counter]):
    """The counters of a method's status codes, each created at its first use."""

    def __init__(self, make: Callable[[str], Counter]) -> None:
        self._make = make

    def __missing__(self, code: str) -> Counter:
        self[code] = made = self._make(code)
        return made


def go_code_name(code: str) -> str:
    """The name of a status code in Go: `InvalidArgument` for INVALID_ARGUMENT.

    Args:
        code: As gRPC spells it.
    """
    return {"OK": "OK", "CANCELLED": "Canceled"}.get(code, code.title().replace("_", ""))


def _labels(method: Method) -> tuple[str, str, str]:
    # A Prune of one message is served as a unary call, but counted as a stream.
    kind = _KIND_OF.get((method.service, method.name), method.kind)
    return kind, method.service, method.name


def _reasons() -> Iterator[str]:
    """All reasons of errors."""
    kinds = list(RequestError.__subclasses__())
    for kind in kinds:
        kinds += kind.__subclasses__()
    return iter(dict.fromkeys(kind.reason for kind in kinds))
