"""Writes files and folders whole, or not at all."""

import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from secateur_proto.index import SUFFIX


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a new file, and moves it to `path` when the block ends without an error.

    A file that replaces another has its mode; else the umask decides.
    """
    mode = _mode_of(path)
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


@contextmanager
def filling(path: Path) -> Iterator[Path]:
    """Makes an empty folder, and moves its files to `path` when the block ends without an error.

    A new `path` appears whole. In an existing one, each file appears whole and replaces one of its
    name; an index is the last.
    """
    is_new = not path.exists()
    beside = path.absolute().parent if is_new else path  # it may be a file system of its own
    with tempfile.TemporaryDirectory(dir=beside, prefix=f".{path.name}.") as temporary:
        made = Path(temporary) / "made"
        made.mkdir()  # the temporary folder itself has mode 0700
        yield made
        if is_new:
            made.rename(path)
        else:
            _move(made, path)


def _move(made: Path, path: Path) -> None:
    files = (file.relative_to(made) for file in made.rglob("*") if file.is_file())
    for file in sorted(files, key=lambda file: (file.name.endswith(SUFFIX), file)):
        target = path / file
        target.parent.mkdir(parents=True, exist_ok=True)
        mode = _mode_of(target)
        if mode is not None:
            (made / file).chmod(mode)
        (made / file).replace(target)


def _mode_of(path: Path) -> int | None:
    return stat.S_IMODE(path.stat().st_mode) if path.exists() else None
