"""Folders with one model in them, as transformers and diffusers write them."""

import os
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import NoReturn

from secateur.errors import InvalidStateDict, NotSaved, SecateurError
from secateur.shards import read_index
from secateur_proto.index import SUFFIX

# The files of weights, in the order in which transformers' from_pretrained tries them.
_CANDIDATES = (
    "model.safetensors",
    f"*.safetensors{SUFFIX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{SUFFIX}",
    "*.safetensors",
)
# The weights of a model in any format. In a subfolder, files of the first line belong to another
# part of the model, as 2_Dense/model.safetensors of sentence-transformers.
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "consolidated*.pth", f"*{SUFFIX}")
_EXPORTS = (
    *("*.onnx", "*.onnx_data", "*.gguf", "*.h5", "*.msgpack", "*.ot", "*.tflite"),
    *("openvino_model*.bin", "openvino_model*.xml"),
)
# Folders of tools for versions and downloads.
_NOT_COPIED = (".git", ".cache")


@dataclass(frozen=True)
class Folder:
    """A folder with a model.

    Attributes:
        path: The folder.
        model: The file of the weights, or the index of its shards.
        weights: The names of all files of the model.
        parameters: The elements of the model's tensors.
        changed: New texts of files beside the weights, by name, for a copy of the folder.
        notes: What was done to the model so far, for people.
    """

    path: Path
    model: Path
    weights: frozenset[str]
    parameters: int = 0
    changed: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def text(self, name: str) -> str | None:
        """Returns the text of a file, as a copy of the folder has it; None if it has none.

        Raises:
            InvalidStateDict: The file cannot be read.
        """
        if name in self.changed:
            return self.changed[name]
        try:
            return (self.path / name).read_text("utf-8")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:  # ValueError: not UTF-8
            reason = getattr(error, "strerror", None) or error
            raise InvalidStateDict(f"{self.path / name}: {reason}") from None

    def rest(self, out: Path) -> "Rest":
        """Finds the files beside the weights that `out` lacks; none if `out` is the folder."""
        copied: list[Path] = []
        left: list[Path] = []
        for file in self._walk(out.resolve()):
            if not (out / file).exists():
                is_copied = (self.path / file).is_file() and not _is_weights(file)
                (copied if is_copied else left).append(file)
        return Rest(self.path, out, copied, left)

    def _walk(self, out: Path) -> Iterator[Path]:
        """The paths of all other files, and of links to folders; without those in `out`."""
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
        out: The folder to which they are copied.
        copied: Files to copy.
        left: Other files: the same weights in other formats, and links to folders.
    """

    path: Path
    out: Path
    copied: Sequence[Path]
    left: Sequence[Path]

    def copy_to(self, made: Path) -> None:
        """Copies the files to a folder that becomes `out`."""
        for file in self.copied:
            (made / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.path / file, made / file)

    def warn(self) -> None:
        """Warns of the files that are not copied."""
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
    """Ends a walk at a folder that cannot be read; os.walk would skip it."""
    raise SecateurError(f"{error.filename}: {error.strerror}")


def _files_in(path: Path, kind: type[SecateurError]) -> list[Path]:
    try:
        return sorted(path.iterdir())
    except OSError as error:  # glob would take it for an empty folder
        raise kind(f"{path}: {error.strerror}") from None


def find_folder(path: Path) -> Folder:
    """Finds the model in a folder.

    Raises:
        InvalidStateDict: The folder has no model, or several.
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
    """Refuses to write a model to a folder with the weights of another.

    Raises:
        SecateurError: A reader of the folder might take the other weights.
    """
    names = {file.name for file in _files_in(path, SecateurError) if _is_weights(Path(file.name))}
    others = sorted(names.difference(written))
    if others:
        raise SecateurError(
            f"{path}: holds other weights, {', '.join(others)}; remove them, or name a new folder"
        )
