"""Builds a server from its parts, starts it and stops it."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Self

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from secateur_server.api.checkpoints import Checkpoints
from secateur_server.api.handlers import add_checkpoints, add_pruner
from secateur_server.api.pruner import Pruner
from secateur_server.backends import backend_for
from secateur_server.backends.cores import one_thread, start_threads
from secateur_server.backends.threads import Pool
from secateur_server.cut.drivers import Cluster, Local
from secateur_server.operate.health import Health
from secateur_server.operate.interceptor import Interceptor
from secateur_server.operate.metrics import Metrics
from secateur_server.operate.serving import Serving
from secateur_server.operate.traces import Traces
from secateur_server.options import Config
from secateur_server.runtime.context import RequestContext
from secateur_server.runtime.scheduler import Scheduler
from secateur_server.startup import (
    OPTIONS,
    CannotStart,
    join_cluster,
    listen,
    make_authenticator,
    make_traces,
    open_store,
    serve_metrics,
)
from secateur_server.state_dict.sources import Sources
from secateur_server.storage.protocol import CheckpointStore
from secateur_server.uris.requests import Requests
from secateur_server.uris.scratch import Scratch
from secateur_server.uris.uris import Uris
from secateur_server.warm_up import warm_up

log = logging.getLogger(__name__)

# Calls that gRPC accepts beside those that have a thread. Each waits until one of the extra threads
# rejects it with a delay for its retry. gRPC rejects further calls itself, without a delay.
MAX_TO_REJECT = 1024
# Seconds for a call that is cut off to end with a status of its own.
CUT_OFF_SECONDS = 2.0
_NO_THREADS = (
    "the system refuses to start more threads: raise its limit (TasksMax= of systemd, pids.max of "
    "the control group, ulimit -u), or lower --queue-size"
)


class App:
    """A server that runs until `stop`.

    Args:
        config: The options.
        is_warm: Whether the server warms up before it accepts calls. An embedded server does not:
            its first call does that work, and only as far as it needs it.
        died: Called if the server fails so that it cannot answer calls any more.

    Attributes:
        address: Of gRPC, with the actual port.
        metrics_address: Of the metrics, with the actual port; None: they are not served.

    Raises:
        CannotStart: A part of the server cannot start.
    """

    metrics_address: str | None = None

    def __init__(
        self, config: Config, is_warm: bool = True, died: Callable[[], None] = lambda: None
    ) -> None:
        self._config, self._is_warm, self._died = config, is_warm, died
        with ExitStack() as opened:
            try:
                self._start(opened)
            except RuntimeError as error:
                if "can't start new thread" not in str(error):
                    raise
                raise CannotStart(_NO_THREADS) from None
            self._opened = opened.pop_all()

    def _start(self, opened: ExitStack) -> None:
        """Starts all parts. `opened` closes them in reverse order, after the server has stopped."""
        config = self._config
        backend_for(config.device)  # compiles the kernels of a GPU now, not in the first call
        start_threads()
        self._metrics = metrics = Metrics(config.device)
        store = open_store(config, metrics)
        opened.callback(store.close)
        scheduler = Scheduler(config.memory_limit, config.queue_size)
        metrics.show_scheduler(scheduler)
        if config.metrics_address is not None:
            self.metrics_address = serve_metrics(config, metrics, opened)
        cluster = join_cluster(config, metrics)
        if cluster:
            opened.callback(cluster.close)
        traces = make_traces(config)
        if traces:
            opened.callback(traces.close)
        self._interceptor = ours = _interceptor(config, metrics, traces, store, scheduler, opened)
        interceptors: list[grpc.ServerInterceptor] = [ours]
        if traces:
            interceptors.insert(0, traces.interceptor)
        servers = _grpc_servers(config, interceptors, scheduler, opened)
        self._server, self._draining = servers
        self._health = _add_services(config, metrics, store, scheduler, servers, cluster, opened)
        self.address = listen(self._server, config, metrics)
        if self._is_warm:
            warm_up(config.device, store, config.allow_uri)
        self._serving = Serving(self._server, self._died)
        self._health.serve()

    def stop(self) -> None:
        """Refuses new requests, and waits for the running ones to end.

        Requests that still run after the drain timeout end with ShuttingDown. gRPC cancels those
        that do not end within CUT_OFF_SECONDS.
        """
        timeout = self._config.drain_timeout
        self._health.drain()
        self._interceptor.drain()
        self._serving.begin_stop()
        if self._serving.is_alive and not self._serving.has_stopped(0.01):
            with self._new_calls_answered():
                if not self._serving.has_stopped(timeout):
                    self._interceptor.cut_off(timeout)
                    self._serving.has_stopped(CUT_OFF_SECONDS)
        self._serving.end()
        self._opened.close()

    @contextmanager
    def _new_calls_answered(self) -> Iterator[None]:
        """Answers new connections with a second server, since the first one no longer listens.

        The second server answers probes, and its interceptor refuses other calls with a reason and
        a line in the log. gRPC itself would refuse them without either.
        """
        try:
            listen(self._draining, replace(self._config, address=self.address), self._metrics)
            serving = Serving(self._draining, self._died)
        except (CannotStart, RuntimeError) as error:
            log.warning("calls on new connections are not answered while draining: %s", error)
            yield
            return
        yield
        serving.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.stop()


def _interceptor(
    config: Config,
    metrics: Metrics,
    traces: Traces | None,
    store: CheckpointStore,
    scheduler: Scheduler,
    opened: ExitStack,
) -> Interceptor:
    make_context = partial(
        RequestContext,
        work_memory=config.work_memory,
        scratch=store.scratch,
        charge=scheduler.charge,
        driver=Local.on,
    )
    interceptor = Interceptor(
        make_authenticator(config, metrics),
        metrics,
        traces,
        scheduler,
        make_context,
        config.idle_timeout,
        config.min_throughput,
    )
    opened.callback(interceptor.close)
    return interceptor


def _grpc_servers(
    config: Config,
    interceptors: list[grpc.ServerInterceptor],
    scheduler: Scheduler,
    opened: ExitStack,
) -> tuple[grpc.Server, grpc.Server]:
    """The server, and another one for new connections while it drains. They share threads."""
    workers = Pool(scheduler.threads, "rpc", one_thread)
    opened.callback(workers.shutdown, wait=False)
    make = partial(
        grpc.server,
        workers,  # type: ignore[arg-type]  # gRPC takes any Executor
        options=(*OPTIONS, *_ages(config)),
        maximum_concurrent_rpcs=scheduler.threads + MAX_TO_REJECT,
        interceptors=interceptors,
    )
    return make(), make()


def _ages(config: Config) -> Iterator[tuple[str, int]]:
    """GRPC's options for the age of a connection, in milliseconds."""
    for name in ("max_connection_age", "max_connection_age_grace"):
        if seconds := getattr(config, name):
            yield f"grpc.{name}_ms", min(int(seconds * 1000) or 1, 2**31 - 1)


def _add_services(
    config: Config,
    metrics: Metrics,
    store: CheckpointStore,
    scheduler: Scheduler,
    servers: tuple[grpc.Server, grpc.Server],
    cluster: Cluster | None,
    opened: ExitStack,
) -> Health:
    scratch = Scratch(store.scratch, store.disk_limit, metrics.fetched)
    metrics.show_fetched(lambda: scratch.held)
    uris = Uris(config.allow_path, config.allow_uri, scratch, Requests(config.idle_timeout))
    limits = config.max_model_bytes, config.work_memory
    sources = Sources(store, uris, config.device, *limits, scheduler, metrics)
    pruner = Pruner(sources, scheduler.max_calls, cluster)
    opened.callback(pruner.close)
    checkpoints = Checkpoints(sources)
    for server in servers:
        services = add_pruner(pruner, server), add_checkpoints(checkpoints, server)
        names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
    probes = Health(services)
    for server in servers:
        health_pb2_grpc.add_HealthServicer_to_server(probes, server)
    return probes
