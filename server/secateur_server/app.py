"""Wiring."""

import logging
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self
from wsgiref.simple_server import WSGIServer

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

from secateur_server.checkpoints import Checkpoints, add_checkpoints
from secateur_server.config import Config
from secateur_server.devices.cpu import one_thread
from secateur_server.operate.around import AroundCalls, CheckMessages
from secateur_server.operate.metrics import Metrics
from secateur_server.operate.statuses import statuses
from secateur_server.service import Pruner, add_pruner
from secateur_server.sources import Sources
from secateur_server.store.store import Store, StoreInUse, default_max_bytes, temporary_folder
from secateur_server.uris.uris import Uris

log = logging.getLogger(__name__)

# Calls at work at once. Each is a thread; torch's operators and gRPC's waits release the GIL.
WORKERS = 32

_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a second server on the same port is a mistake, and an error
    # A chunk is 1 MiB; the header of a first message has names and a spec.
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.max_send_message_length", -1),
    # What a call may send before it is read. grpc would let the window grow with the throughput:
    # tens of MB for each call, and no faster.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 4 << 20),
)


class CannotListen(Exception):
    """An address cannot be listened at."""


class App:
    """A server that runs until `stop`. Raises CannotListen."""

    def __init__(self, config: Config) -> None:
        metrics = Metrics(config.device)
        self._store = _open_store(config, metrics)
        try:
            self._start(config, metrics)
        except CannotListen:
            self._store.close()
            raise

    def _start(self, config: Config, metrics: Metrics) -> None:
        self._drain_timeout = config.drain_timeout
        self._health = health.HealthServicer()
        self._grpc = grpc.server(
            ThreadPoolExecutor(WORKERS, thread_name_prefix="rpc", initializer=one_thread),
            # Outermost first: metrics see the status that an error became.
            interceptors=[AroundCalls(metrics.calls), AroundCalls(statuses), CheckMessages()],
            options=_OPTIONS,
        )
        uris = Uris(config.allow_path, config.allow_uri, self._store.scratch)
        limits = config.max_model_bytes, config.work_memory
        sources = Sources(self._store, uris, config.device, *limits, metrics)
        services = (
            add_pruner(Pruner(sources), self._grpc),
            add_checkpoints(Checkpoints(sources), self._grpc),
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._grpc)
        self.address = _listen(self._grpc, config.address)
        self.metrics_address = None
        if config.metrics_address is not None:
            self._metrics_server, self.metrics_address = _serve_metrics(
                config.metrics_address, metrics
            )
        self._grpc.start()
        for name in ("", *services):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    def stop(self) -> None:
        """Takes no more requests, and returns when those that run have ended.

        What still runs after the drain timeout is cancelled.
        """
        self._health.enter_graceful_shutdown()
        self._grpc.stop(self._drain_timeout).wait()
        if self.metrics_address is not None:
            self._metrics_server.shutdown()
            self._metrics_server.server_close()
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.stop()


def _open_store(config: Config, metrics: Metrics) -> Store:
    """Errors: CannotListen."""
    folder = config.store_dir or temporary_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        most = config.store_max_bytes or default_max_bytes(folder)
        store = Store(folder, most, config.store_ttl, metrics.evicted, config.store_dir is None)
    except (OSError, StoreInUse) as error:
        raise CannotListen(f"cannot keep checkpoints in {folder}: {error}") from None
    metrics.of_store(lambda: store.used_bytes, lambda: store.count, most)
    return store


def _listen(server: grpc.Server, address: str) -> str:
    """Listens at `address`. Returns it with the port that was taken."""
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise CannotListen(f"cannot listen at {address}: {error}") from None
    if address.startswith("unix:"):
        return address
    return f"{address.rpartition(':')[0]}:{port}"


def _serve_metrics(address: str, metrics: Metrics) -> tuple[WSGIServer, str]:
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        raise CannotListen(f"cannot serve metrics at {address!r}: it is no HOST:PORT")
    try:
        server, _ = start_http_server(int(port), host.strip("[]"), registry=metrics.registry)
    except OSError as error:
        raise CannotListen(f"cannot serve metrics at {address}: {error.strerror}") from None
    return server, f"{host}:{server.server_port}"
