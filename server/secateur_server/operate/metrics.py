"""The metrics for Prometheus. RPCs have go-grpc-prometheus's names, which dashboards know."""

import platform
from collections.abc import Callable
from importlib.metadata import version
from typing import NamedTuple

import torch
from grpc import StatusCode
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

from secateur_proto import checkpoints_pb2, pruner_pb2
from secateur_proto.report_pb2 import SparsityReport
from secateur_server.backends.memory import memory_of
from secateur_server.errors import RequestError
from secateur_server.runtime.context import Method, RequestContext
from secateur_server.runtime.scheduler import Scheduler

HELP = {
    "grpc_server_started_total": "RPCs started on the server.",
    "grpc_server_handled_total": "RPCs completed on the server, regardless of success or failure.",
    "grpc_server_handling_seconds": "Response latency of RPCs that the server handled, in seconds.",
    "grpc_server_msg_received_total": "RPC stream messages received on the server.",
    "grpc_server_msg_sent_total": "RPC stream messages sent by the server.",
    "secateur_requests_in_flight": "RPCs that have begun and not ended, including waiting ones.",
    "secateur_rejected_requests_total": "RPCs that failed, by the reason in google.rpc.ErrorInfo.",
    "secateur_received_bytes_total": "Bytes of models received.",
    "secateur_sent_bytes_total": "Bytes of masks and models sent.",
    "secateur_elements_total": "Elements of tensors that were reported.",
    "secateur_pruned_elements_total": "Elements that became pruned.",
    "secateur_stage_seconds": "Time of a call in each stage, summed over threads.",
    "secateur_queue_seconds": "Time that a call waited for memory.",
    "secateur_time_to_report_seconds": "Time from the start of a call to its report.",
    "secateur_result_sparsity_ratio": "Share of zeros in the tensors that were pruned.",
    "secateur_reloads_total": "Reloads of changed files, by result.",
    "secateur_store_bytes": "Bytes of checkpoints on disk.",
    "secateur_store_limit_bytes": "Bytes that checkpoints may take.",
    "secateur_checkpoints": "Checkpoints kept.",
    "secateur_evictions_total": "Evicted checkpoints, by reason: room (for others), quota, or ttl.",
    "secateur_evicted_bytes_total": "Bytes on disk that evictions freed.",
    "secateur_fetched_bytes_total": "Bytes fetched from URIs.",
    "secateur_fetched_disk_bytes": "Bytes on disk of fetched files of running calls.",
    "secateur_ray_tasks_total": "Tasks of the Ray cluster, by outcome.",
    "secateur_ray_retries_total": "Tasks that Ray repeated, since it lost their process or node.",
    "secateur_ray_cores": "Cores of the Ray cluster; 0: it does not answer, or there is none.",
    "secateur_ray_sent_bytes_total": "Bytes of tasks sent to the Ray cluster.",
    "secateur_ray_received_bytes_total": "Bytes of results received from the Ray cluster.",
    "secateur_uploads_broken_total": "Uploads whose connection broke.",
    "secateur_uploads_resumed_total": "Uploads that were resumed.",
    "secateur_model_bytes": "Bytes of memory of the models that are being served.",
    "secateur_memory_limit_bytes": "The limit of secateur_model_bytes.",
    "secateur_requests_waiting": "RPCs that wait for memory, or for a quota of their tenant.",
    "secateur_requests_waiting_for_quota": "RPCs that wait for a quota of their tenant.",
    "secateur_messages_waiting": "RPCs whose first message waits to be received.",
    "secateur_queue_limit": "RPCs that may wait.",
    "secateur_request_bytes": "Bytes of memory of first messages, headers, specs and plans.",
    "secateur_request_limit_bytes": "The limit of secateur_request_bytes.",
    "secateur_device_memory_used_bytes": "Memory of the device in use by any process.",
    "secateur_device_memory_free_bytes": "Free memory of the device.",
}

# From a LeNet, about 1 ms, to tens of GB, which take minutes.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180, 600)
SHARES = (0.1, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1)
STAGES = ("receive", "score", "select", "solve", "encode", "send")
EVICTION_REASONS = ("room", "quota", "ttl")
RAY_OUTCOMES = ("finished", "failed", "cancelled")

# By whether requests and answers are streams.
KINDS = {
    (False, False): "unary",
    (True, False): "client_stream",
    (False, True): "server_stream",
    (True, True): "bidi_stream",
}
_METHOD = ("grpc_type", "grpc_service", "grpc_method")
_METHODS = {
    (service.full_name, method.name): Method(
        service.full_name, method.name, KINDS[method.client_streaming, method.server_streaming]
    )
    for file in (pruner_pb2.DESCRIPTOR, checkpoints_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
}


class _Series(NamedTuple):
    started: Counter
    handling: Histogram
    received: Counter
    sent: Counter


class Metrics:
    """The metrics of one server, in a registry of their own.

    Attributes:
        registry: The registry, for a server of metrics.
        fetched: Counts bytes fetched from URIs.
        broken: Counts an upload whose connection broke.
        resumed: Counts an upload that was resumed.
        of_ray: Counts what happens in a Ray cluster, as cut.drivers.ray.Ray says.
    """

    def __init__(self, device: torch.device) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._add_call_metrics()
        self._add_work_metrics()
        self._add_store_metrics()
        self._add_cluster_metrics()
        self._add_device_metrics(device)
        self._create_series()

    def _counter(self, name: str, *labels: str) -> Counter:
        return Counter(name, HELP[name], labels, registry=self.registry)

    def _histogram(self, name: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, HELP[name], labels, buckets=buckets, registry=self.registry)

    def _gauge(self, name: str) -> Gauge:
        return Gauge(name, HELP[name], registry=self.registry)

    def _show(self, values: dict[str, Callable[[], float]]) -> None:
        for name, value in values.items():
            self._gauge(name).set_function(value)

    def _add_call_metrics(self) -> None:
        self._started = self._counter("grpc_server_started_total", *_METHOD)
        self._handled = self._counter("grpc_server_handled_total", *_METHOD, "grpc_code")
        self._handling = self._histogram("grpc_server_handling_seconds", SECONDS, *_METHOD)
        self._messages_received = self._counter("grpc_server_msg_received_total", *_METHOD)
        self._messages_sent = self._counter("grpc_server_msg_sent_total", *_METHOD)
        self._in_flight = self._gauge("secateur_requests_in_flight")
        self._rejected = self._counter("secateur_rejected_requests_total", "reason")
        self._series: dict[Method, _Series] = {}

    def _add_work_metrics(self) -> None:
        self._received = self._counter("secateur_received_bytes_total")
        self._sent = self._counter("secateur_sent_bytes_total")
        self._elements = self._counter("secateur_elements_total")
        self._pruned = self._counter("secateur_pruned_elements_total")
        stages = self._histogram("secateur_stage_seconds", SECONDS, "stage")
        self._stages = {name: stages.labels(name) for name in STAGES}
        self._queue = self._histogram("secateur_queue_seconds", SECONDS)
        self._time_to_report = self._histogram("secateur_time_to_report_seconds", SECONDS)
        self._sparsity = self._histogram("secateur_result_sparsity_ratio", SHARES)
        self._reloads = self._counter("secateur_reloads_total", "file", "result")

    def _add_store_metrics(self) -> None:
        self._evictions = self._counter("secateur_evictions_total", "reason")
        self._evicted = self._counter("secateur_evicted_bytes_total")
        self.fetched = self._counter("secateur_fetched_bytes_total").inc
        self.broken = self._counter("secateur_uploads_broken_total").inc
        self.resumed = self._counter("secateur_uploads_resumed_total").inc

    def _add_cluster_metrics(self) -> None:
        tasks = self._counter("secateur_ray_tasks_total", "outcome")
        self.of_ray = {outcome: tasks.labels(outcome).inc for outcome in RAY_OUTCOMES} | {
            "repeated": self._counter("secateur_ray_retries_total").inc,
            "sent": self._counter("secateur_ray_sent_bytes_total").inc,
            "received": self._counter("secateur_ray_received_bytes_total").inc,
        }
        self._ray_cores = self._gauge("secateur_ray_cores")

    def _add_device_metrics(self, device: torch.device) -> None:
        self._show(
            {
                "secateur_device_memory_used_bytes": lambda: memory_of(device)[0],
                "secateur_device_memory_free_bytes": lambda: memory_of(device)[1],
            }
        )
        Info("secateur_build", "Versions and the device.", registry=self.registry).info(
            {
                "version": version("secateur"),
                "torch": torch.__version__,
                "python": platform.python_version(),
                "device": str(device),
            }
        )

    def _create_series(self) -> None:
        """Creates all series at the start: Prometheus misses the first increase of a new one."""
        for method in _METHODS.values():
            for code in StatusCode:
                self._handled.labels(*_labels(method), go_code_name(code.name))
            self._series_of(method)
        for reason in _reasons():
            self._rejected.labels(reason)
        for reason in EVICTION_REASONS:
            self._evictions.labels(reason)

    def show_scheduler(self, scheduler: Scheduler) -> None:
        """Shows the budgets of a scheduler, and its queues."""
        models, messages, other = scheduler.models, scheduler.messages, scheduler.other
        self._show(
            {
                "secateur_model_bytes": lambda: models.held,
                "secateur_memory_limit_bytes": lambda: models.limit,
                "secateur_requests_waiting": lambda: models.waiting,
                "secateur_requests_waiting_for_quota": lambda: models.waiting_for_quota,
                "secateur_queue_limit": lambda: models.max_waiting,
                "secateur_messages_waiting": lambda: messages.waiting,
                "secateur_request_bytes": lambda: messages.held + other.held,
                "secateur_request_limit_bytes": lambda: messages.limit + other.limit,
            }
        )

    def show_store(self, used: Callable[[], int], count: Callable[[], int], limit: float) -> None:
        """Shows a store: the bytes of its checkpoints, their number, and its limit in bytes."""
        self._show({"secateur_store_bytes": used, "secateur_checkpoints": count})
        self._gauge("secateur_store_limit_bytes").set(limit)

    def show_fetched(self, held: Callable[[], int]) -> None:
        """Shows the bytes on disk of fetched files."""
        self._show({"secateur_fetched_disk_bytes": held})

    def show_cluster(self, cores: Callable[[], int]) -> None:
        """Shows the cores of the Ray cluster."""
        self._ray_cores.set_function(cores)

    def began(self, call: RequestContext) -> None:
        """Counts a call that begins."""
        self._series_of(call.method).started.inc()
        self._in_flight.inc()

    def ended(self, call: RequestContext) -> None:
        """Counts a call that has ended, with its times."""
        self._in_flight.dec()
        self._series_of(call.method).handling.observe(call.seconds)
        self._handled.labels(*_labels(call.method), call.code).inc()
        if call.reason:
            self._rejected.labels(call.reason).inc()
        for name, stage in call.stages.items():
            self._stages[name].observe(stage.seconds)
        if call.queued is not None:
            self._queue.observe(call.queued)
        if call.time_to_report is not None:
            self._time_to_report.observe(call.time_to_report)

    def messages(self, method: Method) -> tuple[Counter, Counter]:
        """The counters of a method's messages, received and sent."""
        series = self._series_of(method)
        return series.received, series.sent

    def _series_of(self, method: Method) -> _Series:
        """The series of a method, cached, since their labels take longer than counting."""
        if method not in self._series:
            labels = _labels(method)
            self._series[method] = _Series(
                self._started.labels(*labels),
                self._handling.labels(*labels),
                self._messages_received.labels(*labels),
                self._messages_sent.labels(*labels),
            )
        return self._series[method]

    def reloaded(self, file: str, is_good: bool) -> None:
        """Counts a file that has changed, with whether it could be used."""
        self._reloads.labels(file, "ok" if is_good else "failed").inc()

    def evicted(self, reason: str, count: int) -> None:
        """Counts an evicted checkpoint, and the bytes that this freed."""
        self._evictions.labels(reason).inc()
        self._evicted.inc(count)

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


def go_code_name(code: str) -> str:
    """The name of a status code in Go: `InvalidArgument` for INVALID_ARGUMENT."""
    return {"OK": "OK", "CANCELLED": "Canceled"}.get(code, code.title().replace("_", ""))


def _labels(method: Method) -> tuple[str, str, str]:
    # A Prune of one message is served as a unary call, but counted as a stream.
    method = _METHODS.get((method.service, method.name), method)
    return method.kind, method.service, method.name


def _reasons() -> set[str]:
    """All reasons of errors."""
    kinds = list(RequestError.__subclasses__())
    for kind in kinds:
        kinds += kind.__subclasses__()
    return {kind.reason for kind in kinds}
