"""A model as files: one file, or a folder."""

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from secateur.atomic import filling, replacing
from secateur.errors import NotSaved, SecateurError
from secateur.folders import Folder, check_no_other_weights
from secateur.shards import Index
from secateur.tensors import LocalTensor, to_value
from secateur.torch_files import KNOWN_SUFFIXES, TORCH_SUFFIXES, TorchFile
from secateur_proto.framing import file_header
from secateur_proto.index import SUFFIX

Tensors = Mapping[str, LocalTensor]
Metadata = Mapping[str, str]


def save(
    path: Path,
    tensors: Tensors,
    metadata: Metadata,
    index: Index | None = None,
    before: Tensors | None = None,
    torch_file: TorchFile | None = None,
    folder: Folder | None = None,
) -> None:
    """Writes a model as one file, or to a folder as the file or shards that it came in.

    Args:
        path: A file, a folder, or the index of shards.
        tensors: What the model has become.
        metadata: Of a .safetensors file.
        index: Of the shards that it came in.
        before: The tensors that `index` tells of; None is `tensors`.
        torch_file: What it was read from; a torch file keeps all of that but the tensors.
        folder: What it was read from; a folder has a copy of the files beside the weights.

    Raises:
        SecateurError: It cannot be written.
    """
    check_writable(path, has_folder=index is not None or folder is not None)
    try:
        if _is_file(path):
            with replacing(path) as file:
                if path.suffix == ".safetensors":
                    warn_of_rest(path, torch_file)
                _write(file, path.suffix, tensors, metadata, torch_file)
        elif index is not None:
            _save_shards(path, tensors, index, tensors if before is None else before, folder)
        elif folder is not None and not path.name.endswith(SUFFIX):
            with _filling(path, folder.weights, folder) as made:
                _save_part(made / folder.model.name, tensors, metadata, torch_file)
        else:
            raise SecateurError(f"{path}: the model did not come in shards; name a file")
    except OSError as error:
        raise SecateurError(f"{path}: cannot write it: {error.strerror}") from None


def check_writable(path: Path, has_folder: bool = False) -> None:
    """Refuses early what `save` would refuse.

    Args:
        path: As of `save`.
        has_folder: Whether the model came in a folder, so that `path` may be a new one.

    Raises:
        SecateurError: It cannot be written.
    """
    if path.is_dir() or path.name.endswith(SUFFIX):
        return
    if not _is_file(path) and (path.exists() or not has_folder):
        raise SecateurError(
            f"{path}: unknown suffix {path.suffix!r}; known are {KNOWN_SUFFIXES}, "
            "or name a folder that exists"
        )
    if not path.absolute().parent.is_dir():
        raise SecateurError(f"{path}: there is no such folder")


def _is_file(path: Path) -> bool:
    return path.suffix in (".safetensors", *TORCH_SUFFIXES) and not path.is_dir()


def _save_shards(
    path: Path, tensors: Tensors, index: Index, before: Tensors, folder: Folder | None
) -> None:
    """Writes the same shards that a model came in, and their index."""
    shards = index.shards(tensors)
    is_index = path.name.endswith(SUFFIX)
    name = path.name if is_index else index.filename
    filled = filling(path.parent) if is_index else _filling(path, {*shards, name}, folder)
    with filled as made:
        for shard, of_shard in shards.items():
            _save_part(made / shard, of_shard, index.metadata.get(shard, {}))
        (made / name).write_text(index.text(tensors, before))


@contextmanager
def _filling(path: Path, written: Collection[str], folder: Folder | None) -> Iterator[Path]:
    """As `filling`, with a copy of what the source's folder has beside the weights."""
    if path.is_dir():
        check_no_other_weights(path, written)
    rest = None if folder is None else folder.rest(path)
    with filling(path) as made:
        if rest is not None:
            rest.copy_to(made)
        yield made
    if rest is not None:
        rest.warn()


def _save_part(
    path: Path, tensors: Tensors, metadata: Metadata, torch_file: TorchFile | None = None
) -> None:
    with path.open("wb") as file:
        _write(file, path.suffix, tensors, metadata, torch_file)


def _write(
    file: BinaryIO,
    suffix: str,
    tensors: Tensors,
    metadata: Metadata,
    torch_file: TorchFile | None,
) -> None:
    if suffix in TORCH_SUFFIXES:
        _write_torch(file, tensors, torch_file)
    else:
        _write_safetensors(file, tensors, metadata)


def _write_safetensors(file: BinaryIO, tensors: Tensors, metadata: Metadata) -> None:
    file.write(file_header(((name, t.dtype, t.shape) for name, t in tensors.items()), metadata))
    for tensor in tensors.values():
        file.write(tensor.read().data)


def warn_of_rest(place: Any, torch_file: TorchFile | None) -> None:
    """Warns of what a torch file holds beside its tensors, which .safetensors cannot."""
    rest = torch_file.rest if torch_file is not None else ()
    if rest:
        text = f"{place}: without {', '.join(rest)}; a torch file (.pt) keeps what is no tensor"
        warnings.warn(text, NotSaved, stacklevel=5)


def _write_torch(file: BinaryIO, tensors: Tensors, torch_file: TorchFile | None) -> None:
    import torch

    values: dict[str, Any] = {name: to_value(tensor, True) for name, tensor in tensors.items()}
    torch.save(values if torch_file is None else torch_file.with_values(values), file)
