"""Files that are there whole, or not at all."""

import os
import secrets
import stat
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from secateur.errors import NotSaved, SecateurError
from secateur.shards import Index
from secateur.tensors import LocalTensor, to_value
from secateur.torch_files import KNOWN_SUFFIXES, TORCH_SUFFIXES, TorchFile
from secateur_proto.framing import file_header
from secateur_proto.index import SUFFIX


def save(
    path: Path,
    tensors: Mapping[str, LocalTensor],
    metadata: Mapping[str, str],
    index: Index | None = None,
    before: Mapping[str, LocalTensor] | None = None,
    torch_file: TorchFile | None = None,
) -> None:
    """Writes tensors as .safetensors or a torch file; those of `index` as shards, into a folder.

    before: what the model was, of which the index tells.  torch_file: what it was read from, of
    which a torch file keeps all but the tensors.  Errors: SecateurError.
    """
    check_writable(path)
    try:
        if path.is_dir() or path.name.endswith(SUFFIX):
            _save_shards(path, tensors, index, tensors if before is None else before)
            return
        with replacing(path) as file:
            if path.suffix == ".safetensors":
                warn_of_others(path, torch_file)
                _write_safetensors(file, tensors, metadata)
            else:
                _write_torch(file, tensors, torch_file)
    except OSError as error:
        raise SecateurError(f"{path}: cannot write it: {error.strerror}") from None


def check_writable(path: Path) -> None:
    """Refuses early what `save` would refuse.  Errors: SecateurError."""
    if path.is_dir() or path.name.endswith(SUFFIX):
        return
    if path.suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise SecateurError(
            f"{path}: unknown suffix {path.suffix!r}; known are {KNOWN_SUFFIXES}, "
            "or name a folder that exists"
        )
    if not path.absolute().parent.is_dir():
        raise SecateurError(f"{path}: there is no such folder")


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
            _write_safetensors(shard, of_shard, index.metadata.get(name, {}))


def _write_safetensors(
    file: BinaryIO, tensors: Mapping[str, LocalTensor], metadata: Mapping[str, str]
) -> None:
    file.write(file_header(((name, t.dtype, t.shape) for name, t in tensors.items()), metadata))
    for tensor in tensors.values():
        file.write(tensor.read().data)


def warn_of_others(place: Any, torch_file: TorchFile | None) -> None:
    """Warns of what a torch file holds beside its tensors, which .safetensors cannot."""
    others = torch_file.others if torch_file is not None else ()
    if others:
        text = f"{place}: without {', '.join(others)}; a torch file (.pt) keeps what is no tensor"
        warnings.warn(text, NotSaved, stacklevel=4)


def _write_torch(
    file: BinaryIO, tensors: Mapping[str, LocalTensor], torch_file: TorchFile | None
) -> None:
    import torch

    values: dict[str, Any] = {name: to_value(tensor, True) for name, tensor in tensors.items()}
    torch.save(values if torch_file is None else torch_file.with_values(values), file)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path` that takes its place when the block ends without an error.

    A file that is replaced passes on its mode; a new one has what the umask allows.
    """
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else None
    part = path.absolute().with_name(f".{path.name}.{secrets.token_hex(4)}")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    with open(os.open(part, flags, 0o666 if mode is None else 0o600), "w+b") as file:
        try:
            yield file
            file.flush()
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            os.replace(part, path)
        except BaseException:
            part.unlink()
            raise
