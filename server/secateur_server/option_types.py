"""The types of options: each function converts a text, or says why it cannot."""

import argparse
import stat
from pathlib import Path

import torch

from secateur_proto import sizes


def device(name: str) -> torch.device:
    """A device: auto, cpu, cuda or cuda:N."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdecimal())):
        raise argparse.ArgumentTypeError(f"{name!r} is not one of auto, cpu, cuda, cuda:N")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(
            f"{name!r}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices"
        )
    return torch.device("cuda:0" if name == "cuda" else name)  # with an index, as tensors have it


def byte_count(text: str) -> int:
    """A number of bytes: 1048576, 512MiB, 16GB."""
    try:
        return sizes.byte_count(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def whole_number(text: str) -> int:
    """A whole number, 0 or more."""
    if text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")


def switch(text: str) -> bool:
    """The value of a variable for an option without a value: 1 or 0."""
    if text.lower() in ("1", "true", "yes"):
        return True
    if text.lower() in ("0", "false", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither 1 nor 0")


def file(text: str) -> Path:
    """The path of a readable regular file, which can be reread: not a pipe."""
    path = Path(text)
    try:
        if stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for a writer
            with path.open("rb"):
                return path
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from None
    raise argparse.ArgumentTypeError(f"{text}: is not a file")


def log_format(text: str) -> str:
    """A log format: auto, json or text."""
    if text not in ("auto", "json", "text"):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of auto, json, text")
    return text


def seconds(text: str) -> float:
    """A time in seconds, 0 or more."""
    try:
        if (value := float(text)) >= 0:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a time in seconds")


def positive_seconds(text: str) -> float:
    """A time in seconds, more than 0."""
    if (value := seconds(text)) > 0:
        return value
    raise argparse.ArgumentTypeError(f"{text!r} is not more than 0 seconds")


def folders(text: str) -> tuple[Path, ...]:
    """Absolute folders, separated by commas."""
    paths = tuple(Path(part.strip()) for part in text.split(",") if part.strip())
    for path in paths:
        if not path.is_absolute() or not path.is_dir():
            raise argparse.ArgumentTypeError(f"{str(path)!r} is not the absolute path of a folder")
    return paths


def prefixes(text: str) -> tuple[str, ...]:
    """Prefixes of URIs, separated by commas."""
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    for prefix in found:
        scheme, separator, rest = prefix.partition("://")
        if not separator or not rest.strip("/") or scheme in ("file", "local"):
            raise argparse.ArgumentTypeError(
                f"{prefix!r} is not scheme://place (for folders use --allow-path)"
            )
    return found


def prefix(text: str) -> str:
    """One prefix of URIs."""
    found = prefixes(text)
    if len(found) != 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not one URI")
    return found[0]
