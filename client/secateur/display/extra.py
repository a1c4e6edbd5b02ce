"""Imports the packages of the extra `notebook`."""

import importlib
from typing import Any

from secateur.errors import SecateurError


def extra(what: str, module: str) -> Any:
    """Imports a module.

    Args:
        what: What needs it, for the error.
        module: Its name.

    Raises:
        SecateurError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        advice = "pip install 'secateur[notebook]'"
        raise SecateurError(f"{what} needs {module.split('.')[0]}: {advice} ({error})") from None
