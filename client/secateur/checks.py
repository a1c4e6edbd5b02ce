"""What an argument of a spec has to be.  Errors: InvalidSpec, which begins with its name."""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from decimal import Decimal
from inspect import Parameter, signature
from numbers import Integral, Real
from typing import Any, TypeVar

from secateur.errors import InvalidSpec, SecateurError
from secateur.tensors import is_text
from secateur_proto import spec_pb2 as pb
from secateur_proto.sizes import byte_count

Made = TypeVar("Made")
Value = TypeVar("Value")

UINT64 = 1 << 64
_MOST_SHOWN = 60
_LONGEST_SECONDS = 1e9  # clocks of threads and of gRPC end somewhere beyond


def shown(value: Any) -> str:
    """A value in an error: its repr, or the beginning of a long one and the value's type."""
    text = " ".join(repr(value).split())
    if len(text) <= _MOST_SHOWN:
        return text
    return f"{text[:_MOST_SHOWN]}... ({type(value).__name__})"


def patterns(names: Any, field: str = "tensors") -> list[str]:
    """A name, a glob, or a list of them."""
    listed = [names] if isinstance(names, str) else names
    if not isinstance(listed, Sequence) or not listed or not all(map(is_text, listed)):
        advice = (
            "; give names such as 'fc.weight'; the model goes to client.prune"
            if _has_module(names)
            else ""
        )
        raise InvalidSpec(f"{field}: {shown(names)} is no name, glob, or list of them{advice}")
    return list(listed)


def _has_module(names: Any) -> bool:
    """Whether it is what torch.nn.utils.prune takes: a Module, or pairs of one and a name."""
    listed = names if isinstance(names, list | tuple) else [names]
    pairs = (pair if isinstance(pair, tuple) else (pair,) for pair in listed)
    return any(hasattr(part, "named_parameters") for pair in pairs for part in pair)


def integer(field: str, value: Any, low: int, end: int) -> int:
    """An int in [low, end)."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) < end:
        raise InvalidSpec(f"{field}: {shown(value)} is no int in [{low}, {end})")
    return int(value)


def integers(field: str, values: Any) -> list[int]:
    """Ints in [0, 2^64), at least one."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InvalidSpec(f"{field}: {shown(values)} is no list of ints")
    found = [integer(f"{field}[{i}]", value, 0, UINT64) for i, value in enumerate(values)]
    if not found:
        raise InvalidSpec(f"{field}: at least one is needed")
    return found


def dimension(dim: Any) -> int:
    """A dimension; which there are, only the tensor tells."""
    return integer("dim", dim, -(1 << 31), 1 << 31)


def real(field: str, value: Any) -> float:
    """A number, which may be infinite."""
    found = _double(value)
    if found is None or math.isnan(found):
        raise InvalidSpec(f"{field}: {shown(value)} is no number")
    return found


def _double(value: Any) -> float | None:
    """A number as the wire has it; None where it is none, or beyond the doubles."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def fraction(field: str, value: Any) -> float:
    """A number in [0, 1], or a text such as "50%"."""
    share = percentage(value) if isinstance(value, str) else None
    found = real(field, value) if share is None else share
    if not 0.0 <= found <= 1.0:
        raise InvalidSpec(f"{field}: {value} is no fraction in [0, 1]")
    return found


def percentage(text: str) -> float | None:
    """The number that a text such as "50%" stands for, here 0.5; None for any other text."""
    found = re.fullmatch(r"(\d{1,20}(?:\.\d{1,20})?) ?%", text, re.ASCII)
    return float(Decimal(found[1]) / 100) if found else None


def size(field: str, value: Any) -> int:
    """A number of bytes, or a text such as "5GB" or "512MiB"."""
    if not isinstance(value, str):
        return integer(field, value, 0, UINT64)
    try:
        return integer(field, byte_count(value), 0, UINT64)
    except ValueError as error:
        raise InvalidSpec(f"{field}: {error}") from None


def timeout_of(value: Any) -> float | None:
    """A number of seconds, or None for no end.  Errors: SecateurError."""
    if value is None:
        return None
    found = _double(value)
    if found is None or not 0 < found < math.inf:
        raise SecateurError(f"timeout={shown(value)} is not a number of seconds above 0, or None")
    return min(found, _LONGEST_SECONDS)


def flag(field: str, value: Any) -> bool:
    """A bool."""
    if not isinstance(value, bool):
        raise InvalidSpec(f"{field}: {shown(value)} is neither True nor False")
    return value


def one_of(field: str, value: Any, known: Mapping[str, Value]) -> Value:
    """What a string stands for."""
    if not isinstance(value, str) or value not in known:
        raise InvalidSpec(f"{field}: {shown(value)} is none of {', '.join(known)}")
    return known[value]


def norm(field: str, n: Any) -> pb.Magnitude:
    """A number, "fro" or "nuc", as the wire has it."""
    if isinstance(n, str) and n in ("fro", "nuc"):
        kinds = {"fro": pb.MATRIX_NORM_FROBENIUS, "nuc": pb.MATRIX_NORM_NUCLEAR}
        return pb.Magnitude(matrix_norm=kinds[n])
    if (p := _double(n)) is not None:
        return pb.Magnitude(p=p)
    raise InvalidSpec(f"{field}: {shown(n)} is no number, 'fro' or 'nuc'")


def made(field: str, value: Any, kind: type[Made], make: Callable[..., Made]) -> Made:
    """One of a kind by itself, or what `make` makes of a map of its arguments."""
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise InvalidSpec(f"{field}: {shown(value)} is no map of arguments")
    if problem := mismatch(make, value):
        raise InvalidSpec(f"{field}: {problem}")
    try:
        return make(**value)
    except InvalidSpec as error:
        raise InvalidSpec(f"{field}.{error}") from None


def mismatch(make: Callable[..., Any], given: Collection[Any]) -> str | None:
    """What is wrong with the names of a function's arguments; None where nothing is."""
    known = signature(make).parameters
    needed = [name for name, known_as in known.items() if known_as.default is Parameter.empty]
    for name in given:
        if name not in known:
            return f"{name!r} is not an argument; there are {', '.join(known) or 'none'}"
    missing = [name for name in needed if name not in given]
    return f"{', '.join(map(repr, missing))} is missing" if missing else None


def chosen(
    field: str, value: Any, kind: type[Made], functions: Mapping[str, Callable[..., Made]]
) -> Made:
    """One of a kind by itself, by a function's name, or by a map from that to its arguments."""
    if isinstance(value, kind):
        return value
    is_map = isinstance(value, Mapping) and len(value) == 1
    name, arguments = next(iter(value.items())) if is_map else (value, {})
    return made(f"{field}.{name}", arguments, kind, one_of(field, name, functions))
