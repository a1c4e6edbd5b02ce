"""Folders with one model in them, as transformers and diffusers write them."""

import os
import shutil
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import NoReturn

from secateur.errors import InvalidStateDict, NotSaved, SecateurError
from secateur.shards import read_index
from secateur_proto.index import SUFFIX

# Where the weights are, in the order of from_pretrained of transformers.
_CANDIDATES = (
    "model.safetensors",
    f"*.safetensors{SUFFIX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{SUFFIX}",
    "*.safetensors",
)
# The weights of a model in any format. Those of the first line belong to another part of the model
# when they are in a subfolder, as 2_Dense/model.safetensors of sentence-transformers.
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "consolidated*.pth", f"*{SUFFIX}")
_EXPORTS = (
    *("*.onnx", "*.onnx_data", "*.gguf", "*.h5", "*.msgpack", "*.ot", "*.tflite"),
    *("openvino_model*.bin", "openvino_model*.xml"),
)
# What tools for versions and downloads keep there for themselves.
_NOT_COPIED = (".git", ".cache")


@dataclass(frozen=True)
class Folder:
    """A folder with a model.

    Attributes:
        path: The folder.
        model: The file of the weights, or the index of its shards.
        weights: The names of all files that the model is in.
    """

    path: Path
    model: Path
    weights: frozenset[str]

    def rest(self, out: Path) -> "Rest":
        """The files beside the weights that `out` lacks; none if `out` is the folder itself."""
        copied: list[Path] = []
        left: list[Path] = []
        for file in self._walk(out.resolve()):
            if not (out / file).exists():
                is_copied = (self.path / file).is_file() and not _is_weights(file)
                (copied if is_copied else left).append(file)
        return Rest(self.path, out, copied, left)

    def _walk(self, out: Path) -> Iterator[Path]:
        """The paths of all other files, and of links to folders; nothing of `out`."""
        for at, folders, files in os.walk(self.path, onerror=_refuse):
            place = Path(at)
            links = [name for name in folders if (place / name).is_symlink()]
            skipped = {*links, *_NOT_COPIED}
            folders[:] = sorted(
                name for name in folders if name not in skipped and (place / name).resolve() != out
            )
            for name in sorted((*files, *links)):
                if place != self.path or name not in self.weights:
                    yield (place / name).relative_to(self.path)


@dataclass(frozen=True)
class Rest:
    """The files of a folder beside its weights, relative to it.

    Attributes:
        path: The folder.
        out: Where they are copied to.
        copied: Those that are copied.
        left: Those that are not: the same weights in other formats, and links to folders.
    """

    path: Path
    out: Path
    copied: Sequence[Path]
    left: Sequence[Path]

    def copy_to(self, made: Path) -> None:
        """Copies them to a folder that becomes `out`."""
        for file in self.copied:
            (made / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.path / file, made / file)

    def warn(self) -> None:
        """Names those that were not copied."""
        weights = [file for file in self.left if _is_weights(file)]
        kinds = {
            "other weights, which were not pruned": weights,
            "links to folders, or to nothing": [f for f in self.left if f not in weights],
        }
        if self.left:
            listed = (f"{', '.join(map(str, files))} ({k})" for k, files in kinds.items() if files)
            text = f"{self.out}: without {' and '.join(listed)}"
            warnings.warn(text, NotSaved, stacklevel=7)


def _refuse(error: OSError) -> NoReturn:
    """Ends a walk at a folder that cannot be read: its files would be left out."""
    raise SecateurError(f"{error.filename}: {error.strerror}")


def _files_in(path: Path, kind: type[SecateurError]) -> list[Path]:
    try:
        return sorted(path.iterdir())
    except OSError as error:  # which glob takes for an empty folder
        raise kind(f"{path}: {error.strerror}") from None


def find_folder(path: Path) -> Folder:
    """The model in a folder.

    Raises:
        InvalidStateDict: The folder has no model, or several that could be meant.
    """
    files = _files_in(path, InvalidStateDict)
    for pattern in _CANDIDATES:
        found = [file for file in files if fnmatch(file.name, pattern)]
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise InvalidStateDict(f"{path}: holds {len(found)} models: {names}; name one of them")
        if found:
            return Folder(path, found[0], _weights_of(found[0]))
    raise InvalidStateDict(f"{path}: holds no model; known are {', '.join(_CANDIDATES)}")


def _weights_of(model: Path) -> frozenset[str]:
    if not model.name.endswith(SUFFIX):
        return frozenset({model.name})
    weight_map, _ = read_index(model)
    return frozenset({model.name, *weight_map.values()})


def _is_weights(file: Path) -> bool:
    patterns = _EXPORTS if len(file.parts) > 1 else (*_WEIGHTS, *_EXPORTS)
    return any(fnmatch(file.name, pattern) for pattern in patterns)


def check_no_other_weights(path: Path, written: Collection[str]) -> None:
    """Refuses a folder with weights that would not be of the model written to it.

    Raises:
        SecateurError: It has some; a reader of the folder might take them.
    """
    names = {file.name for file in _files_in(path, SecateurError) if _is_weights(Path(file.name))}
    others = sorted(names.difference(written))
    if others:
        raise SecateurError(
            f"{path}: holds other weights, {', '.join(others)}; remove them, or name a new folder"
        )
