"""What the operator sets: options, each also an environment variable."""

import argparse
import difflib
import ipaddress
import os
import re
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import torch

from secateur_proto import sizes
from secateur_server.backends.memory import total_memory


@dataclass(frozen=True)
class Config:
    """The options of secateur-server.

    metrics_address: None serves none.  memory_limit: bytes of models in service.
    idle_timeout, drain_timeout: seconds.  min_throughput: bytes a second.
    max_connection_age, max_connection_age_grace: seconds, 0 is no bound.
    store_dir: None is a private temporary folder.  store_max_bytes: None is 3/4 of what is free
    or used.
    store_ttl: seconds, 0 is for ever.  work_memory: bytes.
    allow_path: folders.  allow_uri: prefixes.
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
    """The options are wrong; the message is one line."""


class _Parser(argparse.ArgumentParser):
    """Raises BadConfig where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise BadConfig(message)


def read_config(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> Config:
    """As parse_config; wrong options are one line on stderr, and exit status 2."""
    try:
        return parse_config(arguments, environment)
    except BadConfig as error:
        print(f"secateur-server: error: {error} (try secateur-server --help)", file=sys.stderr)
        sys.exit(2)


def parse_config(arguments: Sequence[str], environment: Mapping[str, str]) -> Config:
    """The configuration from the command line, then SECATEUR_* variables, then defaults.

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
            # A string default goes through `kind` as an argument does, with the same errors.
            default=environment.get(variable, default),
            nargs="?" if is_switch else None,
            const=True if is_switch else None,
            metavar="1|0" if is_switch else None,
            help=f"{text} (default: {default})" if default and not is_switch else text,
        )
    options = vars(parser.parse_args(arguments))
    for name in ("max_model_bytes", "memory_limit"):
        if options[name] is None:
            # What comes by handle or URI, and small models, are not on the GPU: see sources.
            both = total_memory(options["device"]), total_memory(torch.device("cpu"))
            options[name] = min(both) * 3 // 4
    config = Config(**{**options, "metrics_address": options["metrics_address"] or None})
    if problem := _problem(config):
        raise BadConfig(problem)
    return config


def unknown_variables(environment: Mapping[str, str] = os.environ) -> list[str]:
    """A line about each SECATEUR_* variable that is no option of the server, and none of others."""
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
    return f"{name} is set, and is not an option of the server; the nearest is {near[0]}"


def _problem(config: Config) -> str | None:
    """What is wrong with options that are right one by one."""
    if (config.tls_cert is None) != (config.tls_key is None):
        return "--tls-cert and --tls-key go together"
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
        f"{' and '.join(missing)}, or say --insecure where something else keeps strangers out"
    )


def _open_metrics(config: Config) -> str | None:
    address = config.metrics_address or ""
    if config.metrics_token_file or ":" not in address or not is_public(address):
        return None
    return (
        f"--metrics-address {address} can be reached from other machines: give "
        "--metrics-token-file, or say --insecure where something else keeps strangers out"
    )


def is_public(address: str) -> bool:
    """Whether other machines may reach an address."""
    if address.startswith(("unix:", "unix-abstract:")):
        return False
    host = address.removeprefix("dns:///").rpartition(":")[0].strip("[]")
    if host == "localhost":
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: nobody knows what it will stand for
        return True


def device(name: str) -> torch.device:
    """The device of `name`: auto, cpu, cuda or cuda:N."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdecimal())):
        raise argparse.ArgumentTypeError(f"{name!r} is none of auto, cpu, cuda, cuda:N")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(
            f"{name!r}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices"
        )
    return torch.device("cuda:0" if name == "cuda" else name)  # as its tensors have it


def byte_count(text: str) -> int:
    """A number of bytes: 1048576, 512MiB, 16GB."""
    try:
        return sizes.byte_count(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def whole(text: str) -> int:
    """A whole number, not negative."""
    if text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number")


def switch(text: str) -> bool:
    """What a variable says that stands for an option without a value."""
    if text.lower() in ("1", "true", "yes"):
        return True
    if text.lower() in ("0", "false", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither 1 nor 0")


def file(text: str) -> Path:
    """The path of a file that can be read, again and again: no pipe."""
    path = Path(text)
    try:
        if stat.S_ISREG(path.stat().st_mode):  # to open a pipe waits for somebody to write to it
            with path.open("rb"):
                return path
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from None
    raise argparse.ArgumentTypeError(f"{text}: is no file")


def log_format(text: str) -> str:
    """How lines are logged."""
    if text not in ("auto", "json", "text"):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, json, text")
    return text


def seconds(text: str) -> float:
    """A time in seconds, not negative."""
    try:
        if (value := float(text)) >= 0:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no time in seconds")


def some_seconds(text: str) -> float:
    """A time in seconds, more than none."""
    if (value := seconds(text)) > 0:
        return value
    raise argparse.ArgumentTypeError(f"{text!r} is no time to wait")


def folders(text: str) -> tuple[Path, ...]:
    """Absolute folders, parted by commas."""
    paths = tuple(Path(part.strip()) for part in text.split(",") if part.strip())
    for path in paths:
        if not path.is_absolute() or not path.is_dir():
            raise argparse.ArgumentTypeError(f"{str(path)!r} is no absolute path of a folder")
    return paths


def prefixes(text: str) -> tuple[str, ...]:
    """Beginnings of URIs, parted by commas."""
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    for prefix in found:
        scheme, separator, rest = prefix.partition("://")
        if not separator or not rest.strip("/") or scheme in ("file", "local"):
            raise argparse.ArgumentTypeError(
                f"{prefix!r} is no scheme://place (for folders there is --allow-path)"
            )
    return found


# Variables of the client, of compose and of the tests.
_OTHERS_VARIABLES = {
    "SECATEUR_SERVER",
    "SECATEUR_TOKEN",
    "SECATEUR_TLS_CA",
    "SECATEUR_MEMORY",
    "SECATEUR_FUZZ_SECONDS",
}
# Kubernetes tells containers where a Service of the name `secateur` is.
_KUBERNETES_LINK = re.compile(r"SECATEUR_(SERVICE_(HOST|PORT.*)|PORT(_\d+_.*)?)")

_OPTIONS = (
    ("address", str, "127.0.0.1:50051", "where to serve gRPC; port 0 takes a free one"),
    ("metrics-address", str, "127.0.0.1:9464", "where to serve /metrics; empty serves none"),
    ("device", device, "auto", "where to prune: auto, cpu, cuda or cuda:N"),
    (
        "max-model-bytes",
        byte_count,
        None,
        "the largest model, by default 3/4 of the memory, or of the GPU's if that is less",
    ),
    ("memory-limit", byte_count, None, "of all models in service, by default the same"),
    ("queue-size", whole, "64", "requests that may wait for memory"),
    ("idle-timeout", some_seconds, "60", "seconds in which a message has to come, or be taken"),
    (
        "min-throughput",
        byte_count,
        "32KiB",
        "bytes a second that a caller has to send while it is waited for, after --idle-timeout",
    ),
    ("drain-timeout", seconds, "30", "seconds that running requests get at SIGTERM"),
    (
        "max-connection-age",
        seconds,
        "3600",
        "seconds after which callers must connect again; 0 is never",
    ),
    (
        "max-connection-age-grace",
        seconds,
        "86400",
        "seconds that calls on such a connection get to end; 0 is no bound",
    ),
    ("store-dir", Path, None, "where checkpoints are kept; else a temporary folder"),
    (
        "store-max-bytes",
        byte_count,
        None,
        "how much of them, by default 3/4 of what is free or used",
    ),
    ("store-ttl", seconds, "0", "seconds from its last use that one is kept; 0 is for ever"),
    ("work-memory", byte_count, "1GiB", "for one request on a checkpoint, beside mapped files"),
    ("allow-path", folders, "", "folders of file:// URIs that requests may name, parted by ','"),
    ("allow-uri", prefixes, "", "beginnings of other URIs, such as s3://bucket/models, likewise"),
    ("tls-cert", file, None, "the certificate to serve with, and its chain: PEM"),
    ("tls-key", file, None, "its private key: PEM, without a password"),
    ("tls-client-ca", file, None, "authorities; callers then need a certificate of theirs: PEM"),
    ("tokens-file", file, None, "tenants and their tokens: TOML; callers then need a token"),
    ("metrics-token-file", file, None, "the token that scrapers have to send"),
    ("insecure", switch, False, "serve other machines without TLS and tokens"),
    ("log-format", log_format, "auto", "json, text, or auto: text on a terminal"),
    ("otlp-endpoint", str, None, "where traces go: http://HOST:PORT, needs secateur[otel]"),
    ("check", switch, False, "say what the server would do, and end"),
)
