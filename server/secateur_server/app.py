"""Wiring."""

import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Self

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from secateur_proto.framing import CHUNK_BYTES
from secateur_server.api.checkpoints import Checkpoints
from secateur_server.api.handlers import add_checkpoints, add_pruner
from secateur_server.api.pruner import Pruner
from secateur_server.backends import passes_of
from secateur_server.backends.cpu import one_thread, start_threads
from secateur_server.backends.threads import Pool
from secateur_server.config import Config
from secateur_server.operate.callers import BadTokens, Callers
from secateur_server.operate.interceptor import Interceptor
from secateur_server.operate.metrics import Metrics
from secateur_server.operate.probes import Health
from secateur_server.operate.scrape import Scrapes
from secateur_server.operate.serving import Serving
from secateur_server.operate.tls import BadCertificate, TlsFiles, server_credentials
from secateur_server.operate.traces import NoTraces, Traces
from secateur_server.runtime.context import RequestContext
from secateur_server.runtime.scheduler import MOST_MESSAGE_BYTES, Scheduler
from secateur_server.state_dict.sources import Sources
from secateur_server.storage.folders import StoreInUse, default_max_bytes, temporary_folder
from secateur_server.storage.store import Store
from secateur_server.uris.requests import Requests
from secateur_server.uris.scratch import Scratch
from secateur_server.uris.uris import Uris
from secateur_server.warm_up import warm_up

log = logging.getLogger(__name__)

OPTIONS = (
    ("grpc.so_reuseport", 0),  # a second server on the same port is a mistake, and an error
    # A chunk is 1 MiB; the header of a first message has names and a spec.
    ("grpc.max_receive_message_length", MOST_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),
    # What a call may send before it is read: a little less than a message. So each is read while
    # it is in a cache, and nothing waits in memory that no limit counts. grpc would let the window
    # grow with the throughput, to tens of MB for each call.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", CHUNK_BYTES),
    # A peer that is gone without a word, as behind a firewall that forgot it, is noticed after
    # these two, in milliseconds; its calls end then.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),  # the longer of the two counts; by default 60 s
    # Callers may ask the same of the server, with and without calls, each 10 s.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Of one connection: its client keeps further calls back. The limit for all connections is the
    # scheduler's, which says when to try again. So gRPC must not reset streams by itself, as it
    # does where calls that have ended still hold their streams.
    ("grpc.max_concurrent_streams", 128),
    ("grpc.http.overload_protection", 0),
)

# Calls that gRPC accepts beside those that have a thread. Each waits for the moment in which one of
# the extra threads rejects it; beyond them gRPC rejects calls, and cannot say when to try again.
MOST_TO_REJECT = 1024
# In which a call that is cut off sees it, and ends with a status of its own.
CUT_OFF_SECONDS = 2.0
_NO_THREADS = (
    "the system refuses to start more threads: raise its limit (TasksMax= of systemd, pids.max of "
    "the control group, ulimit -u), or lower --queue-size"
)


class CannotStart(Exception):
    """The server cannot do what it is to do: listen at an address, open its store, and so on."""


class App:
    """A server that runs until `stop`. Raises CannotStart.

    Args:
        config: What the operator set.
        is_warm: Whether the server warms up before it takes calls. An embedded server does not: its
            one caller waits for the same work in its first call, and only for what it uses.
        died: Is called if the server can answer no calls any more, though nobody stopped it.
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
        """opened: is closed when the server has stopped, in the reverse order."""
        config = self._config
        passes_of(config.device)  # those of a GPU are compiled now, and not in the first call
        start_threads()
        self._metrics = metrics = Metrics(config.device)
        store = open_store(config, metrics)
        opened.callback(store.close)
        scheduler = Scheduler(config.memory_limit, config.queue_size)
        metrics.of_scheduler(scheduler)
        if config.metrics_address is not None:
            self.metrics_address = listen_for_scrapes(config, metrics, opened)
        traces = traces_of(config)
        if traces:
            opened.callback(traces.close)
        self._interceptor = ours = _interceptor(config, metrics, traces, store, scheduler, opened)
        interceptors: list[grpc.ServerInterceptor] = [ours]
        if traces:
            interceptors.insert(0, traces.interceptor)
        servers = _grpc_servers(config, interceptors, scheduler, opened)
        self._server, self._draining = servers
        self._health = _add_services(config, metrics, store, scheduler, servers, opened)
        self.address = listen(self._server, config, metrics)
        if self._is_warm:
            warm_up(config.device, store, config.allow_uri)
        self._serving = Serving(self._server, self._died)
        self._health.serve()

    def stop(self) -> None:
        """Takes no more requests, and returns when those that run have ended.

        Requests that still run after the drain timeout end with ShuttingDown. gRPC cancels those
        that do not see it within CUT_OFF_SECONDS.
        """
        timeout = self._config.drain_timeout
        self._health.drain()
        self._interceptor.drain()
        self._serving.begin_stop(timeout + CUT_OFF_SECONDS)
        if self._serving.is_alive and not self._serving.has_stopped(0.01):
            with self._new_calls_answered():
                if not self._serving.has_stopped(timeout):
                    self._interceptor.cut_off(timeout)
                    self._serving.has_stopped(CUT_OFF_SECONDS)
        self._serving.end()
        self._opened.close()

    @contextmanager
    def _new_calls_answered(self) -> Iterator[None]:
        """In the block a second server answers new connections: gRPC's first one listens no more.

        It serves probes, and its interceptor refuses other calls, with a reason and a line in the
        log. gRPC itself would refuse them without either.
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
    store: Store,
    scheduler: Scheduler,
    opened: ExitStack,
) -> Interceptor:
    make_context = partial(
        RequestContext,
        work_memory=config.work_memory,
        scratch=store.scratch,
        charge=scheduler.charge,
    )
    interceptor = Interceptor(
        callers_of(config, metrics),
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
    """The server, and one for new connections while it drains, with the same threads."""
    workers = Pool(scheduler.threads, "rpc", one_thread)
    opened.callback(workers.shutdown, wait=False)
    make = partial(
        grpc.server,
        workers,  # type: ignore[arg-type]  # gRPC takes any Executor
        options=(*OPTIONS, *_ages(config)),
        maximum_concurrent_rpcs=scheduler.threads + MOST_TO_REJECT,
        interceptors=interceptors,
    )
    return make(), make()


def _ages(config: Config) -> Iterator[tuple[str, int]]:
    """Options of gRPC for how long a connection lasts, in milliseconds."""
    for name in ("max_connection_age", "max_connection_age_grace"):
        if seconds := getattr(config, name):
            yield f"grpc.{name}_ms", min(int(seconds * 1000) or 1, 2**31 - 1)


def _add_services(
    config: Config,
    metrics: Metrics,
    store: Store,
    scheduler: Scheduler,
    servers: tuple[grpc.Server, grpc.Server],
    opened: ExitStack,
) -> Health:
    scratch = Scratch(store.scratch, store.max_bytes, metrics.fetched)
    metrics.of_fetched(lambda: scratch.held)
    uris = Uris(config.allow_path, config.allow_uri, scratch, Requests(config.idle_timeout))
    limits = config.max_model_bytes, config.work_memory
    sources = Sources(store, uris, config.device, *limits, scheduler, metrics)
    pruner = Pruner(sources, scheduler.most_calls)
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


def open_store(config: Config, metrics: Metrics) -> Store:
    """The store of checkpoints.  Errors: CannotStart."""
    folder = config.store_dir or temporary_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        most = config.store_max_bytes or default_max_bytes(folder)
        store = Store(folder, most, config.store_ttl, metrics.evicted, config.store_dir is None)
    except (OSError, StoreInUse) as error:
        raise CannotStart(f"cannot keep checkpoints in {folder}: {error}") from None
    metrics.of_store(lambda: store.used_bytes, lambda: store.count, most)
    return store


def callers_of(config: Config, metrics: Metrics) -> Callers:
    """Who may call.  Errors: CannotStart."""
    try:
        return Callers(config.tokens_file, partial(metrics.reloaded, "tokens"))
    except BadTokens as error:
        raise CannotStart(f"cannot read the tokens: {error}") from None


def traces_of(config: Config) -> Traces | None:
    """Where traces go; None where nobody asked for any.  Errors: CannotStart."""
    try:
        return Traces(config.otlp_endpoint) if config.otlp_endpoint else None
    except NoTraces as error:
        raise CannotStart(str(error)) from None


def credentials_of(config: Config, metrics: Metrics) -> grpc.ServerCredentials | None:
    """What TLS is served with; None where it is not.  Errors: CannotStart."""
    if config.tls_cert is None or config.tls_key is None:
        return None
    files = TlsFiles(config.tls_cert, config.tls_key, config.tls_client_ca)
    try:
        return server_credentials(files, partial(metrics.reloaded, "tls"))
    except BadCertificate as error:
        raise CannotStart(f"cannot serve TLS: {error}") from None


def listen(server: grpc.Server, config: Config, metrics: Metrics) -> str:
    """Listens at the address. Returns it with the port that was taken.  Errors: CannotStart."""
    address, credentials = config.address, credentials_of(config, metrics)
    try:
        if credentials:
            port = server.add_secure_port(address, credentials)
        else:
            port = server.add_insecure_port(address)
    except RuntimeError as error:
        is_tcp = not address.startswith("unix:")
        reason = (_reason(address) if is_tcp else None) or str(error).partition("; set GRPC_")[0]
        raise CannotStart(f"cannot listen at {address}: {reason}") from None
    if address.startswith("unix:"):
        return address
    return f"{address.rpartition(':')[0]}:{port}"


def _reason(address: str) -> str | None:
    """Why the system refuses an address of TCP, which gRPC tells its own log alone."""
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, place in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(place)
    except OSError as error:
        return error.strerror
    return None


def host_and_port(address: str) -> tuple[str, int]:
    """Where metrics are served.  Errors: CannotStart."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        raise CannotStart(f"cannot serve metrics at {address!r}: it is no HOST:PORT")
    return host, int(port)


def listen_for_scrapes(config: Config, metrics: Metrics, opened: ExitStack) -> str:
    """Serves metrics. Returns the address with the port that was taken.  Errors: CannotStart."""
    address = config.metrics_address or ""
    host, port = host_and_port(address)
    token = config.metrics_token_file
    try:
        scrapes = Scrapes(host.strip("[]"), port, metrics.registry, token)
    except OSError as error:
        raise CannotStart(f"cannot serve metrics at {address}: {error.strerror}") from None
    opened.callback(scrapes.close)
    return f"{host}:{scrapes.port}"
