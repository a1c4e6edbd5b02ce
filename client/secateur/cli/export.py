"""The command `secateur export`."""

import click

from secateur.cli.group import Command
from secateur.cli.output import Printer, print_options
from secateur.onnx.folders import export_folder
from secateur.paths import path_of


@click.command("export", cls=Command)
@click.argument("folder", metavar="FOLDER", type=click.Path())
@click.option(
    "-o", "--out", type=click.Path(), metavar="OUT", required=True, help="the .onnx file to write"
)
@print_options()
def command(folder: str, out: str, printer: Printer) -> None:
    """Writes the model of a Hugging Face folder as ONNX, and checks it with onnxruntime."""
    checked = export_folder(folder, path_of(out))
    printer.show({"out": out, "checked": checked}, checked)
