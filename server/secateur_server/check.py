"""secateur-server --check: what the server would do, without doing it."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from secateur_server.app import CannotStart, callers_of, credentials_of, host_and_port, traces_of
from secateur_server.config import Config, is_public
from secateur_server.devices import kernels, passes_of
from secateur_server.devices.cuda import Cuda
from secateur_server.devices.memory import memory_of
from secateur_server.operate.metrics import Metrics


def check(config: Config) -> int:
    """Prints what a server of this configuration would do.  Returns the exit status.

    It takes no port and no store: a server that runs meanwhile is not disturbed.
    """
    try:
        for line in _lines(config):
            print(line)
    except CannotStart as error:
        print(f"secateur-server: {error}", file=sys.stderr)
        return 1
    return 0


def _lines(config: Config) -> Iterator[str]:
    """Errors: CannotStart."""
    metrics = Metrics(config.device)
    yield f"serves gRPC at {config.address}, {_protected(config, metrics)}"
    where = config.metrics_address
    if where is not None:
        host_and_port(where)
    token = ", to who sends its token" if config.metrics_token_file else ""
    yield f"serves metrics at http://{where}/metrics{token}" if where else "serves no metrics"
    yield f"prunes on {_device(config.device)}"
    yield (
        f"takes models of up to {_size(config.max_model_bytes)}, at once up to "
        f"{_size(config.memory_limit)}; {config.queue_size} requests may wait"
    )
    yield f"keeps checkpoints {_store(config)}"
    yield f"opens URIs under {_uris(config)}"
    if config.otlp_endpoint:
        traces_of(config)
        yield f"sends traces to {config.otlp_endpoint}"


def _protected(config: Config, metrics: Metrics) -> str:
    parts = ["without TLS"]
    if credentials_of(config, metrics):
        parts = ["with TLS, to callers with a certificate" if config.tls_client_ca else "with TLS"]
    callers = callers_of(config, metrics)
    names = sorted({tenant.name for tenant in callers.tenants})
    parts.append(f"to the tenants {', '.join(names)}" if names else "without tokens")
    if is_public(config.address) and config.insecure:
        parts.append("which other machines may reach (--insecure)")
    return ", ".join(parts)


def _device(device: torch.device) -> str:
    """Errors: CannotStart, where it does not work."""
    try:
        passes = passes_of(device)
        passes.room(1 << 20)
        _, free = memory_of(device)
    except RuntimeError as error:
        raise CannotStart(f"{device} does not work: {error}") from None
    if device.type == "cuda":
        is_compiled = type(passes) is not Cuda
        how = "compiled by Triton" if is_compiled else "without Triton, which would be faster"
        return f"{device}, {torch.cuda.get_device_name(device)}, {how}, {_size(free)} free"
    how = "compiled by numba" if kernels.enabled else "without numba, which would be faster"
    return f"cpu, {os.cpu_count()} cores, {how}, {_size(free)} free"


def _store(config: Config) -> str:
    """Errors: CannotStart, where the folder cannot be written."""
    if config.store_dir is None:
        return "in a temporary folder, until it ends"
    nearest = next(path for path in (config.store_dir, *config.store_dir.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise CannotStart(f"cannot keep checkpoints in {config.store_dir}: {nearest} is closed")
    most = config.store_max_bytes
    return f"in {config.store_dir}, up to {_size(most) if most else '3/4 of what is free there'}"


def _uris(config: Config) -> str:
    paths: tuple[Path | str, ...] = config.allow_path
    return ", ".join(map(str, (*paths, *config.allow_uri))) or "no address"


def _size(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB" if count >= 1 << 30 else f"{count / (1 << 20):.1f} MiB"
