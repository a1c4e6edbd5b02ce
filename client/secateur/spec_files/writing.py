"""Writes specs to files."""

import io
import json
import os
from pathlib import Path
from typing import Any

from secateur.atomic import replacing
from secateur.errors import InvalidSpec, SecateurError
from secateur.paths import path_of
from secateur.spec_files.reading import yaml_package

_YAML = (".yaml", ".yml")


def write_spec(path: str | os.PathLike[str], table: dict[str, Any]) -> None:
    """Writes a spec in plain data; see Spec.save."""
    file = path_of(path)
    text = _text(file, table)
    try:
        with replacing(file) as out:
            out.write(text.encode())
    except OSError as error:
        raise SecateurError(f"{file}: cannot write it: {error.strerror}") from None


def _text(path: Path, table: dict[str, Any]) -> str:
    if path.suffix == ".json":
        return json.dumps(table, indent=2, ensure_ascii=False) + "\n"
    if path.suffix not in _YAML:
        known = ", ".join((*_YAML, ".json"))
        raise InvalidSpec(f"{path}: unknown suffix {path.suffix!r} of a spec; known are {known}")
    yaml = yaml_package(path).YAML()
    # Lists of numbers and names are short in one line.
    yaml.default_flow_style = None
    yaml.width = 100
    out = io.StringIO()
    yaml.dump(table, out)
    return out.getvalue()
