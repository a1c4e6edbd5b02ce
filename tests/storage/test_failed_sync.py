"""After a failed sync the kernel may have dropped data: no call reports such data as stored."""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

import secateur
from secateur_proto.checkpoints_pb2_grpc import CheckpointsStub
from secateur_server.runtime import disk as disk_module
from tests.conftest import eventually
from tests.contract.raw import check_failed, failure, kept_open
from tests.reference import assert_same_tensors
from tests.storage.stored import (
    Kept,
    blobs,
    check_tidy,
    committed,
    downloaded,
    file_message,
    file_of,
    kept,
    model,
    on_disk,
    send_upload,
    upload_file,
    upload_requests,
)

MIB = 1 << 20
MODEL = model(MIB, 1)  # 4 MiB
HALF = secateur.l1_unstructured("*", 0.5)


class FailingDisk:
    """Syncs like a system that drops the data of a failed sync.

    Attributes:
        failing: How many syncs succeed before one fails; negative for none.
        count: The number of all syncs.
    """

    def __init__(self) -> None:
        self.count, self.failing = 0, -1
        self._synced: dict[str, int] = {}  # bytes by path
        self._fsync = os.fsync

    def __call__(self, descriptor: int) -> None:
        self.count += 1
        self.failing -= 1
        found, path = os.fstat(descriptor), os.readlink(f"/proc/self/fd/{descriptor}")
        if self.failing == -1:
            if stat.S_ISREG(found.st_mode):
                begin = self._synced.get(path, 0)
                os.pwrite(descriptor, bytes(found.st_size - begin), begin)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._synced[path] = found.st_size
        self._fsync(descriptor)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FailingDisk:
    failing = FailingDisk()
    monkeypatch.setattr(os, "fsync", failing)
    monkeypatch.setattr(disk_module, "_SYNC_BYTES", MIB)
    return failing


@pytest.fixture
def store(tmp_path: Path, disk: FailingDisk) -> Iterator[Kept]:
    with kept(tmp_path / "store") as running:
        yield running


def test_after_any_failed_sync_the_model_is_sent_again_and_complete(
    store: Kept, disk: FailingDisk, tmp_path: Path
) -> None:
    tensors = {"w": MODEL["b"]}
    before = disk.count
    made = [store.client.upload(tensors)]
    syncs = disk.count - before
    assert syncs >= 8  # of parts of the file, its end, sums, folders and a record
    store.client.delete(made.pop())
    for failing in range(syncs):
        tensors["w"] = tensors["w"] + 1
        disk.failing = failing
        made.append(store.client.upload(tensors))
        assert_same_tensors(downloaded(store.client, made[-1], tmp_path), tensors)
        check_tidy(store.folder, len(made), [each.files[0].blake3 for each in made])
    assert store.server.log.read_text().count("the store's disk failed") == syncs - 1


def test_kept_prune_with_a_failed_sync_leaves_nothing(store: Kept, disk: FailingDisk) -> None:
    uploaded = store.client.upload(MODEL)
    before, syncs = on_disk(store.folder), disk.count
    pruned = store.client.prune(uploaded, HALF, keep=True).checkpoint
    assert pruned is not None
    syncs = disk.count - syncs
    store.client.delete(pruned)
    for failing in range(syncs):
        disk.failing = failing
        with pytest.raises(secateur.Unavailable, match="disk failed"):
            store.client.prune(uploaded, HALF, keep=True)
        assert on_disk(store.folder) == before


def test_staged_file_with_a_failed_sync_is_dropped(store: Kept, disk: FailingDisk) -> None:
    data = file_of(MODEL)
    message = file_message(data)
    disk.failing = 1
    requests = upload_requests([upload_file(message)], data)
    found = failure(send_upload, store.channel, requests)
    check_failed(found, grpc.StatusCode.UNAVAILABLE, "STORE_FAILED")
    assert committed(store.channel, message) == 0
    assert on_disk(store.folder) == {}


def test_staged_file_of_a_broken_upload_is_synced_or_dropped(
    store: Kept, disk: FailingDisk
) -> None:
    """A later call opens the file again, and the kernel may not report earlier failures."""
    data = file_of(MODEL)
    message, count = file_message(data), MIB // 2
    with kept_open(upload_requests([upload_file(message)], data[:count])) as messages:
        call = CheckpointsStub(store.channel).Upload.future(messages)
        eventually(lambda: committed(store.channel, message), count)
        disk.failing = 0
        call.cancel()
        eventually(lambda: on_disk(store.folder), {})
    assert committed(store.channel, message) == 0


def test_acknowledged_checkpoints_are_complete_after_a_restart(
    tmp_path: Path, disk: FailingDisk
) -> None:
    folder, expected = tmp_path / "store", {}
    with kept(folder) as store:
        for failing in range(8):
            disk.failing = failing
            tensors = {"w": MODEL["b"] + failing}
            expected[store.client.upload(tensors)] = tensors
    disk.failing = -1
    with kept(folder) as store:
        assert set(store.client.checkpoints()) == expected.keys()
        for checkpoint, tensors in expected.items():
            assert_same_tensors(downloaded(store.client, checkpoint, tmp_path), tensors)
        assert len(blobs(folder)) == len(expected)
