"""Names and globs of a rule's fields, matched with the tensors that the rule prunes."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from secateur_server.errors import InvalidSpec, UnknownTensor, quote
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.globs import matches

Value = TypeVar("Value")


def first_matches(
    context: RequestContext,
    path: str,
    patterns: Sequence[str],
    known: Mapping[str, str],
    field: Callable[[int], str],
) -> dict[str, int]:
    """Finds for each tensor the first name or glob that matches it.

    Args:
        context: The request.
        path: The path of the patterns, for errors about all of them.
        patterns: Names and globs.
        known: From every name of the rule's tensors to the tensor.
        field: Returns the path of a pattern, by its index.

    Returns:
        The index of a pattern for each tensor that has one.

    Raises:
        UnknownTensor: A pattern matches no tensor.
    """
    found = matches(context, path, patterns, known)
    if found.unmatched is not None:
        pattern = patterns[found.unmatched]
        raise UnknownTensor(
            field(found.unmatched), f"{quote(pattern)} matches no tensor that the rule prunes"
        )
    return found.first


def by_tensor(
    context: RequestContext, given: Mapping[str, Value], field: str, known: Mapping[str, str]
) -> dict[str, Value]:
    """Replaces any name of a tied tensor by the tensor's name in the state_dict.

    Args:
        context: The request.
        given: Values by any name of a tensor.
        field: The path of `given`.
        known: From every name of the rule's tensors to the tensor. Other names are unchanged.

    Returns:
        The values by the tensors' names.

    Raises:
        InvalidSpec: A tensor has two values, under two of its names.
    """
    found: dict[str, Value] = {}
    for name, value in context.each(given.items()):
        tensor = known.get(name, name)
        if found.setdefault(tensor, value) != value:
            raise InvalidSpec(
                f"{field}[{quote(name)}]",
                f"{quote(name)} is another name of {quote(tensor)}, which has its own; give one",
            )
    return found
