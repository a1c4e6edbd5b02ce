"""The store keeps its limit of bytes, and its metrics are right."""

import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest

import secateur
from secateur_proto.checkpoints_pb2 import DownloadRequest
from secateur_proto.checkpoints_pb2_grpc import CheckpointsStub
from secateur_server.storage.folders import default_max_bytes
from tests.conftest import RunningServer, eventually, inner_server, start_server
from tests.contract.raw import OWN_CONNECTION, check_failed, failure, kept_open, series
from tests.storage.stored import (
    DISK_BLOCK,
    Kept,
    blobs,
    check_tidy,
    committed,
    counted,
    file_message,
    file_of,
    in_blocks,
    kept,
    model,
    on_disk,
    received,
    send_upload,
    upload_file,
    upload_requests,
)

MIB = 1 << 20
LIMIT = 12 * MIB
# A caller whose gRPC reads hardly ahead, so that the server soon waits for it.
LITTLE_AHEAD = [
    OWN_CONNECTION,
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1 << 16),
]
# Two of them fit into the store, with their records, and three do not.
LARGE = [model(MIB + MIB // 4, seed) for seed in range(4)]  # 5 MiB


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    with kept(tmp_path_factory.mktemp("bounds"), "--store-max-bytes", str(LIMIT)) as running:
        yield running


@pytest.fixture(autouse=True)
def _metrics_match_the_disk(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "store" not in request.fixturenames:
        return
    store: Kept = request.getfixturevalue("store")
    check_metrics(store)
    for checkpoint in store.client.checkpoints():
        store.client.delete(checkpoint)
    eventually(lambda: blobs(store.folder), {})
    check_metrics(store)


def check_metrics(store: Kept) -> None:
    """Checks the metrics of the store against the disk."""
    names = [name for name in on_disk(store.folder) if name.startswith("checkpoints/")]
    assert series(store.server, "secateur_checkpoints") == len(names)
    assert series(store.server, "secateur_store_bytes") == counted(store.folder)
    assert counted(store.folder) <= LIMIT


def names(store: Kept) -> set[str]:
    return {checkpoint.name for checkpoint in store.client.checkpoints()}


def evictions(server: RunningServer, reason: str) -> tuple[int, int]:
    """Returns the number of evicted checkpoints, and their bytes."""
    bytes_ = int(series(server, "secateur_evicted_bytes_total"))
    return int(series(server, "secateur_evictions_total", reason=reason)), bytes_


@contextmanager
def unread(store: Kept, checkpoint: secateur.Checkpoint) -> Iterator[None]:
    """Begins a download, and does not read it while the block runs."""
    with grpc.insecure_channel(store.server.address, LITTLE_AHEAD) as channel:
        stub = CheckpointsStub(channel)
        call = stub.Download(DownloadRequest(name=checkpoint.name), timeout=300)
        assert next(iter(call)).result.data_bytes == checkpoint.size_bytes
        try:
            yield
        finally:
            cancelled(store, "Download", call)


def cancelled(store: Kept, method: str, call: grpc.RpcContext) -> None:
    """Cancels a call, and waits until the server has seen it."""
    ended = {"grpc_method": method, "grpc_code": "Canceled"}
    count = partial(series, store.server, "grpc_server_handled_total", **ended)
    before = count()
    call.cancel()
    eventually(lambda: count() - before, 1.0)


def size_on_disk(checkpoint: secateur.Checkpoint) -> int:
    """Returns the bytes of a checkpoint of few files: files, sums, and a record of one block."""
    sizes = [file.size_bytes for file in checkpoint.files]
    sums = [-(-size // MIB) * 32 for size in sizes]
    return sum(map(in_blocks, sizes + sums)) + DISK_BLOCK


def test_ten_kept_prunes_store_the_model_once_and_ten_masks(store: Kept) -> None:
    tensors = LARGE[0]
    checkpoint = store.client.upload(tensors)
    before, sent = counted(store.folder), received(store.server)
    for _ in range(10):
        result = store.client.prune(checkpoint, secateur.l1_unstructured("*", 0.2), keep=True)
        assert result.checkpoint is not None
        checkpoint = result.checkpoint
    bits = sum(tensor.numel() // 8 for tensor in tensors.values())
    cost = counted(store.folder) - before
    assert cost == 10 * (in_blocks(bits + 500) + 2 * DISK_BLOCK)  # their sums, and a record
    assert len(blobs(store.folder)) == 11
    assert checkpoint.mask_bytes < bits + 500
    assert received(store.server) == sent


def test_least_recently_used_checkpoint_is_evicted_first(store: Kept) -> None:
    first, second = (store.client.upload(tensors) for tensors in LARGE[:2])
    count, freed = evictions(store.server, "room")
    store.client.report(first)  # a use
    third = store.client.upload(LARGE[2])
    assert names(store) == {first.name, third.name}
    assert evictions(store.server, "room") == (count + 1, freed + size_on_disk(second))
    with pytest.raises(secateur.CheckpointNotFound):
        store.client.report(second)


def test_large_upload_evicts_everything_but_checkpoints_in_use(store: Kept) -> None:
    """A checkpoint in use is kept, though it is the least recently used."""
    first, second = (store.client.upload(tensors) for tensors in LARGE[:2])
    with unread(store, first):
        store.client.report(second)
        third = store.client.upload(LARGE[2])
        assert names(store) == {first.name, third.name}


def test_store_is_full_if_nothing_can_be_evicted(store: Kept) -> None:
    first, second = (store.client.upload(tensors) for tensors in LARGE[:2])
    count, _ = evictions(store.server, "room")
    with unread(store, first), unread(store, second):
        with pytest.raises(secateur.StoreFull, match="do not fit"):
            store.client.upload(LARGE[2])
        store.client.report(first)
    assert names(store) == {first.name, second.name}
    assert evictions(store.server, "room")[0] == count
    third = store.client.upload(LARGE[2])
    assert third.name in names(store)


def test_upload_that_cannot_fit_evicts_nothing(store: Kept) -> None:
    """Evicting the only candidate would not free enough."""
    first, second = store.client.upload(LARGE[0]), store.client.upload(model(1000))
    larger = model(2 * MIB)
    with unread(store, first), pytest.raises(secateur.StoreFull):
        store.client.upload(larger)
    assert names(store) == {first.name, second.name}


def test_model_above_the_limit_is_refused_before_its_data(store: Kept) -> None:
    first, before = store.client.upload(LARGE[0]), received(store.server)
    message = file_message(b"", size_bytes=LIMIT + 1, blake3="0" * 64)
    with kept_open(upload_requests([upload_file(message)])) as messages:
        found = failure(send_upload, store.channel, messages)
    check_failed(found, grpc.StatusCode.RESOURCE_EXHAUSTED, "STORE_FULL")
    assert names(store) == {first.name}
    assert received(store.server) == before


def test_broken_upload_counts_until_it_is_abandoned(store: Kept) -> None:
    data, come = file_of(LARGE[0]), 3 * MIB
    requests = upload_requests([upload_file(file_message(data))], data[:come])
    with kept_open(requests) as messages:
        call = CheckpointsStub(store.channel).Upload.future(messages)
        eventually(lambda: committed(store.channel, file_message(data)), come)
        assert series(store.server, "secateur_store_bytes") == come + in_blocks(3 * 32)
        store.client.upload(LARGE[1])
        (second,) = store.client.checkpoints()
        with unread(store, second), pytest.raises(secateur.StoreFull):
            store.client.upload(LARGE[2])  # nothing can be evicted
        cancelled(store, "Upload", call)
    store.client.upload(LARGE[2])  # it replaces the unfinished upload
    assert committed(store.channel, file_message(data)) == 0
    assert len(names(store)) == 2


def test_records_of_one_model_count_too(store: Kept) -> None:
    """The second checkpoint needs no upload, but its record takes space."""
    tensors = model(LIMIT // 4 - 10 * DISK_BLOCK // 4)
    made = [store.client.upload(tensors).name for _ in range(15)]
    assert names(store) < set(made)
    assert made[-1] in names(store)
    check_tidy(store.folder, len(names(store)), blobs(store.folder))


def test_concurrent_kept_prunes_of_one_checkpoint_are_both_kept(store: Kept) -> None:
    uploaded = store.client.upload(LARGE[0])
    spec = secateur.l1_unstructured("*", 0.5)
    results: list[secateur.PruneResult] = []
    threads = [
        threading.Thread(
            target=lambda: results.append(store.client.prune(uploaded, spec, keep=True))
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == len(threads)
    assert len(names(store)) == 1 + len(threads)
    assert len(blobs(store.folder)) == 2


def test_deleted_checkpoint_in_use_is_removed_when_the_use_ends(store: Kept) -> None:
    uploaded = store.client.upload(LARGE[0])
    with unread(store, uploaded):
        store.client.delete(uploaded)
        assert len(blobs(store.folder)) == 1
        assert names(store) == set()
    eventually(lambda: on_disk(store.folder), {})


def test_last_uses_survive_a_restart(tmp_path: Path) -> None:
    folder, options = tmp_path / "store", ("--store-max-bytes", str(LIMIT))
    with kept(folder, *options) as store:
        first, second = (store.client.upload(tensors) for tensors in LARGE[:2])
        store.client.report(first)
    with kept(folder, *options) as store:
        assert list(store.client.checkpoints()) == [second, first]
        check_metrics(store)
        third = store.client.upload(LARGE[2])
        assert names(store) == {first.name, third.name}


def temporary(folder: Path) -> list[Path]:
    return sorted(folder.glob("secateur-store-*"))


def test_temporary_store_is_removed_with_its_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is private. The next server to start removes that of a killed server."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    killed = start_server()
    with inner_server() as running, secateur.Client(running.address, timeout=300) as client:
        folders = temporary(tmp_path)
        assert len(folders) == 2
        for folder in folders:
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        uploaded = client.upload(LARGE[0])
        killed.process.send_signal(signal.SIGKILL)
        killed.process.wait()
        assert temporary(tmp_path) == folders
        with inner_server():
            assert len(temporary(tmp_path)) == 2
            assert client.report(uploaded).total == sum(t.numel() for t in LARGE[0].values())
    assert temporary(tmp_path) == []


def test_default_limit_is_the_same_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a share of the free disk, where the store's own files count as free."""
    disk, kept_bytes = 8000, 3000
    (tmp_path / "blobs").mkdir()

    def usage(folder: Path) -> SimpleNamespace:
        used = sum(path.stat().st_size for path in (folder / "blobs").iterdir())
        return SimpleNamespace(free=disk - used)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert default_max_bytes(tmp_path) == 6000
    (tmp_path / "blobs" / "one").write_bytes(bytes(kept_bytes))
    assert default_max_bytes(tmp_path) == 6000
