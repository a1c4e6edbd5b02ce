"""Where a result is written: a URI that the server opens, or a new folder here."""

from pathlib import Path
from typing import Any

from secateur.architectures.folder import fitted_folder
from secateur.errors import SecateurError
from secateur.files import check_holds, check_new_folder, warn_of_rest
from secateur.model import Source
from secateur.others import LEAVE_OUT, check_storable
from secateur.paths import path_of


def new_folder(destination: Any, model: Source, output: str) -> Path | None:
    """Returns the folder here that a caller gives as destination; None for a URI.

    Args:
        destination: What the caller gives.
        model: The source.
        output: One that has the whole model.

    Raises:
        SecateurError: It cannot be made, or the model is not from a folder.
    """
    if destination is None or (isinstance(destination, str) and "://" in destination):
        return None
    path = path_of(destination)
    check_new_folder(path)
    if model.folder is None:
        raise SecateurError(
            f"destination={str(path)!r}: a folder is made for a model from a local folder only; "
            "call the result's save()"
        )
    if output == "shrunk":
        fitted_folder(model.folder, model.tensors)  # refuses an unknown architecture early
    check_holds(path, model.tensors, model.index, model.folder, output == "packed")
    return path


def check_destination(destination: str | None, model: Source) -> None:
    """Refuses a model that a file at a URI cannot hold, and warns of content that it drops."""
    if destination:
        check_storable(destination, model.others, LEAVE_OUT)
        warn_of_rest(destination, model.onnx_file or model.torch_file)
