"""Arrays that a caller gives in memory, or as the path of a file of them."""

import os
from typing import Any

from secateur.checks import text_keys
from secateur.errors import InvalidSpec, InvalidStateDict
from secateur.mask_files import read_arrays
from secateur.paths import source_path
from secateur.spec import Arrays

AnyArrays = Arrays | str | os.PathLike[str]


def arrays_of(field: str, value: Any) -> dict[str, Any]:
    """Returns the arrays of an argument, by the names of the tensors that they are for.

    Args:
        field: The argument's name.
        value: A mapping, or a path: .safetensors, a torch file, or .npz.

    Raises:
        InvalidSpec: It is neither, or the file cannot be read.
    """
    if not isinstance(value, str | os.PathLike):
        return dict(text_keys(field, value, "names to arrays"))
    try:
        return dict(read_arrays(source_path(value, InvalidStateDict)))
    except InvalidStateDict as error:
        raise InvalidSpec(f"{field}: {error}") from None


def files_of(field: str, value: Any) -> dict[str, Any]:
    """Returns an argument as a spec file has it, if it is the path of a file; else nothing."""
    return {field: os.fspath(value)} if isinstance(value, str | os.PathLike) else {}
