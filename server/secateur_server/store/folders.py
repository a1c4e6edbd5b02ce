"""The folder of a store: how much it may hold, and where it is if nobody says."""

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path


def default_max_bytes(folder: Path) -> int:
    """Three quarters of what is free on the disk of a store, and of what it has there already.

    Of what is free alone it would be less with each start, and drive out what was kept.
    """
    held = 0
    with suppress(FileNotFoundError), os.scandir(folder / "blobs") as blobs:
        held = sum(blob.stat().st_size for blob in blobs)
    return (shutil.disk_usage(folder).free + held) * 3 // 4


def temporary_folder() -> Path:
    """A private folder for a store that ends with its server; those that were left behind go."""
    for path in Path(tempfile.gettempdir()).glob("secateur-store-*"):
        with suppress(OSError), (path / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path)
    return Path(tempfile.mkdtemp(prefix="secateur-store-"))
