"""Writes a model as one file, or to a folder."""

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from secateur.atomic import filling, replacing
from secateur.errors import NotSaved, SecateurError
from secateur.folders import Folder, check_no_other_weights, find_folder
from secateur.onnx.files import ONNX_SUFFIX, OnnxFile, no_graph
from secateur.others import check_storable
from secateur.packing.packed import write_packed
from secateur.shards import Index
from secateur.tensor_file import TensorFile
from secateur.tensors import LocalTensor, dtype_of, has_torch, is_extra_state, to_value
from secateur.ties import each_once, once
from secateur.torch_files import KNOWN_SUFFIXES, TORCH_SUFFIXES, TorchFile
from secateur_proto.index import SUFFIX
from secateur_proto.ties import read_ties, write_ties

Entries = Mapping[str, Any]
Tensors = Mapping[str, LocalTensor]
Metadata = Mapping[str, str]


def save(
    path: Path,
    entries: Entries,
    metadata: Metadata,
    index: Index | None = None,
    before: Tensors | None = None,
    torch_file: TorchFile | None = None,
    folder: Folder | None = None,
    onnx_file: OnnxFile | None = None,
    is_packed: bool = False,
) -> None:
    """Writes a model as one file, or to a folder as the file or shards that it came in.

    Args:
        path: A file, a folder, or the index of shards.
        entries: The model's entries: each a LocalTensor, under several names if it is tied, or a
            value that only a torch file can hold.
        metadata: The metadata of a .safetensors file.
        index: The index of the shards of the source.
        before: The tensors of `index`; None is `entries`.
        torch_file: The source; a torch file keeps all of its content but the tensors.
        folder: The source; a folder gets a copy of its files beside the weights, changed ones
            among them.
        onnx_file: The source; an ONNX file keeps all of its content but the tensors.
        is_packed: Whether the files are packed.

    Raises:
        SecateurError: It cannot be written.
    """
    check_writable(path, has_folder=index is not None or folder is not None)
    check_holds(path, entries, index, folder, is_packed)
    try:
        if path.suffix == ONNX_SUFFIX and not path.is_dir():
            _save_onnx(path, entries, onnx_file)
        elif is_file(path):
            with replacing(path) as file:
                if path.suffix == ".safetensors" or onnx_file is not None:
                    warn_of_rest(path, onnx_file or torch_file)
                _write(file, path, entries, metadata, torch_file, is_packed)
        elif index is not None:
            tensors = entries if before is None else before
            _save_shards(path, entries, index, tensors, folder, is_packed)
        elif folder is not None and not path.name.endswith(SUFFIX):
            with _filling(path, folder.weights, folder) as made:
                _save_part(made / folder.model.name, entries, metadata, torch_file, is_packed)
        else:
            raise SecateurError(
                f"{path}: the model is one file, not shards; name a file, such as out.safetensors"
            )
    except OSError as error:
        raise SecateurError(f"{path}: cannot write it: {error.strerror}") from None
    except _CannotWrite as error:
        raise SecateurError(f"{path}: {error}") from None


class _CannotWrite(Exception):
    """An entry that torch.save refuses; the message does not name the file."""


def check_writable(path: Path, has_folder: bool = False) -> None:
    """Refuses early a path that `save` would refuse.

    Args:
        path: The file, folder or index to write.
        has_folder: Whether the source is a folder, so that `path` may be a new one.

    Raises:
        SecateurError: It cannot be written.
    """
    if path.is_dir() or path.name.endswith(SUFFIX):
        return
    if not is_file(path) and (path.exists() or not has_folder):
        raise SecateurError(
            f"{path}: unknown suffix {path.suffix!r}; known are {KNOWN_SUFFIXES}; "
            "a folder (-o NAME) is made only for a model, not masks, read from a folder or an index"
        )
    if path.suffix in TORCH_SUFFIXES and not has_torch():
        raise SecateurError(f"{path}: to write {path.suffix} install torch")
    if not path.absolute().parent.is_dir():
        raise SecateurError(f"{path}: no such folder exists")


def check_out(path: Path, model: Path) -> None:
    """Refuses early a path at which a local model cannot be written: see `save`.

    Raises:
        SecateurError: It cannot be written, or has the weights of another model.
    """
    check_writable(path, model.is_dir() or model.name.endswith(SUFFIX))
    if model.is_dir() and path.is_dir():
        check_no_other_weights(path, find_folder(model).weights)


def check_new_folder(path: Path) -> None:
    """Refuses early a folder that cannot appear whole, for the folder of a shrunk model.

    Raises:
        SecateurError: It exists, or cannot be made.
    """
    if path.exists() or path.is_symlink():
        raise SecateurError(f"{path}: exists; name a new folder, which is written whole")
    if is_file(path) or path.name.endswith(SUFFIX):
        raise SecateurError(f"{path}: names a file; name a new folder")
    check_writable(path, has_folder=True)


def check_holds(
    path: Path,
    entries: Entries,
    index: Index | None = None,
    folder: Folder | None = None,
    is_packed: bool = False,
) -> None:
    """Refuses early entries that only a torch file can hold, and other packed files: see `save`.

    Raises:
        InvalidStateDict: The message names the entries.
        SecateurError: Only a .safetensors file can be packed.
    """
    if not is_file(path):
        shards = () if index is None else index.files.values()
        names = shards or () if folder is None else folder.weights
        suffixes = {Path(name).suffix for name in names}
    else:
        suffixes = {path.suffix}
    if is_packed and suffixes.intersection((ONNX_SUFFIX, *TORCH_SUFFIXES)):
        raise SecateurError(
            f"{path}: a packed file is .safetensors; name one, such as out.safetensors"
        )
    if ".safetensors" in suffixes:
        check_storable(str(path), entries, "write .pt instead")


def is_file(path: Path) -> bool:
    """Whether `save` writes one file there."""
    return path.suffix in (".safetensors", ONNX_SUFFIX, *TORCH_SUFFIXES) and not path.is_dir()


def _save_onnx(path: Path, entries: Entries, onnx_file: OnnxFile | None) -> None:
    if onnx_file is None:
        raise SecateurError(f"{path}: {no_graph('the source')}")
    onnx_file.save(path, entries)


def _save_shards(
    path: Path,
    entries: Entries,
    index: Index,
    before: Tensors,
    folder: Folder | None,
    is_packed: bool,
) -> None:
    """Writes the shards of the source, and their index."""
    shards = index.shards(entries if index.is_torch else once(entries))
    is_index = path.name.endswith(SUFFIX)
    name = path.name if is_index else index.filename
    filled = filling(path.parent) if is_index else _filling(path, {*shards, name}, folder)
    with filled as made:
        for shard, of_shard in shards.items():
            metadata = index.metadata.get(shard, {})
            ties = write_ties(metadata, read_ties(metadata, before))
            _save_part(made / shard, of_shard, ties, is_packed=is_packed)
        (made / name).write_text(index.text(once(entries), before))


@contextmanager
def _filling(path: Path, written: Collection[str], folder: Folder | None) -> Iterator[Path]:
    """Does `filling`, with a copy of the files beside the weights in the source's folder."""
    if path.is_dir():
        check_no_other_weights(path, written)
    rest = None if folder is None else folder.rest(path)
    with filling(path) as made:
        if rest is not None:
            rest.copy_to(made)
        for name, text in folder.changed.items() if folder is not None else ():
            (made / name).write_text(text, "utf-8")
        yield made
    if rest is not None:
        rest.warn()


def _save_part(
    path: Path,
    entries: Entries,
    metadata: Metadata,
    torch_file: TorchFile | None = None,
    is_packed: bool = False,
) -> None:
    with path.open("wb") as file:
        _write(file, path, entries, metadata, torch_file, is_packed)


def _write(
    file: BinaryIO,
    path: Path,
    entries: Entries,
    metadata: Metadata,
    torch_file: TorchFile | None,
    is_packed: bool,
) -> None:
    if path.suffix in TORCH_SUFFIXES:
        _write_torch(file, entries, torch_file)
    elif is_packed:
        write_packed(file, path.absolute().parent, once(entries), metadata)
    else:
        file.writelines(TensorFile(once(entries), metadata).parts())


def warn_of_rest(place: Any, source: TorchFile | OnnxFile | None) -> None:
    """Warns of the content of a source beside its tensors, which only its own format can hold."""
    rest = source.rest if source is not None else ()
    if rest:
        kept = "an .onnx file" if isinstance(source, OnnxFile) else "a torch file (.pt)"
        text = f"{place}: without {', '.join(rest)}; {kept} keeps these too"
        warnings.warn(text, NotSaved, stacklevel=5)


def _write_torch(file: BinaryIO, entries: Entries, torch_file: TorchFile | None) -> None:
    import torch

    values = each_once(_torch_value, entries)
    content = values if torch_file is None else torch_file.with_values(values)
    try:
        torch.save(content, file)
    except OSError:
        raise
    except Exception as error:  # entries that are not sent may be any objects
        raise _CannotWrite(f"torch cannot write it: {error}") from None


def _torch_value(name: str, entry: Any) -> Any:
    if isinstance(entry, LocalTensor):
        return to_value(name, entry, True)
    is_weight = isinstance(entry, np.ndarray) and not is_extra_state(name)
    return _torch_tensor(name, entry) if is_weight else entry  # torch.load refuses arrays


def _torch_tensor(name: str, array: npt.NDArray[Any]) -> Any:
    import torch

    try:
        return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))
    except TypeError:
        raise _CannotWrite(f"{name}: torch has no {dtype_of(array)}; leave it out") from None
