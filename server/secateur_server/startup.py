"""The parts of a server that may fail to start. `secateur-server --check` tries each of them."""

import math
import socket
from contextlib import ExitStack
from functools import partial

import grpc

from secateur_proto.framing import CHUNK_BYTES
from secateur_server.cut.drivers.link import NoCluster
from secateur_server.cut.drivers.ray import Ray
from secateur_server.errors import RequestError
from secateur_server.operate.authentication import Authenticator
from secateur_server.operate.metrics import Metrics
from secateur_server.operate.metrics_server import MetricsServer
from secateur_server.operate.tls import BadCertificate, TlsFiles, server_credentials
from secateur_server.operate.tokens_file import BadTokens
from secateur_server.operate.traces import NoTraces, Traces
from secateur_server.options import Config
from secateur_server.runtime.scheduler import MAX_MESSAGE_BYTES
from secateur_server.storage.folders import StoreInUse, default_max_bytes, temporary_folder
from secateur_server.storage.protocol import CheckpointStore
from secateur_server.storage.shared.objects import Objects
from secateur_server.storage.shared.store import SharedStore
from secateur_server.storage.store import Store
from secateur_server.uris.systems import missing

OPTIONS = (
    ("grpc.so_reuseport", 0),  # a second server on the same port is an error
    # A chunk is 1 MiB; a first message also has a header with names and a spec.
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),
    # Bytes that a call may send before the server reads them: slightly less than a message. So each
    # message is read while it is in a CPU cache, and unread data does not fill uncounted memory. By
    # default gRPC lets this window grow with the throughput, to tens of MB a call.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", CHUNK_BYTES),
    # Milliseconds after which a lost peer is detected, as behind a firewall that forgot the
    # connection. Its calls end then.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),  # the longer timeout counts; its default is 60 s
    # Callers may ping the server in the same way, with and without calls, every 10 s.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # For one connection, whose client queues further calls. The scheduler limits all connections
    # together, and tells clients when to retry. So gRPC must not reset streams by itself, as it
    # does if ended calls still occupy their streams.
    ("grpc.max_concurrent_streams", 128),
    ("grpc.http.overload_protection", 0),
)


class CannotStart(Exception):
    """The server cannot start: an address is in use, the store cannot be opened, and so on."""


def open_store(config: Config, metrics: Metrics) -> CheckpointStore:
    """Opens the store of checkpoints.

    Args:
        config: The options.
        metrics: They show the store.

    Raises:
        CannotStart: Its folder, or the object store, cannot be used.
    """
    store: CheckpointStore
    store = local = _local_store(config, metrics)
    if config.store_uri is not None:
        try:
            store = _shared_store(config.store_uri, config, metrics, local)
        except (ImportError, ValueError, RequestError) as error:
            local.close()
            raise CannotStart(
                f"cannot store checkpoints in {config.store_uri} (--store-uri): {error}"
            ) from None
    metrics.show_store(lambda: store.used_bytes, lambda: store.count, store.max_bytes)
    return store


def _local_store(config: Config, metrics: Metrics) -> Store:
    folder = config.store_dir or temporary_folder()
    is_cache = config.store_uri is not None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        default = default_max_bytes(folder)
        if is_cache:
            return Store(folder, default, 0, is_temporary=config.store_dir is None)
        most, is_temporary = config.store_max_bytes or default, config.store_dir is None
        return Store(folder, most, config.store_ttl, metrics.evicted, is_temporary)
    except (OSError, StoreInUse) as error:
        raise CannotStart(f"cannot store checkpoints in {folder}: {error}") from None


def _shared_store(uri: str, config: Config, metrics: Metrics, local: Store) -> SharedStore:
    if problem := missing(uri):
        raise ValueError(problem)
    objects = Objects(uri, config.idle_timeout)
    most = config.store_max_bytes or math.inf
    return SharedStore(objects, local, most, config.store_ttl, metrics.evicted)


def make_authenticator(config: Config, metrics: Metrics) -> Authenticator:
    """Reads the tokens.

    Args:
        config: The options.
        metrics: They count reloads.

    Raises:
        CannotStart: The tokens file is wrong.
    """
    try:
        return Authenticator(config.tokens_file, partial(metrics.reloaded, "tokens"))
    except BadTokens as error:
        raise CannotStart(f"cannot read the tokens: {error}") from None


def make_traces(config: Config) -> Traces | None:
    """Prepares the sending of traces; None: the operator has not asked for it.

    Args:
        config: The options.

    Raises:
        CannotStart: A package is missing.
    """
    try:
        return Traces(config.otlp_endpoint) if config.otlp_endpoint else None
    except NoTraces as error:
        raise CannotStart(str(error)) from None


def join_cluster(config: Config, metrics: Metrics) -> Ray | None:
    """Connects to the Ray cluster; None: the operator has not asked for it.

    Args:
        config: The options.
        metrics: They show the cluster, and count tasks.

    Raises:
        CannotStart: Ray is missing, or no cluster answers.
    """
    if config.ray_address is None:
        return None
    try:
        cluster = Ray.at(config.ray_address, config.work_memory, metrics.of_ray)
    except NoCluster as error:
        raise CannotStart(f"cannot use the Ray cluster (--ray-address): {error}") from None
    metrics.show_cluster(lambda: cluster.cores)
    return cluster


def make_credentials(config: Config, metrics: Metrics) -> grpc.ServerCredentials | None:
    """Loads the files of TLS; None: the server does not use TLS.

    Args:
        config: The options.
        metrics: They count reloads.

    Raises:
        CannotStart: A file is wrong.
    """
    if config.tls_cert is None or config.tls_key is None:
        return None
    files = TlsFiles(config.tls_cert, config.tls_key, config.tls_client_ca)
    try:
        return server_credentials(files, partial(metrics.reloaded, "tls"))
    except BadCertificate as error:
        raise CannotStart(f"cannot serve TLS: {error}") from None


def listen(server: grpc.Server, config: Config, metrics: Metrics) -> str:
    """Listens at the address for gRPC.

    Args:
        server: The server that listens.
        config: The options.
        metrics: They count reloads.

    Returns:
        The address with the actual port.

    Raises:
        CannotStart: The address cannot be used, or a file of TLS is wrong.
    """
    address, credentials = config.address, make_credentials(config, metrics)
    is_unix = address.startswith(("unix:", "unix-abstract:"))
    if not is_unix and not _host_and_port(address):  # gRPC would choose another port
        raise CannotStart(f"cannot listen at {address!r}: it is not HOST:PORT, as 127.0.0.1:50051")
    try:
        if credentials:
            port = server.add_secure_port(address, credentials)
        else:
            port = server.add_insecure_port(address)
    except RuntimeError as error:
        system = None if address.startswith("unix:") else _bind_error(address)
        reason = system or str(error).partition("; set GRPC_")[0]
        raise CannotStart(f"cannot listen at {address}: {reason}") from None
    if address.startswith("unix:"):
        return address
    return f"{address.rpartition(':')[0]}:{port}"


def _bind_error(address: str) -> str | None:
    """The system's reason to refuse a TCP address, which gRPC writes to its own log only."""
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


def _host_and_port(address: str) -> tuple[str, int] | None:
    """Splits HOST:PORT. None: it is something else, or the port is above 65535."""
    host, colon, port = address.rpartition(":")
    is_port = port.isascii() and port.isdecimal() and int(port) < 1 << 16
    return (host, int(port)) if colon and is_port else None


def serve_metrics(config: Config, metrics: Metrics, opened: ExitStack) -> str:
    """Serves metrics.

    Args:
        config: The options.
        metrics: The metrics to serve.
        opened: Closes the server of metrics.

    Returns:
        The address with the actual port.

    Raises:
        CannotStart: The address cannot be used.
    """
    address = config.metrics_address or ""
    if not (place := _host_and_port(address)):
        raise CannotStart(
            f"cannot serve metrics at {address!r}: it is not HOST:PORT, as 127.0.0.1:9464"
        )
    host, port = place
    token = config.metrics_token_file
    try:
        scrapes = MetricsServer(host.strip("[]"), port, metrics.registry, token)
    except OSError as error:
        raise CannotStart(f"cannot serve metrics at {address}: {error.strerror}") from None
    opened.callback(scrapes.close)
    return f"{host}:{scrapes.port}"
