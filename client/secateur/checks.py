"""Puts a caller's arguments into the fields of messages.

Refused here is only what a field cannot carry: the server checks everything else before it receives
the model. Fractions are the exception: `Spec.at` computes with them.

Every function raises InvalidSpec, with a message that begins with the argument's name.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from decimal import Decimal
from difflib import get_close_matches
from inspect import Parameter, signature
from numbers import Integral, Real
from typing import Any, TypeVar

from secateur.errors import InvalidSpec, SecateurError
from secateur.tensors import is_text
from secateur_proto.sizes import byte_count

Made = TypeVar("Made")
Value = TypeVar("Value")

UINT32, UINT64 = 1 << 32, 1 << 64
_MOST_SHOWN = 60
_LONGEST_SECONDS = 1e9  # the clocks of threads and of gRPC overflow somewhere above


def shown(value: Any) -> str:
    """Returns the repr of a value for an error, or the beginning of a long one and its type."""
    text = " ".join(repr(value).split())
    if len(text) <= _MOST_SHOWN:
        return text
    return f"{text[:_MOST_SHOWN]}... ({type(value).__name__})"


def patterns(names: Any, field: str = "tensors") -> list[str]:
    """Returns a name, a glob, or a list of them as a list."""
    listed = [names] if isinstance(names, str) else names
    if not isinstance(listed, Sequence) or not listed or not all(map(is_text, listed)):
        advice = (
            "; give names such as 'fc.weight'; pass the model to client.prune"
            if _has_module(names)
            else ""
        )
        raise InvalidSpec(f"{field}: {shown(names)} is not a name, a glob, or a list{advice}")
    return list(listed)


def _has_module(names: Any) -> bool:
    """Whether it is what torch.nn.utils.prune takes: a Module, or pairs of one and a name."""
    listed = names if isinstance(names, list | tuple) else [names]
    pairs = (pair if isinstance(pair, tuple) else (pair,) for pair in listed)
    return any(hasattr(part, "named_parameters") for pair in pairs for part in pair)


def text(field: str, value: Any) -> str:
    """Returns a str that UTF-8 can spell."""
    if not is_text(value):
        raise InvalidSpec(f"{field}: {shown(value)} is not text")
    return str(value)


def text_keys(field: str, value: Any, of: str) -> Mapping[str, Any]:
    """Returns a mapping whose keys are text.

    Args:
        field: The argument's name.
        value: The argument.
        of: What the mapping has, for the error: "names to arrays".
    """
    if not isinstance(value, Mapping) or not all(map(is_text, value)):
        raise InvalidSpec(f"{field}: {shown(value)} is not a mapping from {of}")
    return value


def integer(field: str, value: Any, low: int = 0, end: int = UINT64) -> int:
    """Returns an int in [low, end)."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) < end:
        raise InvalidSpec(f"{field}: {shown(value)} is not an int in [{low}, {end})")
    return int(value)


def integers(field: str, values: Any) -> list[int]:
    """Returns ints in [0, 2^64) as a list."""
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise InvalidSpec(f"{field}: {shown(values)} is not a list of ints")
    return [integer(f"{field}[{index}]", value) for index, value in enumerate(values)]


def pair(field: str, value: Any) -> tuple[int, int]:
    """Returns two integers, 0 or more and below 2^32.

    Raises:
        InvalidSpec: The value is something else.
    """
    found = [] if isinstance(value, str) else integers(field, value)
    if len(found) != 2 or max(found) >= UINT32:
        raise InvalidSpec(f"{field}: {shown(value)} is not a pair such as (2, 4)")
    return found[0], found[1]


def dimension(dim: Any, field: str = "dim") -> int:
    """Returns a dimension as an int of 32 bits."""
    return integer(field, dim, -(1 << 31), 1 << 31)


def number(field: str, value: Any) -> float:
    """Returns a number as a double; infinities and NaN are doubles too."""
    found = _double(value)
    if found is None:
        raise InvalidSpec(f"{field}: {shown(value)} is not a number")
    return found


def _double(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def fraction(field: str, value: Any) -> float:
    """Returns a number in [0, 1]; a text such as "50%" is 0.5."""
    share = percentage(value) if isinstance(value, str) else None
    if share is None and isinstance(value, str):
        raise InvalidSpec(f"{field}: {shown(value)} is neither a number nor a percentage as '50%'")
    found = number(field, value) if share is None else share
    if not 0.0 <= found <= 1.0:
        advice = f"; if it is in percent, give '{found:g}%'" if 2 <= found <= 100 else ""
        raise InvalidSpec(f"{field}: {value} is outside [0, 1]{advice}")
    return found


def percentage(text: str) -> float | None:
    """Returns 0.5 for the text "50%", and None for text that is not a percentage."""
    found = re.fullmatch(r"(\d{1,20}(?:\.\d{1,20})?) ?%", text, re.ASCII)
    return float(Decimal(found[1]) / 100) if found else None


def size(field: str, value: Any) -> int:
    """Returns a number of bytes; it may be text such as "5GB" or "512MiB"."""
    if not isinstance(value, str):
        return integer(field, value)
    try:
        return integer(field, byte_count(value))
    except ValueError as error:
        raise InvalidSpec(f"{field}: {error}") from None


def timeout_of(value: Any) -> float | None:
    """Returns a number of seconds, or None for no limit.

    Raises:
        SecateurError: It is neither.
    """
    if value is None:
        return None
    found = _double(value)
    if found is None or not 0 < found < math.inf:
        raise SecateurError(f"timeout={shown(value)} is not a number of seconds above 0, or None")
    return min(found, _LONGEST_SECONDS)


def flag(field: str, value: Any) -> bool:
    """Returns a bool."""
    if not isinstance(value, bool):
        raise InvalidSpec(f"{field}: {shown(value)} is neither True nor False")
    return value


def one_of(field: str, value: Any, known: Mapping[str, Value]) -> Value:
    """Returns the entry of `known` that a name stands for."""
    if not isinstance(value, str) or value not in known:
        near = nearest(value, known)
        raise InvalidSpec(f"{field}: {shown(value)} is none of {', '.join(known)}{near}")
    return known[value]


def nearest(name: Any, known: Iterable[str]) -> str:
    """Returns advice for a misspelled name, or nothing if no known one is like it."""
    near = get_close_matches(name, known, 1) if isinstance(name, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""


def made(field: str, value: Any, kind: type[Made], make: Callable[..., Made]) -> Made:
    """Returns `value` if it is a `kind`, or calls `make` with a mapping of its arguments."""
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise InvalidSpec(f"{field}: {shown(value)} is not a mapping of arguments")
    if problem := mismatch(make, value):
        raise InvalidSpec(f"{field}: {problem}")
    try:
        return make(**value)
    except InvalidSpec as error:
        raise InvalidSpec(f"{field}.{error}") from None


def mismatch(make: Callable[..., Any], given: Collection[Any]) -> str | None:
    """Says which arguments of a function are unknown or missing; None if they fit."""
    known = signature(make).parameters
    for name in given:
        if name not in known:
            there_are = ", ".join(known) or "none"
            return f"{name!r} is not an argument; there are {there_are}{nearest(name, known)}"
    missing = [
        repr(name)
        for name, parameter in known.items()
        if parameter.default is Parameter.empty and name not in given
    ]
    return f"{', '.join(missing)} is missing" if missing else None


def chosen(
    field: str, value: Any, kind: type[Made], functions: Mapping[str, Callable[..., Made]]
) -> Made:
    """Returns a `kind`, given itself, by a function's name, or as {name: arguments}."""
    if isinstance(value, kind):
        return value
    is_map = isinstance(value, Mapping) and len(value) == 1
    name, arguments = next(iter(value.items())) if is_map else (value, {})
    return made(f"{field}.{name}", arguments, kind, one_of(field, name, functions))
