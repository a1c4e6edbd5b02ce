"""What a caller may give as a model: a Module, a mapping of tensors, or the path of a file."""

import importlib.util
import mmap
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from secateur.checkpoint import place_of
from secateur.errors import InvalidStateDict
from secateur.folders import Folder, find_folder
from secateur.shards import Index, read_shards
from secateur.tensors import LocalTensor, from_value, is_text, parse_file
from secateur.torch_files import KNOWN_SUFFIXES, TORCH_SUFFIXES, TorchFile, read_torch_file
from secateur_proto.index import SUFFIX

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Source:
    """A model in this process.

    tensors: in the state_dict's order.  parameters: the names that a Prune may send; of a Module
    its buffers are none, as torch.nn.utils.prune prunes parameters only.
    as_torch: whether results are tensors of torch, or arrays.
    paths: the safetensors files that it is read from, and their index.
    index: of a model in shards.  is_here: False for one that only the server has.
    torch_file: the file of torch.save that it is read from, with all else that the file holds.
    folder: the folder that it is read from, with all else that is there.
    """

    tensors: Mapping[str, LocalTensor]
    parameters: frozenset[str]
    as_torch: bool
    metadata: Mapping[str, str] = field(default_factory=dict)
    paths: tuple[Path, ...] = ()
    index: Index | None = None
    is_here: bool = True
    torch_file: TorchFile | None = None
    folder: Folder | None = None

    def pairs(self) -> dict[str, str]:
        """From each X whose pair X_orig, X_mask is here to the name of its mask."""
        origs = (name for name in self.parameters if name.endswith("_orig"))
        bases = (name.removesuffix("_orig") for name in origs)
        return {base: f"{base}_mask" for base in bases if self._is_pair(base)}

    def _is_pair(self, base: str) -> bool:
        """Whether X_orig has an X_mask: of floating ones the server refuses what is no mask."""
        orig, mask = self.tensors[f"{base}_orig"], f"{base}_mask"
        if mask not in self.parameters:
            return False
        if orig.dtype in _INTEGERS:  # which have such names for other reasons, too
            is_free = base not in self.tensors
            fits = self.tensors[mask].shape == orig.shape
            return is_free and fits and self.tensors[mask].dtype in _OF_MASKS
        return orig.dtype in _FLOATING

    def only_parameters(self) -> "Source":
        """The source without what a Prune may not send; itself, where that is nothing."""
        if self.parameters >= self.tensors.keys():
            return self
        tensors = {n: t for n, t in self.tensors.items() if n in self.parameters}
        return replace(self, tensors=tensors)

    def prunable(self) -> dict[str, LocalTensor]:
        """The floating parameters; a pair is its X, with the values of X_orig."""
        pairs = self.pairs()
        masks = set(pairs.values())
        names = {f"{base}_orig": base for base in pairs}
        return {
            names.get(stored, stored): tensor
            for stored, tensor in self.tensors.items()
            if stored in self.parameters - masks and tensor.dtype in _FLOATING
        }


# The dtypes that the server prunes, and those that the mask of a pair may have.
_FLOATING = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_INTEGERS = ("I8", "I16", "I32", "I64", "U8")
_OF_MASKS = ("BOOL", *_INTEGERS, *_FLOATING)


def read_source(source: Any, key: str | None = None) -> Source:
    """Reads what a caller gives as a model; a Source is one already.

    Args:
        source: As of `Client`.
        key: The dotted path to the state_dict in a file of torch.save.

    Raises:
        InvalidStateDict: It is no model, or not a readable one.
    """
    is_path = isinstance(source, str | os.PathLike) and not place_of(source)
    if key is not None and not is_path:
        kind = "what a server has" if place_of(source) else type(source).__name__
        raise InvalidStateDict(f"key={key!r}: only a local torch file has keys, not {kind}")
    if isinstance(source, Source):
        return source
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(source, torch.nn.Module):
        return _from_module(source)
    if isinstance(source, Mapping):
        return _from_mapping(source)
    if place_of(source):
        return Source({}, frozenset(), _has_torch(), is_here=False)
    if is_path:
        return _from_path(Path(source), key)
    raise InvalidStateDict(
        "a source is a Module, a mapping of tensors, a path, a URI or a Checkpoint, "
        f"not {type(source).__name__}"
    )


def is_pruned(source: Any, key: str | None = None) -> bool:
    """Whether a source has a tensor that is pruned: as torch.nn.utils.prune.is_pruned."""
    return bool(read_source(source, key).pairs())


def _from_mapping(source: Mapping[Any, Any]) -> Source:
    for name in source:
        if not is_text(name) or name == "__metadata__":
            raise InvalidStateDict(f"{name!r} is no text that can name a tensor")
    tensors = {name: from_value(name, value) for name, value in source.items()}
    torch = sys.modules.get("torch")
    as_torch = torch is not None and any(isinstance(v, torch.Tensor) for v in source.values())
    return Source(tensors, frozenset(tensors), as_torch)


def _from_module(module: Any) -> Source:
    from secateur.module import check_hooks, tensors_of

    check_hooks(module)
    tensors, parameters = tensors_of(module)
    return Source(
        {name: from_value(name, value) for name, value in tensors.items()},
        frozenset(parameters),
        as_torch=True,
    )


def _from_path(path: Path, key: str | None) -> Source:
    if path.is_dir():
        folder = find_folder(path)
        return replace(_from_path(folder.model, key), folder=folder)
    if path.suffix in TORCH_SUFFIXES:
        file = read_torch_file(path, key)
        return replace(_from_mapping(file.state_dict), torch_file=file)
    if key is not None:
        raise InvalidStateDict(f"key={key!r}: only a torch file has keys, not {path}")
    if path.name.endswith(SUFFIX):
        return _from_index(path)
    if path.suffix != ".safetensors":
        hint = f"; of a checkpoint give what client.checkpoint({str(path)!r}) returns"
        known = f"unknown suffix {path.suffix!r}; known are {KNOWN_SUFFIXES}, {SUFFIX} and folders"
        reason = known if path.exists() else "No such file or directory"
        raise InvalidStateDict(
            f"{path}: {reason}{hint if str(path).startswith('checkpoints/') else ''}"
        )
    tensors, metadata = _map_file(path)
    return Source(tensors, frozenset(tensors), _has_torch(), metadata, (path,))


def _from_index(path: Path) -> Source:
    tensors, index = read_shards(path, _shard)
    names = dict.fromkeys(index.files.values())
    is_torch = any(Path(name).suffix in TORCH_SUFFIXES for name in names)
    paths = () if is_torch else (*(path.with_name(name) for name in names), path)
    metadata = dict(next(iter(index.metadata.values()), {}))  # of one file made of all
    return Source(tensors, frozenset(tensors), _has_torch(), metadata, paths, index)


def _shard(path: Path) -> tuple[Mapping[str, LocalTensor], dict[str, str]]:
    if path.suffix in TORCH_SUFFIXES:
        return _from_mapping(read_torch_file(path).state_dict).tensors, {}
    return _map_file(path)


def _has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def map_bytes(path: Path) -> memoryview:
    """A file in mapped memory.  Errors: InvalidStateDict."""
    try:
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:  # of an empty file
        reason = getattr(error, "strerror", None) or error
        raise InvalidStateDict(f"{path}: {reason}") from None


def _map_file(path: Path) -> tuple[dict[str, LocalTensor], dict[str, str]]:
    """The tensors of a file that the safetensors library finds valid, in mapped memory."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except FileNotFoundError:  # of the library's, whose text has the path once more
        raise InvalidStateDict(f"{path}: No such file or directory") from None
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidStateDict(f"{path}: {reason}") from None
    try:
        return parse_file(map_bytes(path))
    except InvalidStateDict as error:
        raise InvalidStateDict(f"{path}: {error}") from None


def prior_mask(tensor: LocalTensor) -> Mask:
    """The X_mask of a pair as bool, flat; its values are 0 and 1 of any dtype."""
    data = tensor.read()
    itemsize = len(data) // max(1, int(np.prod(tensor.shape)))
    bits = data.view(f"u{max(1, itemsize)}")
    kept: Mask = (bits << 1) != 0  # the shift drops the sign of -0.0
    return kept
