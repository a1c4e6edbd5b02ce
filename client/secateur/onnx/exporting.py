"""Exports modules to ONNX through torch.onnx, and checks the file with onnxruntime."""

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from secateur.atomic import filling
from secateur.errors import SecateurError
from secateur.evaluation import arguments_of, brief, in_evaluation, logged_from
from secateur.onnx.files import ONNX_SUFFIX
from secateur.paths import path_of
from secateur.tensors import torch_for

# The packages of the extra `onnx`.
_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
# The largest difference of two runs, relative to the largest output.
_TOLERANCE = 1e-4
_HALF_TOLERANCE = 1e-2


def export(
    module: Any,
    example_inputs: Any,
    path: str | os.PathLike[str],
    dynamic_shapes: Any = None,
) -> None:
    """Writes a module as an .onnx file, and checks that onnxruntime computes what the module does.

    The module is exported in evaluation mode, and keeps its own mode. A model above 2 GB gets its
    weights in a file beside it, PATH.data. The files are written whole, or not at all.

    Args:
        module: A torch.nn.Module, on the CPU.
        example_inputs: A tensor, a tuple of arguments, or a mapping of keywords. Both runs of the
            check get them.
        path: The .onnx file.
        dynamic_shapes: The dimensions that may differ from those of the example inputs, as
            torch.onnx.export takes them, such as {"input_ids": {0: "batch", 1: "sequence"}}.

    Raises:
        SecateurError: It cannot be exported or written, or the outputs differ.
    """
    export_checked(module, [example_inputs], path, dynamic_shapes)


def export_checked(
    module: Any, checked: Sequence[Any], path: str | os.PathLike[str], dynamic_shapes: Any
) -> None:
    """Does `export` with the first example inputs, and checks the outputs of all."""
    to = path_of(path)
    check_exportable(to)
    if not isinstance(module, torch_for("export").nn.Module):
        raise SecateurError(f"export takes a torch.nn.Module, not {type(module).__name__}")
    try:
        with _quiet(), in_evaluation(module), filling(to.parent) as made:
            program = _program(module, *arguments_of(checked[0]), dynamic_shapes)
            program.save(made / to.name)
            _check(program, module, made / to.name, checked)
            program.release()
    except OSError as error:
        raise SecateurError(f"{to}: cannot write it: {error.strerror}") from None
    except _Failed as error:
        raise SecateurError(f"{to}: {error}") from error.__cause__


class _Failed(Exception):
    """An export that failed; the message does not name the file."""


def check_exportable(path: Path) -> None:
    """Refuses early what `export` would refuse.

    Raises:
        SecateurError: The path is not one of a new .onnx file, or a package is missing.
    """
    if path.suffix == ".gguf":
        raise SecateurError(
            f"{path}: GGUF is not written here; convert the folder with llama.cpp: "
            "convert_hf_to_gguf.py FOLDER --outfile FILE.gguf"
        )
    if path.suffix != ONNX_SUFFIX or path.is_dir():
        raise SecateurError(f"{path}: is not the name of an .onnx file; give one: FILE.onnx")
    if not path.absolute().parent.is_dir():
        raise SecateurError(f"{path}: no such folder exists")
    torch_for("export")
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise SecateurError(f"export needs {', '.join(missing)}: pip install 'secateur[onnx]'")


@contextmanager
def _quiet() -> Iterator[None]:
    """Drops what torch logs and warns of while it exports."""
    with warnings.catch_warnings(), logged_from("torch.onnx", logging.ERROR):
        warnings.simplefilter("ignore")
        yield


def _program(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> Any:
    import torch

    try:
        return torch.onnx.export(
            module, args, kwargs=kwargs, dynamic_shapes=dynamic_shapes, dynamo=True, verbose=False
        )
    except Exception as error:  # the module is any code
        raise _Failed(
            f"torch.onnx cannot export the module: {brief(error.__cause__ or error)}"
        ) from error


def _check(program: Any, module: Any, path: Path, checked: Sequence[Any]) -> None:
    """Compares the outputs of a file in onnxruntime with the module's."""
    import onnxruntime
    import torch
    from torch.utils._pytree import tree_leaves

    for inputs in checked:
        args, kwargs = arguments_of(inputs)
        try:
            with torch.no_grad():
                expected = [x for x in tree_leaves(module(*args, **kwargs)) if torch.is_tensor(x)]
            program.initialize_inference_session(lambda _: onnxruntime.InferenceSession(path))
            found = program(*args, **kwargs)
        except Exception as error:  # the module is any code; onnxruntime raises errors of any kind
            raise _Failed(f"cannot compare it with the module: {brief(error)}") from error
        if len(found) != len(expected):
            raise _Failed(f"the export has {len(found)} outputs, the module {len(expected)}")
        for place, (one, other) in enumerate(zip(found, expected, strict=True)):
            _compare(place, one, other)


def _compare(place: int, found: Any, expected: Any) -> None:
    import torch

    if found.shape != expected.shape:
        raise _Failed(
            f"output {place} has shape {list(found.shape)} in onnxruntime, and "
            f"{list(expected.shape)} in torch"
        )
    tolerance = _HALF_TOLERANCE if expected.dtype.itemsize == 2 else _TOLERANCE
    found, expected = found.double(), expected.double()
    largest = expected.abs().nan_to_num(0, 0).max().item() if expected.numel() else 0.0
    if not torch.allclose(found, expected, rtol=0, atol=tolerance * largest, equal_nan=True):
        difference = (found - expected).abs().nan_to_num(float("inf")).max().item()
        raise _Failed(
            f"output {place} differs by {difference:.3g} between onnxruntime and torch; its "
            f"largest value is {largest:.3g}; the module computes something that torch.onnx "
            "does not export faithfully"
        )
