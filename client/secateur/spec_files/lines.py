"""Finds the lines of a YAML file that fields come from."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError
from secateur.spec import Spec

# A part of the path of a field: a name, an index, or a key such as ['fc.*'].
_PART = re.compile(r"\.?(?:(\w+)|\[(\d+)\]|\[(?:'([^']*)'|\"([^\"]*)\")\])")
# Parts of the server's paths that a file does not have.
_MESSAGES = ("spec", "selection", "solver", "custom_masks")
# Fields of messages that have other names in files.
_RENAMED: dict[str | int, str] = {
    **dict.fromkeys(("fraction", "count", "threshold", "bytes", "macs", "table"), "amount"),
    **{"pattern": "granularity", "block": "granularity"},
}
# The end of an error about a key of a mapping: "lamp: 'tensor' is not an argument".
_KEY = re.compile(r"[\w.$]*(?:: )?'([^']*)' is not a")


@dataclass(frozen=True)
class Lines:
    """Where each field of a file is.

    Attributes:
        path: The file.
        data: Its content: what ruamel.yaml has read, with the lines of all fields; or plain data,
            which has no lines.
    """

    path: Path
    data: Any

    def place(self, field: str) -> str:
        """Returns "FILE:LINE" of a field, or of the nearest one around it; of JSON "FILE".

        Args:
            field: The path of the field, such as "rules[1].amount"; an error may follow it.
        """
        node, line, rest = self.data, 1, field
        while part := _PART.match(rest) if _marks(node) else None:
            key, found = _entry(node, part)
            if found is None and key not in _MESSAGES:
                break
            rest = rest[part.end() :]
            if found is not None:
                node, line = node[key], found
        if wrong := _KEY.match(rest):
            line = _marks(node).get(wrong[1], line)
        return f"{self.path}:{line}" if _marks(self.data) else str(self.path)


def _entry(node: Any, part: re.Match[str]) -> tuple[str | int, int | None]:
    """The key of an entry of a mapping or a list, and its line."""
    name, index, *quoted = part.groups()
    named = [text for text in (name, *quoted) if text is not None]
    key: str | int = named[0] if named else int(index)
    marks = _marks(node)
    if key not in marks:
        key = _RENAMED.get(key, key)
    return key, marks.get(key)


def _marks(node: Any) -> dict[str | int, int]:
    """The lines of the entries of a mapping or a list; empty for all else."""
    mark = getattr(node, "lc", None)
    return {key: at[0] + 1 for key, at in (mark.data or {}).items()} if mark else {}


@contextmanager
def placed_errors(spec: Spec) -> Iterator[None]:
    """Begins errors about a rule that was read from a file with the rule's place in it."""
    try:
        yield
    except SecateurError as error:
        found = _RULE.match(str(error))
        rule = spec.rules[int(found[1])] if found and int(found[1]) < len(spec.rules) else None
        if found and rule and rule.place:
            error.args = (f"{rule.place(found[2])}: {error}",)
        raise


# The field at fault in an error of the client or the server.
_RULE = re.compile(r"(?:spec\.)?rules\[(\d+)\](.*)", re.S)
