"""Files that are there whole, or not at all."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from secateur.errors import SecateurError
from secateur.others import check_storable
from secateur.shards import Index
from secateur.tensors import LocalTensor, is_extra_state, to_value
from secateur.ties import each_once, once
from secateur_proto.framing import file_header
from secateur_proto.index import SUFFIX
from secateur_proto.ties import read_ties, write_ties


def save(
    path: Path,
    entries: Mapping[str, Any],
    metadata: Mapping[str, str],
    index: Index | None = None,
    before: Mapping[str, LocalTensor] | None = None,
) -> None:
    """Writes a model as .safetensors, .pt or .pth; that of `index` as shards, into a folder.

    entries: each a LocalTensor, or a value that only .pt and .pth can hold.
    before: what the model was, of which the index tells.  Errors: SecateurError.
    """
    check_writable(path, entries)
    try:
        if path.is_dir() or path.name.endswith(SUFFIX):
            stored = once(entries)
            _save_shards(path, stored, index, stored if before is None else before)
            return
        with replacing(path) as file:
            if path.suffix == ".safetensors":
                _write_safetensors(file, once(entries), metadata)
            else:
                _write_torch(file, path, entries)
    except OSError as error:
        raise SecateurError(f"{path}: cannot write it: {error.strerror}") from None


def check_writable(path: Path, entries: Mapping[str, Any] | None = None) -> None:
    """Refuses early what `save` would refuse.  Errors: SecateurError.

    entries: as of `save`; those that are known.
    """
    if path.is_dir() or path.name.endswith(SUFFIX):
        return
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        kinds = "neither .safetensors nor .pt nor .pth, nor a folder that is there"
        raise SecateurError(f"{path}: {kinds}")
    if not path.absolute().parent.is_dir():
        raise SecateurError(f"{path}: there is no such folder")
    if path.suffix == ".safetensors":
        check_storable(str(path), entries or {}, "write .pt instead")


def _save_shards(
    path: Path,
    tensors: Mapping[str, LocalTensor],
    index: Index | None,
    before: Mapping[str, LocalTensor],
) -> None:
    """Writes the same shards that a model came in, and an index, which is there last."""
    if index is None:
        raise SecateurError(f"{path}: the model did not come in shards; name a file")
    path = path / index.filename if path.is_dir() else path
    with replacing(path) as file, ExitStack() as files:
        file.write(index.text(tensors, before).encode())
        for name, of_shard in index.shards(tensors).items():
            shard = files.enter_context(replacing(path.with_name(name)))
            metadata = index.metadata.get(name, {})
            ties = write_ties(metadata, read_ties(metadata, before))
            _write_safetensors(shard, of_shard, ties)


def _write_safetensors(
    file: BinaryIO, tensors: Mapping[str, LocalTensor], metadata: Mapping[str, str]
) -> None:
    file.write(file_header(((name, t.dtype, t.shape) for name, t in tensors.items()), metadata))
    for tensor in tensors.values():
        file.write(tensor.read().data)


def _write_torch(file: BinaryIO, path: Path, entries: Mapping[str, Any]) -> None:
    import torch

    try:
        torch.save(each_once(_torch_value, entries), file)
    except (OSError, SecateurError):
        raise
    except Exception as error:  # an entry that is not sent may be any object
        raise SecateurError(f"{path}: torch cannot write it: {error}") from None


def _torch_value(name: str, entry: Any) -> Any:
    import torch

    if isinstance(entry, LocalTensor):
        return to_value(name, entry, True)
    is_weight = isinstance(entry, np.ndarray) and not is_extra_state(name)
    return torch.as_tensor(entry) if is_weight else entry  # torch.load refuses arrays


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path` that takes its place when the block has ended well."""
    with tempfile.NamedTemporaryFile(
        dir=path.absolute().parent, prefix=f".{path.name}.", delete=False
    ) as file:
        try:
            yield file  # type: ignore[misc]
            file.flush()
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
