"""Entries of a state_dict for which safetensors has no dtype: they are kept here, and not sent."""

from collections.abc import Iterable, Mapping
from typing import Any

from secateur.errors import InvalidSpec, InvalidStateDict
from secateur.tables import listed
from secateur.tensors import LocalTensor, dtype_of

# The names that an error lists.
_SHOWN = 3
# Advice for check_storable.
LEAVE_OUT = "leave them out of the source"


def check_names(field: str, names: Iterable[str], others: Mapping[str, Any]) -> None:
    """Refuses the name of an entry that is not sent.

    Raises:
        InvalidSpec: Naming it.
    """
    for name in names:
        if name in others:
            raise InvalidSpec(
                f"{field}: {name} cannot be pruned or measured: safetensors has no dtype for "
                f"{dtype_of(others[name])}, so it is not sent"
            )


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
        raise InvalidStateDict(
            f"{where}: a safetensors file cannot hold {listed(left_out, _SHOWN)}; {advice}"
        )
