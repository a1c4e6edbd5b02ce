"""A failing or full disk affects only the data on it, and damaged data is never sent."""

import os
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

import secateur
from secateur_proto.checkpoints_pb2 import DownloadRequest
from secateur_proto.checkpoints_pb2_grpc import CheckpointsStub
from tests.conftest import eventually
from tests.contract.raw import TIMEOUT, check_failed, failure, header, message, send, series
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
    received,
)

MIB = 1 << 20
PAGE = 4096
MODEL = model(600_000, 1)  # 2.3 MiB: three blocks of the store
OTHER = model(1000, 2)
HALF = secateur.l1_unstructured("*", 0.5)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    with kept(tmp_path_factory.mktemp("damage"), of_its_own=True) as running:
        yield running


@pytest.fixture
def sound(store: Kept, tmp_path: Path) -> Iterator[secateur.Checkpoint]:
    """A checkpoint on the same disk, which the test must not affect."""
    checkpoint = store.client.upload(OTHER)
    yield checkpoint
    assert_same_tensors(downloaded(store.client, checkpoint, tmp_path), OTHER)
    for each in store.client.checkpoints():
        store.client.delete(each)
    eventually(lambda: on_disk(store.folder), {})


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


# Damage to a blob of MODEL.
DAMAGES: dict[str, Callable[[Path], object]] = {
    "its length": lambda blob: flip(blob, 0),
    "header": lambda blob: flip(blob, 20),
    "first weight": lambda blob: flip(blob, 300),
    "last weight": lambda blob: flip(blob, -1),
    "first sum": lambda blob: flip(sums_of(blob), 0),
    "last sum": lambda blob: flip(sums_of(blob), -1),
    "cut": lambda blob: blob.write_bytes(blob.read_bytes()[:-1]),
    "grown": lambda blob: blob.write_bytes(blob.read_bytes() + b"\0"),
    "empty": lambda blob: blob.write_bytes(b""),
    "gone": lambda blob: blob.unlink(),
    "sums cut": lambda blob: sums_of(blob).write_bytes(b""),
    "sums gone": lambda blob: sums_of(blob).unlink(),
}
every_damage = pytest.mark.parametrize("damage", DAMAGES)


def sums_of(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.sums")


def blob_of(store: Kept, checkpoint: secateur.Checkpoint) -> Path:
    return store.folder / "blobs" / checkpoint.files[0].blake3


def calls(checkpoint: Any, folder: Path) -> dict[str, Callable[[secateur.Client], object]]:
    """Returns every call that reads all of a checkpoint."""
    path = folder / "out.safetensors"
    return {
        "download": lambda client: client.download(checkpoint, path),
        "pairs": lambda client: client.download(checkpoint, path, output="reparametrized"),
        "prune": lambda client: client.prune(checkpoint, HALF, output="dense"),
        "keep": lambda client: client.prune(checkpoint, HALF, keep=True),
        "report": lambda client: client.report(checkpoint),
        "finalize": lambda client: client.finalize(checkpoint),
    }


def check_data_loss(store: Kept, checkpoint: secateur.Checkpoint, folder: Path) -> None:
    """Checks that every call on a checkpoint fails with data loss, and names it."""
    before = set(store.client.checkpoints())
    for call in calls(checkpoint, folder).values():
        with pytest.raises(secateur.DataLoss, match=checkpoint.name):
            call(store.client)
    assert list(folder.iterdir()) == []
    assert set(store.client.checkpoints()) == before


@every_damage
def test_damaged_data_is_never_returned_and_an_upload_repairs_it(
    store: Kept, sound: secateur.Checkpoint, tmp_path: Path, damage: str
) -> None:
    uploaded = store.client.upload(MODEL)
    DAMAGES[damage](blob_of(store, uploaded))
    check_data_loss(store, uploaded, tmp_path)
    assert committed(store.channel, file_message(file_of(MODEL))) == 0
    again = store.client.upload(MODEL)
    for checkpoint in (again, uploaded):
        assert_same_tensors(downloaded(store.client, checkpoint, tmp_path), MODEL)


def test_lack_of_file_descriptors_is_not_data_loss(store: Kept) -> None:
    uploaded = store.client.upload(MODEL)
    store.client.report(uploaded)
    pid, kind = store.server.process.pid, resource.RLIMIT_NOFILE
    before = resource.prlimit(pid, kind)
    first = message("Report", header=header("Report", 0, checkpoint=uploaded.name))
    assert failure(send, store.channel, "Report", [first]) is None
    resource.prlimit(pid, kind, (3, before[1]))
    found = failure(send, store.channel, "Report", [first])
    resource.prlimit(pid, kind, before)
    assert found is not None
    assert found.code == grpc.StatusCode.RESOURCE_EXHAUSTED, found
    assert committed(store.channel, file_message(file_of(MODEL))) == len(file_of(MODEL))
    store.client.report(uploaded)


@every_damage
def test_upload_detects_undetected_damage(
    store: Kept, sound: secateur.Checkpoint, tmp_path: Path, damage: str
) -> None:
    """After a successful upload the caller may delete its own copy."""
    first = store.client.upload(MODEL)
    DAMAGES[damage](blob_of(store, first))
    again = store.client.upload(MODEL)
    for checkpoint in (again, first):
        assert_same_tensors(downloaded(store.client, checkpoint, tmp_path), MODEL)
    sent = received(store.server)
    store.client.upload(MODEL)
    assert received(store.server) == sent


@every_damage
def test_damaged_masks_are_never_applied(
    store: Kept, sound: secateur.Checkpoint, tmp_path: Path, damage: str
) -> None:
    uploaded = store.client.upload(MODEL)
    before = set(blobs(store.folder))
    pruned = store.client.prune(uploaded, HALF, keep=True)
    (masks,) = set(blobs(store.folder)) - before
    assert pruned.checkpoint is not None
    DAMAGES[damage](store.folder / "blobs" / masks)
    check_data_loss(store, pruned.checkpoint, tmp_path)
    assert_same_tensors(downloaded(store.client, uploaded, tmp_path), MODEL)
    again = store.client.prune(uploaded, HALF, keep=True)  # it makes the same masks
    expected = {name: tensor * again.masks[name] for name, tensor in MODEL.items()}
    for checkpoint in (again.checkpoint, pruned.checkpoint):
        assert checkpoint is not None
        assert_same_tensors(downloaded(store.client, checkpoint, tmp_path), expected)


def test_status_names_the_damaged_file_and_offset(store: Kept, sound: secateur.Checkpoint) -> None:
    uploaded = store.client.upload(MODEL)
    flip(blob_of(store, uploaded), -1)
    stub = CheckpointsStub(store.channel)
    request = DownloadRequest(name=uploaded.name)
    found = failure(lambda: list(stub.Download(request, timeout=TIMEOUT)))
    found = check_failed(found, grpc.StatusCode.DATA_LOSS, "DATA_LOSS")
    assert uploaded.name in found.message
    assert f"from byte {2 * MIB} on" in found.message


RECORDS: dict[str, Callable[[Path], object]] = {
    "digest": lambda path: flip(path, 3),
    "text": lambda path: flip(path, -10),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "empty": lambda path: path.write_bytes(b""),
    "no text": lambda path: path.write_bytes(b"\xff\0\n\n\n\n"),
    "of another": lambda path: path.write_bytes(
        next(p for p in path.parent.iterdir() if p != path).read_bytes()
    ),
}


def test_damaged_record_is_data_loss_and_others_are_served(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with kept(folder) as store:
        sound = store.client.upload(OTHER)
        lost = {name: store.client.upload({**OTHER, name: OTHER["b"]}) for name in RECORDS}
    (owner,) = (folder / "checkpoints").iterdir()
    for name, checkpoint in lost.items():
        RECORDS[name](owner / f"{checkpoint.name.removeprefix('checkpoints/')}.json")
    left = set(blobs(folder))
    with kept(folder) as store:
        for checkpoint in lost.values():
            with pytest.raises(secateur.DataLoss, match=checkpoint.name):
                store.client.checkpoint(checkpoint.name)
            for call in calls(checkpoint, tmp_path).values():
                with pytest.raises(secateur.DataLoss, match=checkpoint.name):
                    call(store.client)
        assert [each.name for each in store.client.checkpoints()] == [sound.name]
        assert_same_tensors(downloaded(store.client, sound, tmp_path), OTHER)
        assert set(blobs(folder)) == left  # a damaged record may name any of them
        for name in lost:
            store.client.upload({**OTHER, name: OTHER["b"]})
        assert len(list(store.client.checkpoints())) == 1 + len(lost)
        assert lost[name].name in store.server.log.read_text()


def test_unfinished_files_are_removed_at_the_start(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with kept(folder) as store:
        uploaded = store.client.upload(MODEL)
    (owner,) = (folder / "checkpoints").iterdir()
    left = {
        folder / "parts" / "0123": 1000,
        folder / "parts" / "0123.sums": 32,
        folder / "blobs" / ("ab" * 32): 500,
        folder / "blobs" / f"{'cd' * 32}.sums": 64,
        owner / ".18eb.json.unfinished": 7,
    }
    for path, size in left.items():
        path.write_bytes(bytes(size))
    with kept(folder) as store:
        check_tidy(folder, 1, [uploaded.files[0].blake3])
        assert f"removed 5 unfinished files of {sum(left.values())} bytes" in (
            store.server.log.read_text()
        )
        assert_same_tensors(downloaded(store.client, uploaded, tmp_path), MODEL)


# A full disk ----------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """Mounts a file system of `size` bytes."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path, left: int) -> None:
    """Fills a disk except for `left` bytes."""
    (disk / "filler").unlink(missing_ok=True)
    free = shutil.disk_usage(disk).free
    (disk / "filler").write_bytes(bytes(max(0, free - left)))


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    """A server whose limit is above the size of its disk."""
    with (
        small_disk(tmp_path_factory.mktemp("full") / "disk", 16 * MIB) as folder,
        kept(folder, "--store-max-bytes", "1GiB") as running,
    ):
        yield running


def stored_files(disk: Kept) -> dict[str, int]:
    return {name: size for name, size in on_disk(disk.folder).items() if name != "filler"}


# The disk has space for nothing, a part, all but the last page, all but the sums, or the record.
@pytest.mark.parametrize("left", [0, MIB, 585 * PAGE, 586 * PAGE, 587 * PAGE])
def test_upload_to_a_full_disk_leaves_nothing(disk: Kept, tmp_path: Path, left: int) -> None:
    sound = disk.client.upload(OTHER)
    before = stored_files(disk)
    fill(disk.folder, left)
    with pytest.raises(secateur.StoreFull, match="disk is full"):
        disk.client.upload(MODEL)
    assert stored_files(disk) == before
    assert committed(disk.channel, file_message(file_of(MODEL))) == 0
    assert_same_tensors(downloaded(disk.client, sound, tmp_path), OTHER)
    fill(disk.folder, 12 * MIB)
    uploaded = disk.client.upload(MODEL)
    assert_same_tensors(downloaded(disk.client, uploaded, tmp_path), MODEL)
    for checkpoint in (sound, uploaded):
        disk.client.delete(checkpoint)
    assert stored_files(disk) == {}


def test_kept_prune_on_a_full_disk_leaves_nothing(disk: Kept, tmp_path: Path) -> None:
    uploaded = disk.client.upload(MODEL)
    before = stored_files(disk)
    for left in (0, 10 * PAGE, 19 * PAGE, 20 * PAGE):
        fill(disk.folder, left)
        with pytest.raises(secateur.StoreFull, match="disk is full"):
            disk.client.prune(uploaded, HALF, keep=True)
        assert stored_files(disk) == before
        result = disk.client.prune(uploaded, HALF)  # without `keep` it succeeds
        assert result.report.sparsity == 0.5
    fill(disk.folder, 12 * MIB)
    result = disk.client.prune(uploaded, HALF, keep=True)
    assert result.checkpoint is not None
    assert series(disk.server, "secateur_checkpoints") == 2
    disk.client.delete(result.checkpoint)
    disk.client.delete(uploaded)
    assert stored_files(disk) == {}


def test_first_checkpoint_of_an_owner_needs_a_folder(disk: Kept) -> None:
    fill(disk.folder, 0)
    with secateur.Client(disk.server.address, token="new", timeout=300) as client:
        with pytest.raises(secateur.StoreFull):
            client.upload(OTHER)
        fill(disk.folder, MIB)
        client.delete(client.upload(OTHER))
    assert stored_files(disk) == {}
    assert "Traceback" not in disk.server.log.read_text()


def test_blob_truncated_while_reading_ends_that_call_only(
    store: Kept, sound: secateur.Checkpoint, tmp_path: Path
) -> None:
    """The system kills a process that reads a truncated page of a mapped file; not this server."""
    large = model(8 * MIB, 3)
    spec = secateur.global_unstructured("*", 0.5)
    expected = store.client.prune(large, spec, "dense").state_dict()
    for tenth in range(8):
        checkpoint = store.client.upload(large)  # repairs the damage of the round before
        blob = store.folder / "blobs" / checkpoint.files[0].blake3
        size = blob.stat().st_size
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(store.client.prune, checkpoint, spec, "dense")
            threading.Event().wait(0.01 * tenth)
            os.truncate(blob, size // 2)
            error = call.exception()
        assert error is None or isinstance(error, secateur.DataLoss)
        if error is None:  # the truncation was too late
            assert_same_tensors(call.result().state_dict(), expected)
    assert store.server.process.poll() is None


def test_checkpoint_with_a_damaged_record_is_deleted_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with kept(folder) as store:
        name = store.client.upload(MODEL).name
    (record,) = folder.glob("checkpoints/*/*.json")
    flip(record, 3)
    with kept(folder) as store:
        with pytest.raises(secateur.DataLoss, match=name):
            store.client.checkpoint(name)
        store.client.delete(name)
        with pytest.raises(secateur.CheckpointNotFound):
            store.client.delete(name)
    with kept(folder):  # the next start removes its blob
        assert on_disk(folder) == {}
