"""secateur-server --check: prints what a server with these options would do."""

import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import torch

from secateur_server.backends import backend_for
from secateur_server.backends.cgroups import cpu_limits
from secateur_server.backends.cores import CORES
from secateur_server.backends.memory import least_limit, machine_memory, memory_of, total_memory
from secateur_server.backends.torch_backend import TorchBackend
from secateur_server.config import is_public
from secateur_server.operate.metrics import Metrics
from secateur_server.options import Config, unknown_variables
from secateur_server.startup import (
    OPTIONS,
    CannotStart,
    listen,
    make_authenticator,
    make_credentials,
    make_traces,
    serve_metrics,
)
from secateur_server.storage.folders import FolderLock, StoreInUse
from secateur_server.uris.systems import missing


def check(config: Config) -> int:
    """Prints what a server with these options would do, and each problem on stderr.

    It does not disturb a running server.

    Args:
        config: The options.

    Returns:
        The exit status: 1 if there is a problem, else 0.
    """
    problems = unknown_variables()
    for part in (_grpc, _scrapes, _device, _limits, _store, _uris, _traces, _machine):
        try:
            for line in part(config):
                print(line)
        except CannotStart as error:
            problems.append(str(error))
    for problem in problems:
        print(f"secateur-server: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _grpc(config: Config) -> Iterator[str]:
    metrics = Metrics(config.device)
    yield f"serves gRPC at {config.address}, {_protected(config, metrics)}"
    if config.address.startswith("unix:"):
        return  # listening here would replace the socket of a running server
    with ThreadPoolExecutor(1) as nobody:
        server = grpc.server(nobody, options=OPTIONS)
        listen(server, config, metrics)
        server.stop(None).wait()


def _scrapes(config: Config) -> Iterator[str]:
    if config.metrics_address is None:
        yield "serves no metrics"
        return
    token = ", to scrapers with its token" if config.metrics_token_file else ""
    yield f"serves metrics at http://{config.metrics_address}/metrics{token}"
    with ExitStack() as opened:
        serve_metrics(config, Metrics(config.device), opened)


def _protected(config: Config, metrics: Metrics) -> str:
    parts = ["without TLS"]
    if make_credentials(config, metrics):
        parts = ["with TLS, to callers with a certificate" if config.tls_client_ca else "with TLS"]
    callers = make_authenticator(config, metrics)
    names = sorted({tenant.name for tenant in callers.tenants})
    parts.append(f"to the tenants {', '.join(names)}" if names else "without tokens")
    if is_public(config.address) and config.insecure:
        parts.append("for other machines too (--insecure)")
    return ", ".join(parts)


def _device(config: Config) -> Iterator[str]:
    device = config.device
    try:
        backend = backend_for(device)
        backend.allocate(1 << 20)
        _, free = memory_of(device)
    except RuntimeError as error:
        raise CannotStart(f"{device} does not work: {error}") from None
    is_compiled = type(backend) is not TorchBackend
    if device.type == "cuda":
        how = "compiled by Triton" if is_compiled else "without Triton, which would be faster"
        name = torch.cuda.get_device_name(device)
        yield f"prunes on {device}, {name}, {how}, {_size(free)} free"
        return
    how = "compiled by numba" if is_compiled else "not compiled (NUMBA_DISABLE_JIT)"
    yield f"prunes on cpu, threads: {CORES}, {how}, {_size(free)} free"


def _limits(config: Config) -> Iterator[str]:
    largest = min(config.max_model_bytes, config.memory_limit)
    yield (
        f"accepts models of up to {_size(largest)}, at once up to "
        f"{_size(config.memory_limit)}; {config.queue_size} requests may wait"
    )
    # Models are in the memory of the device, or of the host.
    most = max(total_memory(config.device), total_memory(torch.device("cpu")))
    for option in ("memory_limit", "max_model_bytes"):
        if (size := getattr(config, option)) > most:
            name = option.replace("_", "-")
            raise CannotStart(f"--{name} is {_size(size)}: this machine has {_size(most)}")


def _store(config: Config) -> Iterator[str]:
    if config.store_uri is not None:
        if problem := missing(config.store_uri):
            raise CannotStart(f"cannot store checkpoints in {config.store_uri}: {problem}")
        yield f"stores checkpoints in {config.store_uri}, which several servers may share"
    what = "stores" if config.store_uri is None else "caches"
    if config.store_dir is None:
        yield f"{what} checkpoints in a temporary folder, which is removed with the server"
        return
    most = config.store_max_bytes if config.store_uri is None else None
    shown = _size(most) if most else "3/4 of the free space"
    yield f"{what} checkpoints in {config.store_dir}, up to {shown}"
    nearest = next(path for path in (config.store_dir, *config.store_dir.parents) if path.exists())
    cannot = f"cannot store checkpoints in {config.store_dir}"
    if not nearest.is_dir() or not os.access(nearest, os.R_OK | os.W_OK | os.X_OK):
        raise CannotStart(f"{cannot}: {nearest} is not a folder that it may write to")
    if most and most > (size := shutil.disk_usage(nearest).total):
        raise CannotStart(f"{cannot}: --store-max-bytes is {shown}, the disk has {_size(size)}")
    if config.store_dir.exists():
        try:
            FolderLock(config.store_dir).close()
        except StoreInUse:
            raise CannotStart(f"{cannot}: another server uses it") from None


def _uris(config: Config) -> Iterator[str]:
    paths: tuple[Path | str, ...] = config.allow_path
    prefixes = ", ".join(map(str, (*paths, *config.allow_uri)))
    yield f"opens URIs under {prefixes}" if prefixes else "opens no URIs"
    for prefix in config.allow_uri:
        if problem := missing(prefix):
            raise CannotStart(f"URIs under {prefix} cannot be opened: {problem}")


def _traces(config: Config) -> Iterator[str]:
    if traces := make_traces(config):
        traces.close()
        yield f"sends traces to {config.otlp_endpoint}"


def _machine(config: Config) -> Iterator[str]:
    """The memory and CPUs that the process may use, with the group that limits them."""
    memory = least_limit()
    whole = machine_memory()
    shown = f"may use {_size(whole)} of memory, all of the machine's"
    if memory.value < whole:
        shown = f"may use {_size(memory.value)} of memory, the limit of {memory.group}"
    quota = min(cpu_limits(), key=lambda limit: limit.value, default=None)
    cpus = len(os.sched_getaffinity(0))
    parts = [f"{cpus} of {os.cpu_count()} CPUs"]
    if quota:
        parts.append(f"{quota.value:g} at a time, the quota of {quota.group}")
    yield f"{shown}; {', '.join(parts)}"


def _size(count: float) -> str:
    return f"{count / (1 << 30):.1f} GiB" if count >= 1 << 30 else f"{count / (1 << 20):.1f} MiB"
