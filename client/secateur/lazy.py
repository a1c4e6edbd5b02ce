"""Collections that decode parts of an answer when they are read: an answer may have very many."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Generic, TypeVar, overload

Value = TypeVar("Value")


class LazyMapping(Mapping[str, Value]):
    """Decoded messages by their names, in their order.

    Args:
        messages: Each has a different `name`.
        decode: Makes a value of a message.
    """

    def __init__(self, messages: Sequence[Any], decode: Callable[[Any], Value]) -> None:
        self._messages, self._decode = messages, decode
        self._values: dict[str, Value] = {}

    @cached_property
    def _by_name(self) -> dict[str, Any]:
        return {message.name: message for message in self._messages}

    def __getitem__(self, name: str) -> Value:
        if name not in self._values:
            self._values[name] = self._decode(self._by_name[name])
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._messages)

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> tuple[Any, ...]:
        """Makes a copy a plain dict."""
        return dict, (dict(self),)


class LazySequence(Sequence[Value], Generic[Value]):
    """Decoded messages, in their order; equal to a tuple of the same values.

    Args:
        messages: Messages of any type.
        decode: Makes a value of a message.
    """

    def __init__(self, messages: Sequence[Any], decode: Callable[[Any], Value]) -> None:
        self._messages, self._decode = messages, decode

    @cached_property
    def _values(self) -> tuple[Value, ...]:
        return tuple(map(self._decode, self._messages))

    @overload
    def __getitem__(self, index: int) -> Value: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Value, ...]: ...

    def __getitem__(self, index: int | slice) -> Value | tuple[Value, ...]:
        return self._values[index]

    def __iter__(self) -> Iterator[Value]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._messages)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, tuple | LazySequence):
            return self._values == tuple(other)
        return NotImplemented

    def __hash__(self) -> int:
        return hash(self._values)

    def __repr__(self) -> str:
        return repr(self._values)

    def __reduce__(self) -> tuple[Any, ...]:
        """Makes a copy a plain tuple."""
        return tuple, (self._values,)
