"""Checks the paths that callers give."""

import os
import stat
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError


def path_of(value: Any, kind: type[SecateurError] = SecateurError) -> Path:
    """Returns the path that a caller gives.

    Args:
        value: A str or an os.PathLike.
        kind: The error to raise.

    Raises:
        SecateurError: It is not a path, or not one that this system can look at.
    """
    if not isinstance(value, str | os.PathLike):
        raise kind(f"a path is a str or an os.PathLike, not {type(value).__name__}")
    if not str(value):  # Path takes it for the current folder
        raise kind("a path is empty")
    try:
        path = Path(value)
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, ValueError, TypeError) as error:  # for example, a name that is too long
        raise kind(f"{value}: {getattr(error, 'strerror', None) or error}") from None
    return path


def source_path(value: Any, kind: type[SecateurError]) -> Path:
    """Returns the path of a file or a folder to read; opening a pipe could block for ever.

    Raises:
        SecateurError: As path_of does, or it is neither a file nor a folder.
    """
    path = path_of(value, kind)
    if path.exists() and stat.S_IFMT(path.stat().st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
        raise kind(f"{path}: is neither a file nor a folder")
    return path
