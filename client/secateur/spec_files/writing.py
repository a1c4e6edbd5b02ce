"""Writes specs to files."""

import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from secateur.atomic import replacing
from secateur.errors import InvalidSpec, SecateurError
from secateur.paths import path_of
from secateur.spec_files.reading import yaml_package

_YAML = (".yaml", ".yml")
# The names of methods and of their arguments are such words.
_WORD = re.compile(r"[a-z]\w*", re.ASCII)


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
    package = yaml_package(path)
    yaml = package.YAML()
    yaml.default_flow_style = None  # the innermost lists and maps are in one line
    yaml.width = 100
    out = io.StringIO()
    yaml.dump(_quoted(table, package.scalarstring.DoubleQuotedScalarString), out)
    return out.getvalue()


def _quoted(value: Any, quote: Callable[[str], str]) -> Any:
    """Plain data with all text but plain words in quotes, which ruamel.yaml sometimes forgets."""
    if isinstance(value, dict):
        return {_quoted(key, quote): _quoted(of, quote) for key, of in value.items()}
    if isinstance(value, list):
        return [_quoted(of, quote) for of in value]
    return quote(value) if isinstance(value, str) and not _WORD.fullmatch(value) else value
