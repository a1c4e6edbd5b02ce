"""Commands that make smaller what a command wrote, with the paths of this model."""

import shlex
from dataclasses import replace
from pathlib import Path

from secateur.architectures.transformer import CONFIG
from secateur.cli.output import say
from secateur.report import Report

# As the notes of the server and of the client have them.
_PACK, _SHRINK = "secateur pack OUT -o SMALL", "secateur shrink FOLDER -o SMALL"


def smaller(report: Report, model: str, out: str | None) -> Report:
    """Returns a report whose notes have commands for these paths.

    Args:
        report: Of the result.
        model: IN.
        out: OUT; None if nothing was written.
    """
    if out in (None, "-") or "://" in str(out):
        return report
    written = Path(str(out))
    named = written.resolve() if written.name in ("", "..") else written  # "." has no name
    small = f"{named.parent / named.stem}-small"
    packed = small if written.is_dir() else f"{small}.safetensors"
    commands = {_PACK: _command("pack", written, packed)}
    if Path(model, CONFIG).is_file():
        commands[_SHRINK] = f"{_command('shrink', Path(model), small)} --intermediate 0.3"
    warnings = []
    for warning in report.warnings:
        message = warning.message
        for general, special in commands.items():
            message = message.replace(general, special)
        warnings.append(replace(warning, message=message))
    return replace(report, warnings=tuple(warnings))


def say_of_packed_folder(out: str | None) -> None:
    """Prints how to use a packed folder that from_pretrained would load if it were dense."""
    if out is not None and Path(out, CONFIG).is_file():
        say(
            f"note: from_pretrained cannot load the packed folder {out}: `secateur finalize {out} "
            "-o DENSE` makes it dense again, and secateur.load reads its tensors"
        )


def _command(name: str, path: Path, small: str) -> str:
    return f"secateur {name} {shlex.quote(str(path))} -o {shlex.quote(small)}"
