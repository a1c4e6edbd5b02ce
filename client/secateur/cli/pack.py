"""The command secateur pack: writes models with zeros as small files, without a server."""

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from secateur.cli.options import key_option, out_option
from secateur.errors import SecateurError
from secateur.files import check_holds, check_out, save
from secateur.model import Source
from secateur.packing.bitmasks import BITMASK, BITMASK_24, save_bitmasks
from secateur.packing.packed import check_zstandard
from secateur.paths import path_of
from secateur.source import read_source
from secateur_proto.framing import tensor_bytes


def add_pack(commands: Any) -> None:
    """Adds the command."""
    text = "write a model with zeros as a small file"
    command: argparse.ArgumentParser = commands.add_parser("pack", help=text, description=text)
    command.set_defaults(run=_pack, wrong_usage=command.error, server=None)
    command.add_argument("model", metavar="IN", help="a local file or folder")
    key_option(command)
    out_option(command, "the .safetensors file, or the folder, to write")
    command.add_argument(
        "--layout",
        choices=_LAYOUTS,
        default="packed",
        help="of OUT: packed, which secateur.load and every command read; or one that "
        "compressed-tensors 0.14.0.1 reads; default: packed",
    )


def _save_packed(path: Path, source: Source) -> None:
    check_zstandard("secateur pack")
    file = source.torch_file, source.folder, source.onnx_file
    save(path, source.tensors, source.metadata, source.index, None, *file, is_packed=True)


_LAYOUTS: Mapping[str, Callable[[Path, Source], None]] = {
    "packed": _save_packed,
    **{layout.name: partial(save_bitmasks, layout=layout) for layout in (BITMASK, BITMASK_24)},
}


def _pack(options: argparse.Namespace) -> None:
    for place in (options.model, options.out):
        if "://" in place:
            raise SecateurError(f"{place}: pack reads and writes local files; give a path")
    path = path_of(options.out)
    check_out(path, path_of(options.model))
    source = read_source(options.model, options.key)
    check_holds(path, source.others, source.index, source.folder, is_packed=True)
    _LAYOUTS[options.layout](path, source)
    before = sum(tensor_bytes(tensor.dtype, tensor.shape) for tensor in source.tensors.values())
    after = sum(file.stat().st_size for file in _written(path, source))
    share = f", {after / before:.2f} of the dense {before:,}" if before else ""
    print(f"{path}: {after:,} bytes{share}")


def _written(path: Path, source: Source) -> set[Path]:
    """The files of weights that were written."""
    if source.index is not None and (path.is_dir() or path.name.endswith(".json")):
        folder = path if path.is_dir() else path.parent
        return {folder / name for name in source.index.files.values()}
    return {path / source.folder.model.name if source.folder and path.is_dir() else path}
