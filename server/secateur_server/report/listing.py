"""Lists of names in messages for people."""

from collections.abc import Sequence

from secateur_server.errors import quote

# The most names in a message.
SHOWN = 3


def listed(names: Sequence[str]) -> str:
    """Returns the first names, quoted, and how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(map(quote, names[:SHOWN])) + (f" and {more:,} more" if more > 0 else "")
