"""A checkpoint still exists if the disk does not remove its record."""

import errno
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from secateur_proto.checkpoints_pb2 import DeleteRequest
from secateur_proto.checkpoints_pb2_grpc import CheckpointsStub
from secateur_server.errors import CheckpointNotFound, StoreFailed
from secateur_server.runtime.context import RequestContext
from secateur_server.storage import clock as clock_module
from secateur_server.storage.records import Record
from secateur_server.storage.store import Store
from tests.contract.raw import TIMEOUT, check_failed, failure, series
from tests.reference import assert_same_tensors
from tests.storage.stored import OWNER, counted, create, downloaded, kept, model, on_disk
from tests.storage.test_clock import Machine

DATA = bytes(60_000)
MAX_BYTES, QUOTA, TTL = 100_000, 80_000, 1000.0


class FailingDisk:
    """Removes files as the system does, except for injected failures.

    Attributes:
        is_stuck: Whether the file of a path cannot be removed.
        is_syncing: Whether the entries of folders can be synced.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.is_syncing = folder, True
        self.is_stuck: Callable[[Path], bool] = lambda path: False
        self._unlink, self._fsync = os.unlink, os.fsync
        monkeypatch.setattr(os, "unlink", self.unlink)
        monkeypatch.setattr(os, "fsync", self.fsync)

    def unlink(self, path: Any, **options: Any) -> None:
        if self.is_stuck(Path(path)):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(path))
        self._unlink(path, **options)

    def fsync(self, descriptor: int) -> None:
        if not self.is_syncing and stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._fsync(descriptor)

    @contextmanager
    def stuck(self, is_stuck: Callable[[Path], bool] = lambda path: True) -> Iterator[None]:
        """Records cannot be removed."""
        self.is_stuck = lambda path: path.suffix == ".json" and is_stuck(path)
        yield
        self.is_stuck = lambda path: False

    @contextmanager
    def not_syncing(self) -> Iterator[None]:
        """Records are removed, but may exist again after a crash."""
        self.is_syncing = False
        yield
        self.is_syncing = True

    @contextmanager
    def moved(self) -> Iterator[None]:
        """The folder of the store is moved."""
        away = self.folder.with_name("moved")
        self.folder.rename(away)
        yield
        away.rename(self.folder)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    clocks = Machine()
    monkeypatch.setattr(clock_module, "time", clocks)
    return clocks


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FailingDisk:
    return FailingDisk(tmp_path / "store", monkeypatch)


@pytest.fixture
def evicted() -> list[str]:
    """The reasons of evictions by the stores of a test."""
    return []


@pytest.fixture
def opened(
    disk: FailingDisk, machine: Machine, evicted: list[str]
) -> Iterator[Callable[[], Store]]:
    """Opens the folder, and closes earlier stores."""
    stores: list[Store] = []

    def open_store() -> Store:
        for store in stores:
            store.close()
        stores.append(Store(disk.folder, MAX_BYTES, TTL, lambda why, count: evicted.append(why)))
        return stores[-1]

    yield open_store
    stores[-1].close()


def read(store: Store, record: Record) -> bytes:
    with store.open(RequestContext(), OWNER, record.name) as found:
        return b"".join(found.files[0].blocks())


def delete(store: Store, record: Record, machine: Machine) -> None:
    store.delete(OWNER, record.name)


def expire(store: Store, record: Record, machine: Machine) -> None:
    machine.step(2 * TTL)
    store.expire()


def need_room(store: Store, record: Record, machine: Machine) -> None:
    create(store, bytes(45_000))


def reach_quota(store: Store, record: Record, machine: Machine) -> None:
    create(store, bytes(30_000), quota=QUOTA)


# Ways to remove a checkpoint, and the counted reasons.
REMOVALS: Mapping[Callable[[Store, Record, Machine], None], list[str]] = {
    delete: [],
    expire: ["ttl"],
    need_room: ["room"],
    reach_quota: ["quota"],
}


@pytest.mark.parametrize("is_restarted", [False, True], ids=["same", "restarted"])
@pytest.mark.parametrize("failure_of", ["stuck", "not_syncing", "moved"])
@pytest.mark.parametrize("remove", REMOVALS)
def test_checkpoint_is_removed_entirely_or_not_at_all(
    disk: FailingDisk,
    opened: Callable[[], Store],
    machine: Machine,
    evicted: list[str],
    remove: Callable[[Store, Record, Machine], None],
    failure_of: str,
    is_restarted: bool,
) -> None:
    store = opened()
    record = create(store, DATA)
    files, used = on_disk(disk.folder), store.used_bytes
    with getattr(disk, failure_of)():
        for _ in range(2):
            with pytest.raises(StoreFailed):
                remove(store, record, machine)
            assert store.get(OWNER, record.name) == record
            assert store.page(OWNER, "", 9) == [record]
            assert (store.count, store.used_bytes, evicted) == (1, used, [])
    assert on_disk(disk.folder) == files
    if is_restarted:
        store = opened()
    assert read(store, record) == DATA
    assert store.used_bytes == used
    remove(store, record, machine)
    assert evicted == REMOVALS[remove]
    with pytest.raises(CheckpointNotFound):
        store.get(OWNER, record.name)
    assert not any(record.id in name for name in on_disk(disk.folder))
    assert store.used_bytes == counted(disk.folder)


def test_failed_removal_of_one_record_does_not_block_others(
    disk: FailingDisk, opened: Callable[[], Store], machine: Machine, evicted: list[str]
) -> None:
    """All have the same blob, which is removed with the last of them."""
    store = opened()
    made = [create(store, DATA)]
    made += [store.create(RequestContext(), OWNER, made[0].files) for _ in range(2)]
    with disk.stuck(lambda path: path.stem == made[1].id):
        with pytest.raises(StoreFailed):
            expire(store, made[1], machine)
        assert store.page(OWNER, "", 9) == [made[1]]
        assert evicted == ["ttl", "ttl"]
    assert read(store, made[1]) == DATA
    expire(store, made[1], machine)
    assert on_disk(disk.folder) == {}
    assert store.used_bytes == 0


def test_checkpoint_after_a_failed_removal_is_still_the_least_recently_used(
    disk: FailingDisk, opened: Callable[[], Store], machine: Machine
) -> None:
    store, made = opened(), []
    for value in range(2):
        machine.step(1)
        made.append(create(store, bytes([value]) * 30_000))
    with disk.stuck(), pytest.raises(StoreFailed):
        store.delete(OWNER, made[0].name)
    newest = create(store, bytes([2]) * 30_000)
    assert store.page(OWNER, "", 9) == [newest, made[1]]


def test_checkpoint_that_could_be_neither_created_nor_removed_exists(
    disk: FailingDisk, opened: Callable[[], Store]
) -> None:
    """The next start would find its record, which is on disk."""
    store = opened()
    first = create(store, DATA)  # its folder exists
    with disk.stuck(), disk.not_syncing(), pytest.raises(StoreFailed):
        store.create(RequestContext(), OWNER, first.files)
    found = store.page(OWNER, "", 9)
    assert len(found) == 2
    assert store.used_bytes == counted(disk.folder)
    for record in found:
        assert read(store, record) == DATA
        store.delete(OWNER, record.name)
    assert on_disk(disk.folder) == {}


def test_blob_that_cannot_be_removed_is_removed_at_the_next_start(
    disk: FailingDisk, opened: Callable[[], Store]
) -> None:
    """Its checkpoint is deleted, because its record is."""
    store = opened()
    record = create(store, DATA)
    disk.is_stuck = lambda path: path.parent.name == "blobs"
    store.delete(OWNER, record.name)
    disk.is_stuck = lambda path: False
    with pytest.raises(CheckpointNotFound):
        store.delete(OWNER, record.name)
    opened()
    assert on_disk(disk.folder) == {}


@pytest.mark.parametrize("is_damaged", [False, True], ids=["sound", "damaged"])
def test_failed_deletion_is_reported_to_the_caller(
    disk: FailingDisk, tmp_path: Path, is_damaged: bool
) -> None:
    """So it is for a checkpoint with a damaged record."""
    tensors = model(1000)
    with kept(disk.folder) as store:
        made = store.client.upload(tensors)
    if is_damaged:
        (record,) = (disk.folder / "checkpoints").rglob("*.json")
        record.write_text("damaged")
    with kept(disk.folder) as store:
        stub, request = CheckpointsStub(store.channel), DeleteRequest(name=made.name)
        with disk.stuck():
            for _ in range(2):
                found = failure(stub.Delete, request, timeout=TIMEOUT)
                found = check_failed(found, grpc.StatusCode.UNAVAILABLE, "STORE_FAILED")
                assert f"name: {made.name!r} was not deleted" in found.message
                assert os.strerror(errno.EPERM) in found.message
                assert "send it again" not in found.message
        if not is_damaged:
            assert series(store.server, "secateur_checkpoints") == 1
            assert_same_tensors(downloaded(store.client, made, tmp_path), tensors)
        store.client.delete(made)
        found = failure(stub.Delete, request, timeout=TIMEOUT)
        assert found is not None
        assert found.reason == "CHECKPOINT_NOT_FOUND"
