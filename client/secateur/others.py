"""Entries of a state_dict that safetensors has no dtype for: they are not sent, but carried."""

from collections.abc import Iterable, Mapping
from typing import Any

from secateur.errors import InvalidSpec, InvalidStateDict
from secateur.spec import Rule, Spec
from secateur.tensors import LocalTensor, dtype_of


def check_spec(spec: Spec, others: Mapping[str, Any]) -> None:
    """Refuses a rule that names an entry that is not sent.  Raises: InvalidSpec."""
    for index, rule in enumerate(spec.rules):
        check_names(f"rules[{index}]", _names(rule), others)


def check_names(field: str, names: Iterable[str], others: Mapping[str, Any]) -> None:
    """Refuses the name of an entry that is not sent.  Raises: InvalidSpec."""
    for name in names:
        if name in others:
            raise InvalidSpec(
                f"{field}: {name} cannot be pruned or measured: safetensors has no dtype for "
                f"{dtype_of(others[name])}, so it is not sent"
            )


def _names(rule: Rule) -> set[str]:
    """The names and globs of the tensors that a rule prunes, or ranks by."""
    selection = rule.message.selection
    members = {member.tensor for group in selection.groups for member in group.members}
    scales = {*selection.scales, *selection.scales.values()}
    return {*rule.arrays, *selection.tensors, *scales, *members}


def check_storable(where: str, entries: Mapping[str, Any], advice: str) -> None:
    """Refuses to make a safetensors file of a model with entries that it cannot hold.

    Raises:
        InvalidStateDict: Some entries are not a LocalTensor.
    """
    left_out = [
        f"{name} ({dtype_of(value)})"
        for name, value in entries.items()
        if not isinstance(value, LocalTensor)
    ]
    if left_out:
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        raise InvalidStateDict(
            f"{where}: a safetensors file cannot hold {', '.join(left_out[:3])}{more}; {advice}"
        )
