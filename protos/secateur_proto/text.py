"""JSON that is read a value at a time.

Of a text of others nobody knows what it spells: the objects that json makes of it at once can be 30
times as large as itself, and while it makes them no other thread runs.
"""

import json
import re
from collections.abc import Callable, Iterator
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any

# Of a value that is no map of others, and no string by itself.
_MOST_OF_VALUE = 16 << 10

_BLANK = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


class Text:
    """A text, from its begin to its end.  Errors: ValueError."""

    def __init__(self, text: str, decoder: json.JSONDecoder = _DECODER) -> None:
        self._text, self._at = text, 0
        self._decoder = decoder

    def keys(self, before_key: Callable[[], None] = lambda: None) -> Iterator[str]:
        """The keys of a map; behind each its value is to be taken.

        Args:
            before_key: Is called where a key may begin. It may take keys with their values, each
                with the comma behind it.
        """
        self._take("{")
        if self.next() == "}":
            self._take("}")
            return
        while True:
            before_key()
            key = self.string()
            self._take(":")
            yield key
            if self._take(",}") == "}":
                return

    def next(self) -> str:
        """The next character, which stays; empty at the end."""
        blank = _BLANK.match(self._text, self._at)
        assert blank, "it may be empty"
        self._at = blank.end()
        return self._text[self._at : self._at + 1]

    def take_all(self, pattern: re.Pattern[str]) -> Iterator[re.Match[str]]:
        """Takes what the pattern matches, again and again, from here on."""
        while found := pattern.match(self._text, self._at):
            self._at = found.end()
            yield found

    def string(self) -> str:
        """A string of any length."""
        self._take('"')
        text: str
        text, self._at = scanstring(self._text, self._at, True)
        return text

    def value(self) -> Any:
        """Any value of up to 16 KiB.  Errors: RecursionError as well."""
        self.next()
        part = self._text[self._at : self._at + _MOST_OF_VALUE]
        try:
            value, end = self._decoder.raw_decode(part)
        except json.JSONDecodeError:
            if len(part) == _MOST_OF_VALUE:
                raise ValueError(f"what stands at {self._at} is too long") from None
            raise
        self._at += end
        return value

    def end(self) -> None:
        """Checks that nothing is left."""
        if self.next():
            raise ValueError(f"there is more behind it, from {self._at} on")

    def _take(self, characters: str) -> str:
        found = self.next()
        if not found or found not in characters:
            raise ValueError(f"{' or '.join(characters)} is needed at {self._at}")
        self._at += 1
        return found
