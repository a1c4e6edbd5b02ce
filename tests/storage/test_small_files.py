"""Checkpoints of small files count with their whole blocks on disk."""

from pathlib import Path

import pytest

from secateur_server.errors import StoreFull
from secateur_server.storage.store import Store
from tests.contract.raw import entry, file, series
from tests.storage.stored import (
    DISK_BLOCK,
    OWNER,
    counted,
    create,
    file_message,
    kept,
    send_upload,
    upload_file,
    upload_requests,
)

LONG_NAME = "model-" + 200 * "x"
LIMIT = 40 * DISK_BLOCK


def taken(folder: Path) -> int:
    """Returns the bytes that the files of a store take on the disk, from the system."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return sum(path.stat().st_blocks * 512 for path in paths)


def test_tiny_checkpoints_keep_within_the_limit_on_disk(tmp_path: Path) -> None:
    """Checkpoints of 3 blocks: 13 of them and their folder fit into 40 blocks."""
    folder = tmp_path / "store"
    store = Store(folder, LIMIT, ttl=0)
    for index in range(30):
        create(store, index.to_bytes(4, "little"))
        assert taken(folder) <= store.used_bytes == counted(folder) <= LIMIT
    assert store.count == 13
    store.close()


@pytest.mark.parametrize("is_restarted", [False, True], ids=["same", "restarted"])
def test_record_of_many_files_counts_with_all_its_blocks(
    tmp_path: Path, is_restarted: bool
) -> None:
    folder = tmp_path / "store"
    store = Store(folder, 1 << 20, ttl=0)
    record = create(store, b"data", 100, name=LONG_NAME)
    if is_restarted:
        store.close()
        store = Store(folder, 1 << 20, ttl=0)
    assert taken(folder) <= store.used_bytes == counted(folder)
    assert store.used_bytes > 8 * DISK_BLOCK
    store.delete(OWNER, record.name)
    assert store.used_bytes == counted(folder) == 0
    store.close()


@pytest.mark.parametrize("is_restarted", [False, True], ids=["same", "restarted"])
def test_folder_of_each_owner_counts_as_long_as_it_has_checkpoints(
    tmp_path: Path, is_restarted: bool
) -> None:
    """Checkpoints of 3 blocks, each in a folder of its own: 10 of them fit into 40 blocks."""
    folder = tmp_path / "store"
    store = Store(folder, LIMIT, ttl=0)
    owners = [f"{index:032x}" for index in range(10)]
    made = {owner: create(store, owner.encode(), owner=owner) for owner in owners}
    if is_restarted:
        store.close()
        store = Store(folder, LIMIT, ttl=0)
    assert store.used_bytes == counted(folder) == LIMIT
    with pytest.raises(StoreFull):
        create(store, b"one too many")
    for owner, record in made.items():
        store.delete(owner, record.name)
        assert store.used_bytes == counted(folder)
    assert list((folder / "checkpoints").iterdir()) == []
    again = create(store, b"data", owner=owners[0])
    assert store.get(owners[0], again.name) == again
    assert store.used_bytes == counted(folder) == 4 * DISK_BLOCK
    store.close()


def test_empty_folder_of_an_owner_is_removed_at_the_start(tmp_path: Path) -> None:
    """A crash may leave it, between the removal of the last record and that of the folder."""
    left = tmp_path / "store" / "checkpoints" / OWNER
    left.mkdir(parents=True)
    store = Store(tmp_path / "store", LIMIT, ttl=0)
    assert not left.exists()
    assert store.used_bytes == 0
    store.close()


def test_records_of_many_files_keep_within_the_limit_on_disk(tmp_path: Path) -> None:
    """All records have the same files, so that only the records take space."""
    folder = tmp_path / "store"
    store = Store(folder, LIMIT, ttl=0)
    for _ in range(10):
        create(store, b"data", 100, name=LONG_NAME)
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
