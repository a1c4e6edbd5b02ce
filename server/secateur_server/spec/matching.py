"""Names and globs of a rule's fields, matched with the tensors that the rule prunes.

`known` maps every name of these tensors to the tensor: tied tensors have several.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from secateur_server.errors import InvalidSpec, UnknownTensor, quote
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.catalog import Catalog, Stored
from secateur_server.state_dict.globs import matches

Value = TypeVar("Value")


def first_matches(
    context: RequestContext,
    path: str,
    patterns: Sequence[str],
    known: Mapping[str, str],
    field: Callable[[int], str],
) -> dict[str, int]:
    """Finds for each tensor the index of the first name or glob that matches it.

    Args:
        context: The request.
        path: The path of the patterns, for errors about all of them.
        patterns: Names and globs.
        known: The tensors of the rule.
        field: Returns the path of a pattern, by its index.

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


def not_pruned(field: str, what: str) -> UnknownTensor:
    """The error for a value of a tensor or group that the rule does not prune."""
    return UnknownTensor(field, f"the rule does not prune this {what}")


def extra_of(field: str, holder: str, catalog: Catalog) -> Stored:
    """Returns the uploaded tensor that a field names.

    Raises:
        UnknownTensor: The data does not have it.
    """
    if holder not in catalog.extras:
        raise UnknownTensor(field, f"the data does not have the tensor {quote(holder)}; send it")
    return catalog.extras[holder]


def by_tensor(
    context: RequestContext, given: Mapping[str, Value], field: str, known: Mapping[str, str]
) -> dict[str, Value]:
    """Replaces any name of a tied tensor by its name in the state_dict.

    Args:
        context: The request.
        given: Values by any name of a tensor. Unknown names are kept.
        field: The path of `given`.
        known: The tensors of the rule.

    Raises:
        InvalidSpec: Two names of one tensor have different values.
    """
    found: dict[str, Value] = {}
    first: dict[str, str] = {}
    for name, value in context.each(given.items()):
        tensor = known.get(name, name)
        first.setdefault(tensor, name)
        if found.setdefault(tensor, value) != value:
            raise InvalidSpec(
                f"{field}[{quote(name)}]",
                f"{quote(name)} is another name of {quote(first[tensor])}, which has its own; give "
                "one",
            )
    return found
