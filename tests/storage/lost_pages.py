"""A disk that loses unsynced data when its server is killed, as in a power failure."""

import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

PAGE = 4096


@dataclass(frozen=True)
class LosingDisk:
    """A folder whose unsynced writes are lost in a crash.

    Attributes:
        library: Is preloaded into the process that writes.
        store: The folder.
        synced: Where the library records what was synced.
    """

    library: Path
    store: Path
    synced: Path

    @contextmanager
    def preloaded(self) -> Iterator[None]:
        """Processes that start in the block write to this disk."""
        wanted = {
            "LD_PRELOAD": str(self.library),
            "LOST_PAGES_STORE": str(self.store),
            "LOST_PAGES_DISK": str(self.synced),
        }
        with pytest.MonkeyPatch.context() as patch:
            for name, value in wanted.items():
                patch.setenv(name, value)
            yield

    def begin(self) -> None:
        """Records the content of the folder as synced."""
        shutil.rmtree(self.synced, ignore_errors=True)
        for name in ("files", "folders"):
            (self.synced / name).mkdir(parents=True)
        ids = _ids(self.store)
        for path, ident in ids.items():
            if path.is_dir():
                lines = [f"{entry} {name}\n" for name, entry in _names(path, ids).items()]
                self._listing(path).write_text("".join(lines))
            else:
                shutil.copyfile(path, self.synced / "files" / ident)

    def crash(self, draws: random.Random) -> int:
        """Replaces the folder by what `leave` leaves of it.

        Returns:
            How many names and files differ from the last state.
        """
        after = self.store.with_name("after")
        lost = self.leave(after, draws)
        shutil.rmtree(self.store)
        after.rename(self.store)
        self.begin()
        return lost

    def leave(self, target: Path, draws: random.Random) -> int:
        """Writes to `target` what a disk may have after a crash.

        Each name and each page of a file is at random in its synced or in its last state. Pages
        that were never synced may be zeros.

        Returns:
            How many names and files differ from the last state.
        """
        crash = _Crash(self, draws)
        crash.rebuild(self.store, target)
        return crash.lost

    def listed(self, folder: Path) -> dict[str, str]:
        """Returns the kind and the id of each name in a folder when it was last synced."""
        listing = self._listing(folder)
        lines = listing.read_text().splitlines() if listing.exists() else []
        return {
            name: f"{kind} {ident}" for kind, ident, name in (line.split(" ", 2) for line in lines)
        }

    def _listing(self, folder: Path) -> Path:
        name = f"top{str(folder).removeprefix(str(self.store))}"
        return self.synced / "folders" / name.replace("/", "%")


class _Crash:
    """One crash.

    Attributes:
        lost: How many names and files differ from the last state.
    """

    def __init__(self, disk: LosingDisk, draws: random.Random) -> None:
        self._disk, self._draws, self.lost = disk, draws, 0
        self._ids = _ids(disk.store)
        self._files = {ident: path for path, ident in self._ids.items()}

    def rebuild(self, folder: Path, target: Path) -> None:
        """Writes to `target` what may be left of `folder`."""
        target.mkdir()
        last = _names(folder, self._ids) if folder.is_dir() else {}
        synced = self._disk.listed(folder)
        for name in sorted(last.keys() | synced.keys()):
            entry = self._draws.choice([last.get(name), synced.get(name)])
            self.lost += entry != last.get(name)
            if entry is None:
                continue
            kind, _, ident = entry.partition(" ")
            if kind == "d":
                self.rebuild(folder / name, target / name)
            else:
                (target / name).write_bytes(self._content(ident))

    def _content(self, ident: str) -> bytes:
        """Returns what may be left of a file."""
        path, copy = self._files.get(ident), self._disk.synced / "files" / ident
        synced = copy.read_bytes() if copy.exists() else b""
        last = path.read_bytes() if path else synced
        if synced == last:
            return last
        self.lost += 1
        size = self._draws.choice([len(synced), len(last)])
        pages = [
            self._draws.choice([synced, last])[at : at + PAGE].ljust(PAGE, b"\0")
            for at in range(0, size, PAGE)
        ]
        return b"".join(pages)[:size]


def _names(folder: Path, ids: dict[Path, str]) -> dict[str, str]:
    paths = list(folder.iterdir())
    return {path.name: f"{'d' if path.is_dir() else 'f'} {ids[path]}" for path in paths}


def _ids(folder: Path) -> dict[Path, str]:
    """Returns the id of a folder and of all that it contains: inode and time of birth."""
    paths = [folder, *folder.rglob("*")]
    ended = subprocess.run(
        ["stat", "--printf", "%i %W %w\\n", *paths], check=True, capture_output=True, text=True
    )
    found = {}
    for path, line in zip(paths, ended.stdout.splitlines(), strict=True):
        inode, seconds, born = line.split(" ", 2)
        fraction = born.partition(".")[2][:9]  # Python has no time of birth on Linux
        found[path] = f"{inode}-{seconds}-{int(fraction or 0)}"
    return found


def losing_disk(folder: Path) -> LosingDisk:
    """Makes a disk in `folder`. Skips the test without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library, source = folder / "lost_pages.so", Path(__file__).with_name("lost_pages.c")
    options = ["-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-pthread", "-ldl"]
    subprocess.run([compiler, "-o", library, source, *options], check=True)
    disk = LosingDisk(library, folder / "store", folder / "synced")
    disk.store.mkdir()
    disk.begin()
    return disk
