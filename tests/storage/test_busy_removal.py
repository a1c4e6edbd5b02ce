"""While files are being removed, only calls that need their space wait."""

import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur
from secateur_server.runtime.context import RequestContext
from secateur_server.storage.accounts import Entry
from secateur_server.storage.store import Store
from tests.conftest import PATIENCE, eventually
from tests.reference import assert_same_tensors
from tests.storage.stored import (
    DISK_BLOCK,
    OWNER,
    Kept,
    blobs,
    counted,
    create,
    downloaded,
    in_blocks,
    kept,
    model,
)

MODEL = model(10_000)
HALF = secateur.l1_unstructured("*", 0.5)


class Gate:
    """Blocks the first call of a function for whose argument `is_held` is true."""

    def __init__(self, function: Callable[..., Any], is_held: Callable[[Any], bool]) -> None:
        self._function, self._is_held = function, is_held
        self._lock = threading.Lock()
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, argument: Any, *more: Any, **options: Any) -> Any:
        with self._lock:
            is_first = not self.reached.is_set() and self._is_held(argument)
            if is_first:
                self.reached.set()
        if is_first:
            assert self.opened.wait(PATIENCE)
        return self._function(argument, *more, **options)


def unlinks_blob(path: Any) -> bool:
    return Path(path).parent.name == "blobs"


def syncs_folder(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Kept]:
    with kept(tmp_path / "store") as running:
        yield running


@pytest.mark.parametrize(
    ("name", "is_held"),
    [("unlink", unlinks_blob), ("fsync", syncs_folder)],
    ids=["unlink", "fsync"],
)
def test_calls_are_served_while_the_disk_removes_files(
    store: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_held: Any
) -> None:
    removed, others = store.client.upload(MODEL), {"other": torch.ones(9)}
    gate = Gate(getattr(os, name), is_held)
    with secateur.Client(store.server.address, token="other", timeout=PATIENCE) as other:
        other.delete(other.upload({"first": torch.ones(1)}))  # its folder exists
        monkeypatch.setattr(os, name, gate)
        deleting = threading.Thread(target=store.client.delete, args=(removed,))
        deleting.start()
        assert gate.reached.wait(PATIENCE)
        for client in (store.client, other):
            made = client.upload(others)
            assert client.checkpoint(made.name) == made
            assert list(client.checkpoints()) == [made]
            assert client.prune(made, HALF, keep=True).checkpoint is not None
            assert client.report(made).total == 9
            with pytest.raises(secateur.CheckpointNotFound):
                client.checkpoint(removed.name)
        assert deleting.is_alive()
        gate.opened.set()
        deleting.join(PATIENCE)


def test_blob_being_removed_is_written_again_after_its_removal(
    store: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = store.client.upload(MODEL)
    gate = Gate(os.unlink, unlinks_blob)
    monkeypatch.setattr(os, "unlink", gate)
    made: list[secateur.Checkpoint] = []
    deleting = threading.Thread(target=store.client.delete, args=(first,))
    deleting.start()
    assert gate.reached.wait(PATIENCE)
    sending = threading.Thread(target=lambda: made.append(store.client.upload(MODEL)))
    sending.start()
    parts = store.folder / "parts"
    size = first.files[0].size_bytes
    eventually(lambda: [path.stat().st_size for path in parts.iterdir()], [size])
    gate.opened.set()
    for thread in (deleting, sending):
        thread.join(PATIENCE)
    assert set(blobs(store.folder)) == {first.files[0].blake3}
    assert_same_tensors(downloaded(store.client, made[0], tmp_path), MODEL)


def test_evicted_files_are_off_the_disk_before_the_space_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So they are for a call that uses space which another call frees."""
    limit, folder, write = 110_000 + DISK_BLOCK, tmp_path / "store", os.write
    store, sizes = Store(folder, limit, ttl=0), list[int]()
    create(store, bytes(60_000))

    def counted_write(descriptor: int, data: memoryview) -> int:
        sizes.append(counted(folder) + in_blocks(len(data)))
        return write(descriptor, data)

    gate = Gate(os.unlink, unlinks_blob)
    monkeypatch.setattr(os, "unlink", gate)
    monkeypatch.setattr(os, "write", counted_write)
    half = [bytes([value]) * 42_000 for value in (1, 2)]
    sending = [threading.Thread(target=create, args=(store, data)) for data in half]
    sending[0].start()
    assert gate.reached.wait(PATIENCE)
    sending[1].start()
    eventually(lambda: store.used_bytes > 60_000 + 2 * 42_000, True)
    gate.opened.set()
    for thread in sending:
        thread.join(PATIENCE)
    assert store.count == 2
    assert max(sizes) <= limit
    store.close()


def test_victims_are_chosen_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quota evicts some of many checkpoints: only those are read, each a few times."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    owner, count, victims = OWNER, 600, 200
    store = Store(tmp_path / "store", 1 << 30, ttl=0)
    upload = store.uploads.begin(owner, 100)
    store.uploads.write(upload, bytes(100))
    file = store.uploads.finish(RequestContext(), upload, "a")
    made = [store.create(RequestContext(), owner, (file,)) for _ in range(count)]
    store.uploads.leave(upload)
    reads: dict[Entry, int] = {}
    files = Entry.files

    def counted_files(entry: Entry) -> Any:
        reads[entry] = reads.get(entry, 0) + 1
        return files(entry)

    monkeypatch.setattr(Entry, "files", counted_files)
    # Records, their folder, and two files with their sums.
    quota = (count - victims + 1 + 2 * 2) * DISK_BLOCK
    newest = store.uploads.begin(owner, 100, quota=quota)
    store.uploads.write(newest, bytes(range(100)))
    assert store.count == count - victims
    assert {entry.record.id for entry in reads} == {record.id for record in made[:victims]}
    assert max(reads.values()) <= 10
    store.close()
