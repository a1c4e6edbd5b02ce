"""Limits on the length of lists in a request."""

from collections.abc import Sized

from secateur_server.errors import InvalidSpec


def check_length(field: str, items: Sized, most: int, what: str) -> None:
    """Refuses a list that is longer than a documented limit, before any work on it.

    Raises:
        InvalidSpec: Naming the field and the limit.
    """
    if len(items) > most:
        raise InvalidSpec(field, f"{len(items)} {what} are more than {most}; give fewer")
