"""The options of secateur-server. Each is also an environment variable."""

import argparse
import difflib
import ipaddress
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import torch

from secateur_server.backends.memory import total_memory
from secateur_server.option_types import (
    byte_count,
    device,
    file,
    folders,
    log_format,
    positive_seconds,
    prefixes,
    seconds,
    switch,
    whole_number,
)


@dataclass(frozen=True)
class Config:
    """The options of secateur-server. docs/operations.md describes each.

    Attributes:
        metrics_address: None: metrics are not served.
        memory_limit: Bytes of the models that are served at once.
        idle_timeout, drain_timeout: Seconds.
        min_throughput: Bytes a second.
        max_connection_age, max_connection_age_grace: Seconds; 0: no limit.
        store_dir: None: a private temporary folder.
        store_max_bytes: None: 3/4 of the disk's free space and the store's size together.
        store_ttl: Seconds; 0: for ever.
        work_memory: Bytes.
        allow_path: Folders.
        allow_uri: Prefixes of URIs.
    """

    address: str
    metrics_address: str | None
    device: torch.device
    max_model_bytes: int
    memory_limit: int
    queue_size: int = 64
    idle_timeout: float = 60.0
    min_throughput: int = 32 << 10
    drain_timeout: float = 30.0
    max_connection_age: float = 3600.0
    max_connection_age_grace: float = 86400.0
    store_dir: Path | None = None
    store_max_bytes: int | None = None
    store_ttl: float = 0.0
    work_memory: int = 1 << 30
    allow_path: tuple[Path, ...] = ()
    allow_uri: tuple[str, ...] = ()
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    tokens_file: Path | None = None
    metrics_token_file: Path | None = None
    insecure: bool = False
    log_format: str = "auto"
    otlp_endpoint: str | None = None
    check: bool = False


class BadConfig(ValueError):
    """An option is unknown or wrong. The message is one line."""


class _Parser(argparse.ArgumentParser):
    """Raises BadConfig instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise BadConfig(message)


def read_config(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> Config:
    """Reads the options; prints a line on stderr and exits with 2 if one is wrong.

    Args:
        arguments: Of the command line.
        environment: Variables SECATEUR_*.
    """
    try:
        return parse_config(arguments, environment)
    except BadConfig as error:
        print(f"secateur-server: error: {error} (try secateur-server --help)", file=sys.stderr)
        sys.exit(2)


def parse_config(arguments: Sequence[str], environment: Mapping[str, str]) -> Config:
    """Reads each option from the command line, a SECATEUR_* variable, or its default.

    Args:
        arguments: Of the command line.
        environment: Variables SECATEUR_*.

    Raises:
        BadConfig: An option is unknown or wrong, or does not fit the others.
    """
    parser = _Parser(
        prog="secateur-server",
        description="Prunes neural networks over gRPC.",
        epilog="Each option is also an environment variable: --max-model-bytes is "
        "SECATEUR_MAX_MODEL_BYTES.",
    )
    parser.add_argument("--version", action="version", version=f"secateur {version('secateur')}")
    for name, kind, default, text in _OPTIONS:
        variable = _variable(name)
        is_switch = kind is switch
        parser.add_argument(
            f"--{name}",
            type=kind,
            # argparse converts a string default as it does an argument, with the same errors.
            default=environment.get(variable, default),
            nargs="?" if is_switch else None,
            const=True if is_switch else None,
            metavar="1|0" if is_switch else None,
            help=f"{text} (default: {default})" if default and not is_switch else text,
        )
    options = vars(parser.parse_args(arguments))
    for name in ("max_model_bytes", "memory_limit"):
        if options[name] is None:
            # Checkpoints, files of URIs and small models are in host memory, others on the device.
            both = total_memory(options["device"]), total_memory(torch.device("cpu"))
            options[name] = min(both) * 3 // 4
    config = Config(**{**options, "metrics_address": options["metrics_address"] or None})
    if problem := _problem(config):
        raise BadConfig(problem)
    return config


def unknown_variables(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Describes each SECATEUR_* variable that neither the server nor another program reads.

    Args:
        environment: To search.
    """
    options = [_variable(name) for name, *_ in _OPTIONS]
    return [
        _unknown(name, options)
        for name in sorted(environment)
        if name.startswith("SECATEUR_")
        and name not in options
        and name not in _OTHERS_VARIABLES
        and not _KUBERNETES_LINK.fullmatch(name)
    ]


def _variable(option: str) -> str:
    return "SECATEUR_" + option.upper().replace("-", "_")


def _unknown(name: str, options: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, options, 1, 0.0)
    return f"{name} is set, but is not an option of the server; the nearest is {near[0]}"


def _problem(config: Config) -> str | None:
    """What is wrong with the combination of options."""
    if (config.tls_cert is None) != (config.tls_key is None):
        return "--tls-cert and --tls-key need each other: give both or neither"
    if config.tls_client_ca and not config.tls_cert:
        return "--tls-client-ca needs --tls-cert and --tls-key"
    if config.insecure:
        return None
    return _open_calls(config) or _open_metrics(config)


def _open_calls(config: Config) -> str | None:
    if not is_public(config.address):
        return None
    missing = [] if config.tls_cert else ["--tls-cert and --tls-key"]
    if not config.tokens_file and not config.tls_client_ca:
        missing.append("--tokens-file (or --tls-client-ca)")
    if not missing:
        return None
    return (
        f"--address {config.address} can be reached from other machines: give "
        f"{' and '.join(missing)}, or --insecure if something else protects the server"
    )


def _open_metrics(config: Config) -> str | None:
    address = config.metrics_address or ""
    if config.metrics_token_file or ":" not in address or not is_public(address):
        return None
    return (
        f"--metrics-address {address} can be reached from other machines: give "
        "--metrics-token-file, or --insecure if something else protects the server"
    )


def is_public(address: str) -> bool:
    """Whether other machines may reach an address.

    Args:
        address: Of gRPC or metrics.
    """
    if address.startswith(("unix:", "unix-abstract:")):
        return False
    host = address.removeprefix("dns:///").rpartition(":")[0].strip("[]")
    if host == "localhost":
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may resolve to anything
        return True


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

_OPTIONS = (
    ("address", str, "127.0.0.1:50051", "where to serve gRPC; port 0 is a free port"),
    ("metrics-address", str, "127.0.0.1:9464", "where to serve /metrics; empty: nowhere"),
    ("device", device, "auto", "where to prune: auto, cpu, cuda or cuda:N"),
    (
        "max-model-bytes",
        byte_count,
        None,
        "bytes of the largest model; default: 3/4 of the memory, or of the GPU's if less",
    ),
    (
        "memory-limit",
        byte_count,
        None,
        "bytes of all models that are served at once; default: the same",
    ),
    ("queue-size", whole_number, "64", "requests that may wait for memory"),
    (
        "idle-timeout",
        positive_seconds,
        "60",
        "seconds within which a caller must send, or take, each message",
    ),
    (
        "min-throughput",
        byte_count,
        "32KiB",
        "bytes a second that a caller must send while the server waits, after --idle-timeout",
    ),
    ("drain-timeout", seconds, "30", "seconds that running requests get at SIGTERM"),
    (
        "max-connection-age",
        seconds,
        "3600",
        "seconds after which clients are asked to reconnect; 0 is never",
    ),
    (
        "max-connection-age-grace",
        seconds,
        "86400",
        "seconds that calls on such a connection get to end; 0 is no limit",
    ),
    ("store-dir", Path, None, "where to store checkpoints; default: a temporary folder"),
    (
        "store-max-bytes",
        byte_count,
        None,
        "bytes of all checkpoints; default: 3/4 of the disk's free space and the store's size",
    ),
    (
        "store-ttl",
        seconds,
        "0",
        "seconds from its last use that a checkpoint is kept; 0 is for ever",
    ),
    (
        "work-memory",
        byte_count,
        "1GiB",
        "bytes for one request on a checkpoint or a URI, beside mapped files",
    ),
    (
        "allow-path",
        folders,
        "",
        "folders of file:// URIs that requests may name, separated by commas",
    ),
    (
        "allow-uri",
        prefixes,
        "",
        "prefixes of other URIs that requests may name, such as s3://bucket/models",
    ),
    ("tls-cert", file, None, "the server's certificate and its intermediate certificates, PEM"),
    ("tls-key", file, None, "its private key, PEM, without a password"),
    ("tls-client-ca", file, None, "the CA of client certificates, PEM: callers then need one"),
    ("tokens-file", file, None, "tenants and their tokens, TOML: callers then need one"),
    ("metrics-token-file", file, None, "a file with the token that /metrics requires"),
    ("insecure", switch, False, "serve other machines without TLS and tokens"),
    ("log-format", log_format, "auto", "json, text, or auto: text on a terminal"),
    ("otlp-endpoint", str, None, "where to send traces, http://HOST:PORT; needs secateur[otel]"),
    ("check", switch, False, "print what the server would do, and exit"),
)
