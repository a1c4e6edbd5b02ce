"""What a caller may give as a model: a Module, a mapping of tensors, or the path of a file."""

import importlib.util
import mmap
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from secateur.checkpoint import place_of
from secateur.cycles import no_search_for_cycles
from secateur.errors import InvalidStateDict
from secateur.file_kinds import open_reason, safetensors_reason
from secateur.folders import Folder, find_folder
from secateur.paths import source_path
from secateur.shards import Index, read_shards
from secateur.tensors import (
    LocalTensor,
    NotATensor,
    NoWireDtype,
    dtype_of,
    from_value,
    is_array,
    is_extra_state,
    is_text,
    parse_file,
)
from secateur.ties import shared_names, untie
from secateur.torch_files import (
    KNOWN_SUFFIXES,
    TORCH_SUFFIXES,
    TorchFile,
    read_torch_file,
    state_dict_advice,
)
from secateur_proto.index import SUFFIX
from secateur_proto.ties import read_ties, write_ties

Mask = npt.NDArray[np.bool_]

MASK_SHAPES = (
    "secateur.mask_shapes"  # in the metadata of a file of masks: JSON, from names to shapes
)


@dataclass(frozen=True)
class Source:
    """A model in this process.

    tensors: in the state_dict's order.  parameters: the names that a Prune may send; of a Module
    its buffers are none, as torch.nn.utils.prune prunes parameters only.
    as_torch: whether results are tensors of torch, or arrays.
    metadata: of a safetensors file of the tensors, with the ties of those that have other names.
    paths: the safetensors files that it is read from, and their index.
    index: of a model in shards.  is_here: False for one that only the server has.
    others: entries that are not sent, as safetensors has no dtype for them.
    order: the names of all entries, `others` among them, in the state_dict's order.
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
    others: Mapping[str, Any] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    torch_file: TorchFile | None = None
    folder: Folder | None = None

    @cached_property
    def other_names(self) -> Mapping[str, str]:
        """From each other name of a tied tensor to its name in `tensors`; a pair is its X."""
        return read_ties(self.metadata, self.tensors).names

    def pairs(self) -> dict[str, str]:
        """From each X whose pair X_orig, X_mask is here to the name of its mask."""
        names = self.parameters & self.tensors.keys()
        origs = (name for name in names if name.endswith("_orig"))
        bases = (name.removesuffix("_orig") for name in origs)
        return {base: f"{base}_mask" for base in bases if self._is_pair(base)}

    def _is_pair(self, base: str) -> bool:
        """Whether X_orig has an X_mask: of floating ones the server refuses what is no mask."""
        orig, mask = self.tensors[f"{base}_orig"], f"{base}_mask"
        if mask not in self.parameters or mask in self.others:
            return False
        if orig.kind == "integer":  # which have such names for other reasons, too
            is_free = base not in self.tensors
            fits = self.tensors[mask].shape == orig.shape
            return is_free and fits and self.tensors[mask].kind is not None
        return orig.kind == "floating"

    def only_parameters(self) -> "Source":
        """The source without what a Prune may not send; itself, where that is nothing."""
        if self.parameters.issuperset(self.order):
            return self
        tensors = {n: t for n, t in self.tensors.items() if n in self.parameters}
        others = {n: v for n, v in self.others.items() if n in self.parameters}
        return replace(self, tensors=tensors, others=others)

    def unsent(self) -> dict[str, Any]:
        """The entries that a Prune leaves here: a Module's buffers, and `others`."""
        buffers = {n: t for n, t in self.tensors.items() if n not in self.parameters}
        return {**buffers, **self.others}

    def places(self) -> dict[str, int]:
        """Where in `order` an entry of a result belongs.

        A pair takes the place of its X, and X that of its X_orig.
        """
        places = {name: place for place, name in enumerate(self.order)}
        for place, name in enumerate(self.order):
            for derived in (f"{name}_orig", f"{name}_mask", name.removesuffix("_orig")):
                places.setdefault(derived, place)
        return places

    def prunable(self) -> dict[str, LocalTensor]:
        """The floating parameters; a pair is its X, with the values of X_orig."""
        pairs = self.pairs()
        names = {f"{base}_orig": base for base in pairs}
        weights = self.parameters.difference(pairs.values())
        return {
            names.get(stored, stored): tensor
            for stored, tensor in self.tensors.items()
            if stored in weights and tensor.kind == "floating"
        }

    def prunable_names(self) -> dict[str, str]:
        """From every name of the floating parameters, in their order, to that in `prunable`.

        Other names that a file has in its metadata are last.
        """
        names = {name: name for name in self.prunable()}
        names |= {other: name for other, name in self.other_names.items() if name in names}
        places = self.places()
        return {n: names[n] for n in sorted(names, key=lambda n: places.get(n, len(places)))}

    def tied_names(self) -> dict[str, str]:
        """As prunable_names, without names that have no place; empty where nothing is tied."""
        places, names = self.places(), self.prunable_names() if self.other_names else {}
        return {known: name for known, name in names.items() if known in places}


def read_source(source: Any, key: str | None = None) -> Source:
    """Reads what a caller gives as a model; a Source is one already.

    Args:
        source: As of `Client`.
        key: The dotted path to the state_dict in a file of torch.save.

    Raises:
        InvalidStateDict: It is no model, or not a readable one.
    """
    is_path = isinstance(source, str | os.PathLike) and not place_of(source)
    if not isinstance(key, str | None):
        raise InvalidStateDict(f"key={key!r}: a dotted path is text, not {type(key).__name__}")
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
        return _model(_from_path(source_path(source, InvalidStateDict), key), source)
    raise InvalidStateDict(
        "a source is a Module, a mapping of tensors, a path, a URI or a Checkpoint, "
        f"not {type(source).__name__}"
    )


def read_file(path: Path) -> Source:
    """Reads a file of a model, or of masks.  Errors: InvalidStateDict."""
    return _from_path(source_path(path, InvalidStateDict), None)


def _model(read: Source, path: Any) -> Source:
    """Refuses a file of masks, whose bits are not weights."""
    if MASK_SHAPES in read.metadata:
        raise InvalidStateDict(
            f"{path}: this file holds masks, not a model; prune a model by them: "
            "secateur.custom_from_mask, or method: custom_from_mask in a spec file"
        )
    return read


def is_pruned(source: Any, key: str | None = None) -> bool:
    """Whether a source has a tensor that is pruned: as torch.nn.utils.prune.is_pruned."""
    return bool(read_source(source, key).pairs())


def _from_mapping(source: Mapping[Any, Any]) -> Source:
    for name in source:
        if not is_text(name) or name == "__metadata__":
            raise InvalidStateDict(f"{name!r} is no text that can name a tensor")
    torch = sys.modules.get("torch")
    as_torch = torch is not None and any(isinstance(v, torch.Tensor) for v in source.values())

    def is_carried(name: str, value: Any) -> bool:
        """An extra state may be any object; other entries are tensors or arrays."""
        if not is_extra_state(name):
            return False
        return not (isinstance(value, torch.Tensor) if torch and as_torch else is_array(value))

    try:
        return _divided(source, frozenset(source), as_torch, is_carried)
    except NotATensor as error:
        raise InvalidStateDict(f"{error}; {state_dict_advice(source)}") from None


def _from_module(module: Any) -> Source:
    from secateur.module import check_hooks, entries_of

    check_hooks(module)
    try:
        entries, parameters = entries_of(module)
    except Exception as error:  # a state_dict may be the caller's own code
        raise InvalidStateDict(f"the module's state_dict() fails: {error}") from error
    tensor = sys.modules["torch"].Tensor
    return _divided(entries, parameters, True, lambda name, value: not isinstance(value, tensor))


@no_search_for_cycles()
def _divided(
    entries: Mapping[str, Any],
    parameters: frozenset[str],
    as_torch: bool,
    is_carried: Callable[[str, Any], bool],
) -> Source:
    """A source of the entries that safetensors has a dtype for, and the others.

    is_carried: whether an entry stays here, of those that may be no tensors.
    """
    tensors: dict[str, LocalTensor] = {}
    others: dict[str, Any] = {}
    for name, value in entries.items():
        if is_carried(name, value):
            others[name] = value
            continue
        try:
            tensors[name] = from_value(name, value)
        except NoWireDtype:
            others[name] = value
    _check_masks(tensors, others)
    shared = shared_names(tensors)
    tensors, ties = untie(tensors, shared)
    parameters |= {name for other, name in shared.items() if other in parameters}
    parameters |= {
        half
        for name in parameters
        if f"{name}_orig" in tensors and f"{name}_mask" in tensors
        for half in (f"{name}_orig", f"{name}_mask")
    }
    metadata = write_ties({}, ties)
    return Source(tensors, parameters, as_torch, metadata, others=others, order=tuple(entries))


def _check_masks(tensors: Mapping[str, LocalTensor], others: Mapping[str, Any]) -> None:
    """Refuses an X_mask that is not sent for an X_orig that is: X_orig alone is no pair."""
    for name, value in others.items():
        orig = tensors.get(f"{name.removesuffix('_mask')}_orig")
        if name.endswith("_mask") and orig is not None and orig.kind == "floating":
            raise InvalidStateDict(f"{name}: has dtype {dtype_of(value)}, which no mask has")


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
    return _from_files(*_untied(*_map_file(path)), (path,))


def _from_files(
    tensors: Mapping[str, LocalTensor],
    metadata: Mapping[str, str],
    paths: tuple[Path, ...],
    index: Index | None = None,
) -> Source:
    order = tuple(tensors)
    return Source(
        tensors, frozenset(order), _has_torch(), metadata, paths, index=index, order=order
    )


def _untied(
    tensors: dict[str, LocalTensor], metadata: dict[str, str]
) -> tuple[dict[str, LocalTensor], dict[str, str]]:
    """The tensors of a file, each under one name, and its metadata, with the other names."""
    tensors, ties = untie(tensors, {k: v for k, v in metadata.items() if k not in tensors})
    return tensors, write_ties(metadata, ties)


def _from_index(path: Path) -> Source:
    tensors, index = read_shards(path, _shard)
    names = dict.fromkeys(index.files.values())
    paths = () if index.is_torch else (*(path.with_name(name) for name in names), path)
    return _from_files(*_untied(tensors, index.of_one_file()), paths, index)


def _shard(path: Path) -> tuple[dict[str, LocalTensor], dict[str, str]]:
    if path.suffix not in TORCH_SUFFIXES:
        return _map_file(path)
    source = _from_mapping(read_torch_file(path).state_dict)
    for name, value in source.others.items():
        raise InvalidStateDict(
            f"{path}: {name} is {dtype_of(value)}, which safetensors has no dtype for; "
            "give the model as one file"
        )
    return dict(source.tensors), dict(source.metadata)


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

    if reason := open_reason(path):
        raise InvalidStateDict(f"{path}: {reason}")
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or safetensors_reason(path, error)
        raise InvalidStateDict(f"{path}: {reason}") from None
    try:
        return parse_file(map_bytes(path))
    except InvalidStateDict as error:
        raise InvalidStateDict(f"{path}: {error}") from None
