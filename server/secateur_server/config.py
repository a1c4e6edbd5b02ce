"""What the operator sets: options, each also an environment variable."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch


@dataclass(frozen=True)
class Config:
    """The options of secateur-server.

    metrics_address: None serves none.  drain_timeout: seconds.
    store_dir: None is a private temporary folder.  store_max_bytes: None is 3/4 of what is free
    or used.
    store_ttl: seconds, 0 is for ever.  work_memory: bytes.
    allow_path: folders.  allow_uri: prefixes.
    """

    address: str
    metrics_address: str | None
    device: torch.device
    max_model_bytes: int
    drain_timeout: float = 30.0
    store_dir: Path | None = None
    store_max_bytes: int | None = None
    store_ttl: float = 0.0
    work_memory: int = 1 << 30
    allow_path: tuple[Path, ...] = ()
    allow_uri: tuple[str, ...] = ()


def read_config(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> Config:
    """The configuration from the command line, then SECATEUR_* variables, then defaults."""
    parser = argparse.ArgumentParser(
        prog="secateur-server",
        description="Prunes neural networks over gRPC.",
        epilog="Each option is also an environment variable: --max-model-bytes is "
        "SECATEUR_MAX_MODEL_BYTES.",
    )
    parser.add_argument("--version", action="version", version=f"secateur {version('secateur')}")
    for name, kind, default, text in _OPTIONS:
        variable = "SECATEUR_" + name.upper().replace("-", "_")
        parser.add_argument(
            f"--{name}",
            type=kind,
            # A string default goes through `kind` as an argument does, with the same errors.
            default=environment.get(variable, default),
            help=f"{text} (default: {default})" if default else text,
        )
    options = vars(parser.parse_args(arguments))
    return Config(**{**options, "metrics_address": options["metrics_address"] or None})


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
    return torch.device(name)


def byte_count(text: str) -> int:
    """A number of bytes: 1048576, 512MiB, 16GiB."""
    for suffix, factor in (("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("", 1)):
        number = text.removesuffix(suffix)
        if text.endswith(suffix) and number.isdecimal() and int(number) > 0:
            return int(number) * factor
    raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes, such as 512MiB or 16GiB")


def seconds(text: str) -> float:
    """A time in seconds, not negative."""
    try:
        if (value := float(text)) >= 0:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no time in seconds")


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


def default_model_bytes() -> int:
    """Three quarters of the memory that this process may use."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(memory, int(text) if text.isdecimal() else memory) * 3 // 4


_OPTIONS = (
    ("address", str, "127.0.0.1:50051", "where to serve gRPC; port 0 takes a free one"),
    ("metrics-address", str, "127.0.0.1:9464", "where to serve /metrics; empty serves none"),
    ("device", device, "auto", "where to prune: auto, cpu, cuda or cuda:N"),
    (
        "max-model-bytes",
        byte_count,
        str(default_model_bytes()),
        "the largest model, by default 3/4 of the memory",
    ),
    ("drain-timeout", seconds, "30", "seconds that running requests get at SIGTERM"),
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
)
