"""The command `secateur export`."""

import argparse
from typing import Any

from secateur.cli.options import out_option
from secateur.onnx.folders import export_folder
from secateur.paths import path_of


def add_export(commands: Any) -> None:
    """Adds the command; it needs no server."""
    text = "write the model of a Hugging Face folder as ONNX, and check it with onnxruntime"
    command = commands.add_parser("export", help=text, description=text)
    command.set_defaults(run=_export, server=None)
    command.add_argument("folder", metavar="FOLDER", help="with a config.json and weights")
    out_option(command, "the .onnx file to write")


def _export(options: argparse.Namespace) -> None:
    print(export_folder(options.folder, path_of(options.out)))
