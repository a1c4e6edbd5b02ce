"""Explains, by a file's first bytes, why it does not have the format of its suffix."""

from pathlib import Path

_MAGIC = {
    b"version https://git-lfs": "is a Git LFS pointer, not the weights; fetch them: git lfs pull",
    b"GGUF": "is a GGUF file, which cannot be read; give .safetensors or a torch file",
    b"\x89HDF": "is an HDF5 file, which cannot be read; give .safetensors or a torch file",
    b"\x1f\x8b": "is compressed with gzip; unpack it: gunzip",
    b"<": "is a web page or XML, not weights; download the file itself",
}
_ZIP = b"PK\x03\x04"
_TORCH = "is a file of torch.save, not of safetensors; rename it to .pt"
_SAFETENSORS = "is a safetensors file; rename it to .safetensors"
_DAMAGED = "is damaged or cut short; copy, download or save it again"


def open_reason(path: Path) -> str | None:
    """Returns why a file cannot be opened; None if it can.

    Libraries report every failure as a missing file.
    """
    try:
        with path.open("rb"):
            return None
    except OSError as error:
        return error.strerror


def torch_reason(path: Path) -> str:
    """Returns why torch cannot read a file, and what to do."""
    first = _first_bytes(path)
    if _is_torch(first):
        return _DAMAGED
    return _SAFETENSORS if _is_safetensors(first) else _reason(first, "torch.save")


def safetensors_reason(path: Path, library: object) -> str:
    """Returns why safetensors cannot read a file, and what to do.

    Args:
        path: The file.
        library: The library's error; shown if the file has a header.
    """
    first = _first_bytes(path)
    if _is_safetensors(first):
        return f"{_DAMAGED} ({library})"
    return _TORCH if _is_torch(first) else _reason(first, "safetensors")


def onnx_reason(path: Path, problem: object) -> str:
    """Returns why a file is not read as an ONNX model, and what to do."""
    first = _first_bytes(path)
    if not first or first.startswith(tuple(_MAGIC)):
        return _reason(first, "ONNX")
    if _is_safetensors(first):
        return _SAFETENSORS
    return f"is not an ONNX model, or is damaged: {problem}; copy, download or export it again"


def npz_reason(path: Path, library: object) -> str:
    """Returns why numpy cannot read a file of numpy.savez, and what to do."""
    first = _first_bytes(path)
    if first.startswith(_ZIP):
        return f"numpy cannot read it: {library}"
    return _SAFETENSORS if _is_safetensors(first) else _reason(first, "numpy.savez")


def is_torch(path: Path) -> bool:
    """Returns whether a file begins as those of torch.save."""
    return _is_torch(_first_bytes(path))


def is_gguf(path: Path) -> bool:
    """Returns whether a file that can be opened begins as those of GGUF."""
    return open_reason(path) is None and _first_bytes(path).startswith(b"GGUF")


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(256)


def _reason(first: bytes, format_name: str) -> str:
    if not first:
        return "is empty; copy, download or save it again"
    for magic, reason in _MAGIC.items():
        if first.startswith(magic):
            return reason
    what = "is text" if _is_text(first) else f"is not a file of {format_name}, or is damaged"
    return f"{what}; give weights: .safetensors, or a file of torch.save"


def _is_torch(first: bytes) -> bool:
    """A zip archive, or a pickle of protocol 2 to 5 as torch wrote before 1.6."""
    return first.startswith(_ZIP) or (first[:1] == b"\x80" and first[1:2] in b"\2\3\4\5")


def _is_safetensors(first: bytes) -> bool:
    """The length of the header, of less than 2^32 bytes, and a JSON object."""
    return first[4:9] == b"\0\0\0\0{"


def _is_text(first: bytes) -> bool:
    try:
        text = first.decode("ascii")
    except UnicodeDecodeError:
        return False
    return all(letter.isprintable() or letter.isspace() for letter in text)
