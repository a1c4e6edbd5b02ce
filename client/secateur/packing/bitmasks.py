"""The bitmask layouts of compressed-tensors, whose releases up to 0.14.0.1 read them.

A weight X.weight becomes X.shape, X.compressed (its values other than zero), X.bitmask (bits of
rows, the lowest first) and, in sparse-bitmask, X.row_offsets (the kept values before each row). In
sparse-24-bitmask each 4 consecutive elements keep exactly 2. The sign of -0.0 is not kept.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from secateur.errors import SecateurError
from secateur.files import save
from secateur.folders import Folder
from secateur.model import Source
from secateur.tensors import Bytes, LocalTensor
from secateur_proto.framing import mask_bytes, tensor_bytes

Bools = npt.NDArray[np.bool_]
Tensors = Mapping[str, LocalTensor]

_UNSIGNED: Mapping[str, np.dtype[Any]] = {
    "F16": np.dtype("<u2"),
    "BF16": np.dtype("<u2"),
    "F32": np.dtype("<u4"),
}
# Their loaders replace linear layers only.
_EMBEDDINGS = re.compile(r"embed|(^|[._])(wte|wpe|shared)[._]", re.IGNORECASE)


@dataclass(frozen=True)
class Layout:
    """A layout of compressed-tensors.

    Attributes:
        name: As their config has it.
        structure: The structure of sparsity, as their config has it.
        kept: Returns the flags of the values that are stored of a weight; None: it has too many.
        shape: Returns the shape of the stored values, by their number and the weight's shape.
    """

    name: str
    structure: str
    kept: Callable[[Bools], Bools | None]
    shape: Callable[[int, tuple[int, ...]], tuple[int, ...]]

    @property
    def has_offsets(self) -> bool:
        """Whether it stores X.row_offsets."""
        return self.structure == "unstructured"


def _two_of_four(nonzero: Bools) -> Bools | None:
    """Flags of exactly two of each four elements, the ones that are not zero among them."""
    if nonzero.shape[1] % 4:
        return None
    fours = nonzero.reshape(-1, 4)
    missing = 2 - fours.sum(1, dtype=np.int8)
    if (missing < 0).any():
        return None
    filled = ~fours & (np.cumsum(~fours, axis=1, dtype=np.int8) <= missing[:, None])
    kept: Bools = (fours | filled).reshape(nonzero.shape)
    return kept


BITMASK = Layout("sparse-bitmask", "unstructured", lambda nonzero: nonzero, lambda n, shape: (n,))
BITMASK_24 = Layout(
    "sparse-24-bitmask", "2:4", _two_of_four, lambda n, shape: (shape[0], shape[1] // 2)
)


def save_bitmasks(path: Path, source: Source, layout: Layout) -> None:
    """Writes a model; to a folder with a config.json that names the layout.

    Args:
        path: A .safetensors file, a folder, or an index.
        source: The model.
        layout: The layout.

    Raises:
        SecateurError: The model has no weight for the layout, or cannot be written.
    """
    tensors, stored = _compressed(source.tensors, layout)
    if not stored:
        raise SecateurError(
            f"{path}: no 2-D .weight of F32, F16 or BF16 is smaller as {layout.name}"
            f"{', which needs 2 zeros in each 4 elements' if not layout.has_offsets else ''}; "
            "prune the model first"
        )
    index = source.index
    if index is not None:
        files = {name: index.file_of(stored.get(name, name)) for name in tensors}
        index = replace(index, files={**index.files, **files})
    folder = source.folder and _configured(source.folder, source, set(stored.values()), layout)
    file = source.torch_file, folder, source.onnx_file
    save(path, tensors, source.metadata, index, source.tensors, *file)


def _compressed(tensors: Tensors, layout: Layout) -> tuple[dict[str, LocalTensor], dict[str, str]]:
    """The tensors to write; and of the ones that are parts, the name of the weight."""
    written: dict[str, LocalTensor] = {}
    weight_of: dict[str, str] = {}
    for name, tensor in tensors.items():
        parts = _parts(tensor, layout) if _is_linear(name, tensor) else None
        if parts is None:
            written[name] = tensor
            continue
        named = {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}
        if taken := named.keys() & {*tensors, *written}:
            raise SecateurError(f"{taken.pop()}: {name} needs this name in {layout.name}")
        written |= named
        weight_of |= dict.fromkeys(named, name)
    return written, weight_of


def _is_linear(name: str, tensor: LocalTensor) -> bool:
    """Whether a tensor is the weight of a linear layer, as far as its name and shape tell."""
    is_matrix = len(tensor.shape) == 2 and 0 not in tensor.shape and tensor.dtype in _UNSIGNED
    return is_matrix and name.endswith(".weight") and not _EMBEDDINGS.search(name)


def _parts(tensor: LocalTensor, layout: Layout) -> dict[str, LocalTensor] | None:
    """The parts of a weight by their names; None if they are not smaller, or do not fit."""
    rows, columns = tensor.shape
    kept = _kept(tensor, layout)
    if kept is None:
        return None
    counts = kept.sum(1)
    shape = layout.shape(int(counts.sum()), tensor.shape)
    offsets = np.cumsum(counts) - counts
    parts = {
        "shape": _integers(np.array(tensor.shape), (2,) if layout.has_offsets else (2, 1)),
        "compressed": LocalTensor(tensor.dtype, shape, partial(_values, tensor, layout)),
        "bitmask": LocalTensor("U8", (rows, mask_bytes(columns)), partial(_bits, tensor, layout)),
    }
    if layout.has_offsets:
        parts["row_offsets"] = _integers(offsets, (rows,))
    size = sum(tensor_bytes(part.dtype, part.shape) for part in parts.values())
    return parts if size < tensor_bytes(tensor.dtype, tensor.shape) else None


def _integers(values: npt.NDArray[Any], shape: tuple[int, ...]) -> LocalTensor:
    data = values.astype("<i8").view(np.uint8)
    return LocalTensor("I64", shape, lambda: data)


def _matrix(tensor: LocalTensor) -> npt.NDArray[Any]:
    return tensor.read().view(_UNSIGNED[tensor.dtype]).reshape(tensor.shape)


def _kept(tensor: LocalTensor, layout: Layout) -> Bools | None:
    return layout.kept((_matrix(tensor) << 1) != 0)  # the shift drops the sign of -0.0


def _values(tensor: LocalTensor, layout: Layout) -> Bytes:
    values: Bytes = _matrix(tensor)[_kept(tensor, layout)].view(np.uint8)
    return values


def _bits(tensor: LocalTensor, layout: Layout) -> Bytes:
    kept = _kept(tensor, layout)
    assert kept is not None, "it was there when the file was laid out"
    return np.packbits(kept, axis=1, bitorder="little").reshape(-1)


def _configured(folder: Folder, source: Source, stored: set[str], layout: Layout) -> Folder:
    """The folder, with the layout in its config.json, if there is one."""
    text = folder.text("config.json")
    if text is None:
        return folder
    dense = [n for n, t in source.tensors.items() if _is_linear(n, t) and n not in stored]
    sparsity = {
        "format": layout.name,
        "sparsity_structure": layout.structure,
        "targets": ["Linear"],
        "ignore": [name.removesuffix(".weight") for name in dense],
    }
    config = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    try:
        table = {**json.loads(text), "quantization_config": config}
    except (ValueError, TypeError) as error:
        raise SecateurError(f"{folder.path / 'config.json'}: is not JSON: {error}") from None
    return replace(folder, changed={**folder.changed, "config.json": json.dumps(table, indent=2)})
