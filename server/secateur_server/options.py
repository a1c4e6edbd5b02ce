"""The table of the options of secateur-server, and their environment variables."""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

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

# Name, type, default and help of each option.
OPTIONS = (
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


def variable_of(option: str) -> str:
    """Returns the environment variable of an option."""
    return "SECATEUR_" + option.upper().replace("-", "_")


def unknown_variables(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Describes each SECATEUR_* variable that neither the server nor another program reads.

    Args:
        environment: To search.
    """
    options = [variable_of(name) for name, *_ in OPTIONS]
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
