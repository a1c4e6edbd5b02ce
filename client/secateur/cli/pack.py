"""The command `secateur pack`: writes models with zeros as small files, without a server."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import click

from secateur.cli.gains import say_of_packed_folder
from secateur.cli.group import Command
from secateur.cli.options import model_options, out_option
from secateur.cli.output import Printer, print_options, say
from secateur.cli.places import standard_streams
from secateur.cli.targets import check_exists
from secateur.errors import SecateurError
from secateur.files import check_holds, check_out, save
from secateur.model import Source
from secateur.packing.bitmasks import BITMASK, BITMASK_24, save_bitmasks
from secateur.packing.packed import check_zstandard
from secateur.paths import path_of
from secateur.source import read_source
from secateur_proto.framing import tensor_bytes


def _save_packed(path: Path, source: Source) -> None:
    check_zstandard("secateur pack")
    file = source.torch_file, source.folder, source.onnx_file
    save(path, source.tensors, source.metadata, source.index, None, *file, is_packed=True)


_LAYOUTS: Mapping[str, Callable[[Path, Source], None]] = {
    "packed": _save_packed,
    **{layout.name: partial(save_bitmasks, layout=layout) for layout in (BITMASK, BITMASK_24)},
}


@click.command("pack", cls=Command)
@model_options
@out_option("the .safetensors file, or the folder, to write")
@click.option(
    "--layout",
    type=click.Choice(list(_LAYOUTS)),
    default="packed",
    help="of OUT: packed, which secateur.load and every command read; or one that "
    "compressed-tensors 0.14.0.1 reads; default: packed",
)
@print_options()
def command(model: str, key: str | None, out: str, layout: str, printer: Printer) -> None:
    """Writes a model with zeros as a small file."""
    for place in (model, out):
        if "://" in place:
            raise SecateurError(f"{place}: pack reads and writes local files; give a path")
    printer = printer.beside(out)
    with standard_streams(model, out) as (source_path, target):
        path = path_of(target)
        check_exists(source_path)
        check_out(path, path_of(source_path))
        source = read_source(source_path, key)
        check_holds(path, source.others, source.index, source.folder, is_packed=True)
        _LAYOUTS[layout](path, source)
        after = sum(file.stat().st_size for file in _written(path, source))
    before = sum(tensor_bytes(tensor.dtype, tensor.shape) for tensor in source.tensors.values())
    share = f", {after / before:.2f} of the dense {before:,}" if before else ""
    sizes = {"out": out, "bytes": after, "dense_bytes": before}
    printer.show(sizes, f"{out}: {after:,} bytes{share}")
    if layout == "packed" and not printer.quiet:
        say_of_packed_folder(out)
    if before and after >= before:
        say(
            f"warning: {out} is not smaller than the dense {before:,} bytes, as the model has few "
            "zeros; prune it first: secateur prune IN -o OUT --method global_unstructured "
            "--amount 0.5"
        )


def _written(path: Path, source: Source) -> set[Path]:
    """The files of weights that were written."""
    if source.index is not None and (path.is_dir() or path.name.endswith(".json")):
        folder = path if path.is_dir() else path.parent
        return {folder / name for name in source.index.files.values()}
    return {path / source.folder.model.name if source.folder and path.is_dir() else path}
