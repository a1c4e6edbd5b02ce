"""One server at a time uses a store's folder."""

import fcntl
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

import secateur
from secateur.calls import patience
from secateur_server.startup import CannotStart
from secateur_server.storage import clock
from secateur_server.storage import store as store_module
from secateur_server.storage.folders import temporary_folder
from tests.conftest import eventually, inner_server
from tests.reference import assert_same_tensors
from tests.storage.stored import downloaded, kept, model, on_disk
from tests.storage.test_clock import Machine

MODEL = model(1000)
HALF = secateur.l1_unstructured("*", 0.5)


def assert_refused(folder: Path) -> None:
    with pytest.raises(CannotStart, match="another server uses") as raised:
        inner_server("--store-dir", str(folder)).__enter__()
    assert str(folder) in str(raised.value)


def test_two_servers_never_share_a_folder(tmp_path: Path) -> None:
    folder, linked = tmp_path / "store", tmp_path / "linked"
    linked.symlink_to(folder)
    with kept(folder) as store:
        store.client.upload(MODEL)
        assert_refused(linked)
        for path in list(folder.iterdir()):
            assert_refused(folder)
            path.rename(path.with_name("renamed"))
            assert_refused(folder)
            path.with_name("renamed").rename(path)
        folder.rename(tmp_path / "moved")
        assert_refused(tmp_path / "moved")
        (tmp_path / "moved").rename(folder)
    with kept(folder) as store:
        assert len(list(store.client.checkpoints())) == 1


def test_lock_of_an_earlier_version_is_respected(tmp_path: Path) -> None:
    """Earlier versions lock only the file, not the folder."""
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert_refused(tmp_path)


def uses(
    client: secateur.Client, checkpoint: secateur.Checkpoint, path: Path
) -> list[Callable[[], object]]:
    """Returns every call that reads or writes the folder."""
    return [
        lambda: client.upload(model(1000, seed=1)),
        lambda: client.upload(MODEL),
        lambda: client.prune(checkpoint, HALF),
        lambda: client.prune(checkpoint, HALF, keep=True),
        lambda: client.report(checkpoint),
        lambda: client.download(checkpoint, path),
        lambda: client.delete(checkpoint),
    ]


def test_replaced_folder_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other folder has the same blob, and a server of its own."""
    monkeypatch.setattr(patience, "TRIES", 1)
    folder, moved = tmp_path / "store", tmp_path / "moved"
    with kept(folder) as store:
        checkpoint = store.client.upload(MODEL)
        folder.rename(moved)
        with kept(folder) as other, secateur.Client(store.server.address) as client:
            others = other.client.upload(MODEL)
            before = on_disk(folder)
            for use in uses(client, checkpoint, tmp_path / "x.safetensors"):
                with pytest.raises(secateur.Unavailable, match="folder was moved or replaced"):
                    use()
                assert on_disk(folder) == before
            assert_same_tensors(downloaded(other.client, others, tmp_path), MODEL)
        assert f"{folder} is not the folder" in store.server.log.read_text()


def test_folder_that_is_moved_back_serves_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server notices without a call, and old checkpoints expire afterwards."""
    machine = Machine()
    monkeypatch.setattr(clock, "time", machine)
    monkeypatch.setattr(store_module, "EXPIRE_SECONDS", 0.01)
    folder, moved = tmp_path / "store", tmp_path / "moved"
    with kept(folder, "--store-ttl", "1000") as store:
        old = store.client.upload(model(1000, seed=1))
        machine.step(600)
        checkpoint = store.client.upload(MODEL)
        folder.rename(moved)
        machine.step(600)
        eventually(lambda: "move it back" in store.server.log.read_text(), True)
        moved.rename(folder)
        eventually(lambda: list(store.client.checkpoints()), [checkpoint])
        assert_same_tensors(downloaded(store.client, checkpoint, tmp_path), MODEL)
        assert store.client.upload(model(1000, seed=1)) != old


def test_new_temporary_folder_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its server is about to lock it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = [temporary_folder() for _ in range(2)]
    assert sorted(tmp_path.iterdir()) == sorted(made)
