"""Models in shards, as Hugging Face stores large ones: files, and an index of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.errors import InvalidStateDict
from secateur.tensors import LocalTensor
from secateur.torch_files import TORCH_SUFFIXES
from secateur_proto.index import SUFFIX, index_text, parse_index
from secateur_proto.ties import read_ties


@dataclass(frozen=True)
class Index:
    """The index of a model in shards.

    Attributes:
        files: The file of each tensor, and of each other name of a tied tensor.
        rest: All other content of the index.
        metadata: The metadata of each file.
        filename: The name of the index.
    """

    files: Mapping[str, str]
    rest: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    filename: str = f"model.safetensors{SUFFIX}"

    @property
    def is_torch(self) -> bool:
        """Whether the shards are files of torch.save."""
        return any(Path(file).suffix in TORCH_SUFFIXES for file in self.files.values())

    def file_of(self, name: str) -> str:
        """Returns the file of a tensor; half of a pair has that of its X, and X that of X_orig.

        Raises:
            InvalidStateDict: The index has no file for it.
        """
        base = name.removesuffix("_orig").removesuffix("_mask")
        for known in (name, base, f"{base}_orig"):
            if known in self.files:
                return self.files[known]
        raise InvalidStateDict(f"{name}: the index names no file for it")

    def of_one_file(self) -> dict[str, str]:
        """Returns the metadata of one file made of all shards: that of the first, and all ties."""
        ties = {
            other: name
            for of_file in self.metadata.values()
            for other, name in of_file.items()
            if name in self.files or f"{name}_orig" in self.files
        }
        return {**ties, **next(iter(self.metadata.values()), {})}

    def shards(self, tensors: Mapping[str, LocalTensor]) -> dict[str, dict[str, LocalTensor]]:
        """Divides tensors by file, in the order of the files' names."""
        shards: dict[str, dict[str, LocalTensor]] = {
            name: {} for name in sorted(set(self.files.values()))
        }
        for name, tensor in tensors.items():
            shards[self.file_of(name)][name] = tensor
        return shards

    def text(self, tensors: Mapping[str, LocalTensor], before: Mapping[str, LocalTensor]) -> str:
        """Returns the text of a new index.

        Args:
            tensors: The new model.
            before: The tensors of this index.
        """
        weight_map = {n: f for n, f in self.files.items() if n not in before}  # tied ones
        weight_map |= {name: self.file_of(name) for name in tensors}
        described = ((tensor.dtype, tensor.shape) for tensor in tensors.values())
        return index_text(weight_map, self.rest, described)


MapFile = Callable[[Path], tuple[Mapping[str, LocalTensor], dict[str, str]]]


def read_shards(path: Path, map_file: MapFile) -> tuple[dict[str, LocalTensor], Index]:
    """Reads the tensors of all shards, file by file, and their index.

    Args:
        path: The index.
        map_file: Reads the tensors and the metadata of a shard.

    Raises:
        InvalidStateDict: A file cannot be read, or the index is wrong.
    """
    weight_map, rest = read_index(path)
    tensors: dict[str, LocalTensor] = {}
    files: dict[str, str] = {}
    metadata = {}
    for name in dict.fromkeys(weight_map.values()):
        of_file, metadata[name] = map_file(path.with_name(name))
        for twice in of_file.keys() & tensors.keys():
            raise InvalidStateDict(f"{path}: {twice} is in both {files[twice]} and {name}")
        files |= dict.fromkeys(of_file, name)
        tensors |= of_file
    index = Index({**weight_map, **files}, rest, metadata, path.name)
    tied = read_ties(index.of_one_file(), tensors).names
    for name, file in weight_map.items():
        if files.get(name) != file and (name in files or name not in tied):
            raise InvalidStateDict(f"{path}: {name} is not in {file}")
    return tensors, index


def read_index(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Reads the weight_map of an index, and the rest of it.

    Raises:
        InvalidStateDict: It cannot be read, or is not an index.
    """
    try:
        weight_map, rest = parse_index(path.read_bytes())
    except OSError as error:
        raise InvalidStateDict(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise InvalidStateDict(f"{path}: {error}") from None
    for name, file in weight_map.items():
        if "/" in file or file in ("", ".", ".."):
            raise InvalidStateDict(f"{path}: {name} is in {file!r}, which is not beside the index")
    return weight_map, rest
