"""Checkpoints of small files count with their whole blocks on disk."""

from pathlib import Path

import pytest

from secateur_server.runtime.context import RequestContext
from secateur_server.storage.records import Record
from secateur_server.storage.store import Store
from tests.contract.raw import entry, file, series
from tests.storage.stored import (
    DISK_BLOCK,
    counted,
    file_message,
    kept,
    send_upload,
    upload_file,
    upload_requests,
)

OWNER = "a" * 32
LIMIT = 40 * DISK_BLOCK


def send(store: Store, data: bytes, count: int = 1) -> Record:
    """Makes a checkpoint of `count` files with the same data."""
    upload = store.uploads.begin(OWNER, len(data))
    store.uploads.write(upload, data)
    stored = store.uploads.finish(RequestContext(), upload, "model-" + 200 * "x")
    try:
        return store.create(OWNER, count * (stored,))
    finally:
        store.uploads.leave(upload)


def taken(folder: Path) -> int:
    """Returns the bytes that the files of a store take on the disk, from the system."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return sum(path.stat().st_blocks * 512 for path in paths)


def test_tiny_checkpoints_keep_within_the_limit_on_disk(tmp_path: Path) -> None:
    """Checkpoints of 3 blocks: 13 of them fit into 40 blocks."""
    folder = tmp_path / "store"
    store = Store(folder, LIMIT, ttl=0)
    for index in range(30):
        send(store, index.to_bytes(4, "little"))
        assert taken(folder) <= store.used_bytes == counted(folder) <= LIMIT
    assert store.count == 13
    store.close()


@pytest.mark.parametrize("is_restarted", [False, True], ids=["same", "restarted"])
def test_record_of_many_files_counts_with_all_its_blocks(
    tmp_path: Path, is_restarted: bool
) -> None:
    folder = tmp_path / "store"
    store = Store(folder, 1 << 20, ttl=0)
    record = send(store, b"data", 100)
    if is_restarted:
        store.close()
        store = Store(folder, 1 << 20, ttl=0)
    assert taken(folder) <= store.used_bytes == counted(folder)
    assert store.used_bytes > 8 * DISK_BLOCK
    store.delete(OWNER, record.name)
    assert store.used_bytes == counted(folder) == 0
    store.close()


def test_records_of_many_files_keep_within_the_limit_on_disk(tmp_path: Path) -> None:
    """All records have the same files, so that only the records take space."""
    folder = tmp_path / "store"
    store = Store(folder, LIMIT, ttl=0)
    for _ in range(10):
        send(store, b"data", 100)
        assert taken(folder) <= counted(folder) <= LIMIT
    store.close()


def test_metrics_and_evictions_count_whole_blocks(tmp_path: Path) -> None:
    with kept(tmp_path / "store", "--store-max-bytes", str(LIMIT)) as store:
        for index in range(14):
            data = file({"w": entry("F32", [1], 0, 4)}, index.to_bytes(4, "little"))
            files = [upload_file(file_message(data, "é" * 120 + ".safetensors"))]
            send_upload(store.channel, upload_requests(files, data))
        assert series(store.server, "secateur_store_bytes") == counted(store.folder)
        assert series(store.server, "secateur_evicted_bytes_total") == 3 * DISK_BLOCK
