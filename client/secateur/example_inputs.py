"""The inputs of a module, as callers give them."""

from collections.abc import Mapping
from typing import Any


def arguments_of(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the positional and the keyword arguments of forward.

    Args:
        inputs: A tensor, a tuple or list of arguments, or a mapping of keywords.
    """
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), {}
