"""Modules in evaluation, on example inputs as callers give them."""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# The characters of another library's error.
_MOST_SHOWN = 300


def arguments_of(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the positional and the keyword arguments of forward.

    Args:
        inputs: A tensor, a tuple or list of arguments, or a mapping of keywords.
    """
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), {}


@contextmanager
def in_evaluation(*modules: Any) -> Iterator[None]:
    """Puts modules in evaluation, layer by layer, and restores the mode of each layer."""
    training = [(part, part.training) for module in modules for part in module.modules()]
    for part, _ in training:  # a module's own eval() may do more
        part.training = False
    try:
        yield
    finally:
        for part, is_training in training:
            part.training = is_training


@contextmanager
def uncompiled() -> Iterator[None]:
    """Runs compiled modules as they were written: compiled code runs no hooks that are new."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with sys.modules["torch"].compiler.set_stance("force_eager"):
        yield


@contextmanager
def logged_from(name: str, level: int) -> Iterator[None]:
    """Drops what a logger logs below a level, and restores its own level."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


def brief(error: BaseException) -> str:
    """Returns the first line of an error of a module, or of another library."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:_MOST_SHOWN]
