"""Copies messages into dataclasses with fields of the same names."""

from collections.abc import Callable
from dataclasses import fields
from functools import cache
from typing import Any, TypeVar

Value = TypeVar("Value")

_SCALARS = (int, float, str)


def decoded(kind: Callable[..., Value], message: Any, **others: Any) -> Value:
    """Makes a dataclass of a message; lists become tuples.

    Args:
        kind: The dataclass.
        message: It has the fields that are not in `others`: numbers, texts and lists.
        others: Values of fields.
    """
    for name in _names(kind):
        if name not in others:
            value = getattr(message, name)
            others[name] = value if isinstance(value, _SCALARS) else tuple(value)
    return kind(**others)


@cache
def _names(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))
