"""Commands that make smaller what a command wrote, with the paths of this model."""

import shlex
from dataclasses import replace
from pathlib import Path

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
    commands = {}
    if out not in (None, "-") and "://" not in str(out):
        commands[_PACK] = _command("pack", Path(str(out)))
    if Path(model).is_dir():
        commands[_SHRINK] = f"{_command('shrink', Path(model))} --intermediate 0.3"
    warnings = []
    for warning in report.warnings:
        message = warning.message
        for general, special in commands.items():
            message = message.replace(general, special)
        warnings.append(replace(warning, message=message))
    return replace(report, warnings=tuple(warnings))


def _command(name: str, path: Path) -> str:
    suffix = "" if path.is_dir() else ".safetensors"
    named = path.resolve() if path.name in ("", "..") else path  # "." has no name
    small = named.parent / f"{named.stem}-small{suffix}"
    return f"secateur {name} {shlex.quote(str(path))} -o {shlex.quote(str(small))}"
