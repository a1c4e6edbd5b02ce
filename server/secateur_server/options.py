"""The options of secateur-server, and their environment variables."""

import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from secateur_server import option_types as kinds

# Variables of the client, of compose and of the tests.
_OTHERS_VARIABLES = {
    "SECATEUR_SERVER",
    "SECATEUR_TOKEN",
    "SECATEUR_TLS_CA",
    "SECATEUR_MEMORY",
    "SECATEUR_FUZZ_SECONDS",
}
# Kubernetes sets these for a Service named `secateur`.
_KUBERNETES_LINK = re.compile(r"SECATEUR_(SERVICE_(HOST|PORT.*)|PORT(_\d+_.*)?)")


def _option(kind: Callable[[str], object], default: object, text: str) -> Any:
    """A field of Config.

    Args:
        kind: Converts a text.
        default: The text, or None, or a switch's value.
        text: For --help.
    """
    return field(metadata={"kind": kind, "default": default, "text": text})


@dataclass(frozen=True)
class Config:
    """The options of secateur-server. docs/operations.md describes each.

    Attributes:
        metrics_address: None: metrics are not served.
        max_connection_age, max_connection_age_grace: 0: no limit.
        store_dir: None: a private temporary folder.
        store_max_bytes: None: 3/4 of the disk's free space and the store's size together.
        store_ttl: 0: for ever.
    """

    address: str = _option(str, "127.0.0.1:50051", "where to serve gRPC; port 0 is a free port")
    metrics_address: str | None = _option(
        str, "127.0.0.1:9464", "where to serve /metrics; empty: nowhere"
    )
    device: torch.device = _option(
        kinds.device, "auto", "where to prune: auto, cpu, cuda or cuda:N"
    )
    max_model_bytes: int = _option(
        kinds.byte_count,
        None,
        "bytes of the largest model; default: 3/4 of the memory, or of the GPU's if less",
    )
    memory_limit: int = _option(
        kinds.byte_count, None, "bytes of all models that are served at once; default: the same"
    )
    queue_size: int = _option(kinds.whole_number, "64", "requests that may wait for memory")
    idle_timeout: float = _option(
        kinds.positive_seconds,
        "60",
        "seconds within which a caller must send, or take, each message",
    )
    min_throughput: int = _option(
        kinds.byte_count,
        "32KiB",
        "bytes a second that a caller must send while the server waits, after --idle-timeout",
    )
    drain_timeout: float = _option(
        kinds.seconds, "30", "seconds that running requests get at SIGTERM"
    )
    max_connection_age: float = _option(
        kinds.seconds, "3600", "seconds after which clients are asked to reconnect; 0 is never"
    )
    max_connection_age_grace: float = _option(
        kinds.seconds, "86400", "seconds that calls on such a connection get to end; 0 is no limit"
    )
    store_dir: Path | None = _option(
        Path, None, "where to store checkpoints; default: a temporary folder"
    )
    store_uri: str | None = _option(
        kinds.prefix,
        None,
        "where several servers store checkpoints, such as s3://bucket/checkpoints; --store-dir is "
        "then their cache",
    )
    store_max_bytes: int | None = _option(
        kinds.byte_count,
        None,
        "bytes of all checkpoints; default: 3/4 of the free space and the store's size; with "
        "--store-uri no limit",
    )
    store_ttl: float = _option(
        kinds.seconds, "0", "seconds from its last use that a checkpoint is kept; 0 is for ever"
    )
    work_memory: int = _option(
        kinds.byte_count,
        "1GiB",
        "bytes for one request on a checkpoint or a URI, beside mapped files",
    )
    allow_path: tuple[Path, ...] = _option(
        kinds.folders, "", "folders of file:// URIs that requests may name, separated by commas"
    )
    allow_uri: tuple[str, ...] = _option(
        kinds.prefixes,
        "",
        "prefixes of other URIs that requests may name, such as s3://bucket/models",
    )
    ray_address: str | None = _option(
        str,
        None,
        "a Ray cluster that works on URIs: auto, HOST:PORT, or local for one of this machine; "
        "needs secateur[ray]",
    )
    tls_cert: Path | None = _option(
        kinds.file, None, "the server's certificate and its intermediate certificates, PEM"
    )
    tls_key: Path | None = _option(kinds.file, None, "its private key, PEM, without a password")
    tls_client_ca: Path | None = _option(
        kinds.file, None, "the CA of client certificates, PEM: callers then need one"
    )
    tokens_file: Path | None = _option(
        kinds.file, None, "tenants and their tokens, TOML: callers then need one"
    )
    metrics_token_file: Path | None = _option(
        kinds.file, None, "a file with the token that /metrics requires"
    )
    insecure: bool = _option(kinds.switch, False, "serve other machines without TLS and tokens")
    log_format: str = _option(kinds.log_format, "auto", "json, text, or auto: text on a terminal")
    otlp_endpoint: str | None = _option(
        str, None, "where to send traces, http://HOST:PORT; needs secateur[otel]"
    )
    check: bool = _option(kinds.switch, False, "print what the server would do, and exit")


def variable_of(option: str) -> str:
    """Returns the environment variable of an option, a field of Config."""
    return "SECATEUR_" + option.upper()


def unknown_variables(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Describes each SECATEUR_* variable that neither the server nor another program reads.

    Args:
        environment: To search.
    """
    options = [variable_of(option.name) for option in fields(Config)]
    return [
        _unknown(name, options)
        for name in sorted(environment)
        if name.startswith("SECATEUR_")
        and name not in options
        and name not in _OTHERS_VARIABLES
        and not _KUBERNETES_LINK.fullmatch(name)
    ]


def _unknown(name: str, options: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, options, 1, 0.0)
    return f"{name} is set, but is not an option of the server; the nearest is {near[0]}"
