"""The command secateur checkpoints: what a server keeps."""

import argparse
import json
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from typing import Any

from secateur.checkpoint import Checkpoint
from secateur.cli_server import client_of, server_options
from secateur.client import Client
from secateur.errors import DataLoss
from secateur.paths import path_of
from secateur.source import read_source
from secateur_proto.index import SUFFIX


def add_checkpoints(commands: Any) -> None:
    """Adds the command, and those under it."""
    text = "what the server keeps: ls, put, get, rm"
    checkpoints: argparse.ArgumentParser = commands.add_parser(
        "checkpoints", help=text, description=text
    )
    under = checkpoints.add_subparsers(required=True, metavar="COMMAND")
    ls = _command(under, "ls", "list the checkpoints, the newest first", _ls)
    ls.add_argument("--json", action="store_true", help="print JSON, not a table")
    put = _command(under, "put", "upload a model, and print the name of its checkpoint", _put)
    put.add_argument("model", metavar="IN", help="a file, a folder, or a URI")
    key_option(put)
    get = _command(under, "get", "download a checkpoint", _get)
    get.add_argument("name", metavar="NAME", help="checkpoints/...")
    get.add_argument("-o", "--out", metavar="OUT", required=True, help="a file, or a folder")
    get.add_argument(
        "--output",
        choices=("dense", "reparametrized", "masks"),
        default="dense",
        help="what OUT holds: tensors with zeros (default), X_orig and X_mask, or bits",
    )
    rm = _command(under, "rm", "delete checkpoints", _rm)
    rm.add_argument("names", metavar="NAME", nargs="+", help="checkpoints/...")


def _command(under: Any, name: str, text: str, run: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = under.add_parser(name, help=text, description=text)
    command.set_defaults(run=run, wrong_usage=command.error)
    server_options(command, "which is needed")
    return command


def is_checkpoint(model: str) -> bool:
    """Whether IN names a checkpoint. A file goes first: many keep theirs in such a folder."""
    return model.startswith("checkpoints/") and not path_of(model).exists()


def key_option(command: argparse.ArgumentParser) -> None:
    """Adds --key."""
    text = "where the state_dict is in a torch file, as ema.model (default: the only one in it)"
    command.add_argument("--key", metavar="PATH", help=text)


def source_of(client: Client, options: argparse.Namespace) -> Any:
    """What IN means: a checkpoint by its name, a URI, or a file here that is read once."""
    if is_checkpoint(options.model):
        found: Any = client.checkpoint(options.model)
    elif "://" in options.model:
        found = options.model
    else:
        return read_source(options.model, options.key)
    read_source(found, options.key)  # refuses a key
    return found


def _ls(options: argparse.Namespace) -> None:
    with client_of(options) as client:
        found = list(client.checkpoints())
    if options.json:
        print(json.dumps([asdict(checkpoint) for checkpoint in found], indent=2, default=_plain))
        return
    lines = [("name", "model", "created", "size", "masks", "expires"), *map(_row, found)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        print("  ".join(cells).rstrip())


def _row(checkpoint: Checkpoint) -> tuple[str, ...]:
    expires = checkpoint.expire_time
    return (
        checkpoint.name,
        _model(checkpoint),
        _time(checkpoint.create_time),
        _size(checkpoint.size_bytes),
        _size(checkpoint.mask_bytes) if checkpoint.mask_bytes else "-",
        _time(expires) if expires else "never",
    )


def _model(checkpoint: Checkpoint) -> str:
    """What the model was called: its file, or the index of its shards."""
    names = [file.filename for file in checkpoint.files]
    return next((name for name in names if name.endswith(SUFFIX)), names[0]) or "-"


def _time(time: datetime) -> str:
    return time.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _plain(time: datetime) -> str:
    return time.isoformat()


def _size(count: float) -> str:
    """Bytes, with as many digits as a person reads."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _put(options: argparse.Namespace) -> None:
    with client_of(options) as client:
        print(client.upload(source_of(client, options)).name)


def _get(options: argparse.Namespace) -> None:
    with client_of(options) as client:
        client.download(client.checkpoint(options.name), options.out, options.output)


def _rm(options: argparse.Namespace) -> None:
    with client_of(options) as client:
        names = dict.fromkeys(options.names)
        for name in names:  # all are there: a wrong name deletes none
            with suppress(DataLoss):  # what is damaged may go
                client.checkpoint(name)
        for name in names:
            client.delete(name)
