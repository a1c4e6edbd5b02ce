"""Setting the system's clock changes no age: nothing expires early or late."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

import secateur
from secateur_server.storage import clock as clock_module
from secateur_server.storage import store as store_module
from secateur_server.storage.uploads import UPLOAD_SECONDS
from tests.conftest import eventually
from tests.contract.raw import series
from tests.storage.stored import (
    Kept,
    committed,
    file_message,
    file_of,
    kept,
    leave_unfinished,
    model,
)

TTL = 1000.0
HOURS = 7200.0
HALF = secateur.l1_unstructured("*", 0.5)


class Machine:
    """The clocks of a machine. They stand still until a test advances or sets them.

    Attributes:
        wall: The system's clock.
        uptime: The monotonic clock.
        reads: How often the thread that expires checkpoints has read the monotonic clock.
    """

    def __init__(self) -> None:
        self.wall, self.uptime, self.reads = 1.8e9, 5000.0, 0

    def time(self) -> float:
        return self.wall

    def monotonic(self) -> float:
        self.reads += threading.current_thread().name == "expire"
        return self.uptime

    def step(self, seconds: float) -> None:
        """Advances both clocks."""
        self.wall += seconds
        self.uptime += seconds

    def swept(self) -> None:
        """Waits until the server has checked the ages of all checkpoints."""
        reads = self.reads
        eventually(lambda: self.reads > reads + 10, True)  # each sweep reads it a few times

    def seconds_to(self, checkpoint: secateur.Checkpoint) -> float:
        """Returns the time until a checkpoint expires, as the caller sees it."""
        assert checkpoint.expire_time is not None
        now = datetime.fromtimestamp(self.wall, UTC)
        return round((checkpoint.expire_time - now).total_seconds(), 3)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(clock_module, "time", made)
    monkeypatch.setattr(store_module, "EXPIRE_SECONDS", 0.005)
    return made


@contextmanager
def serving(folder: Path) -> Iterator[Kept]:
    with kept(folder, "--store-ttl", str(TTL)) as store:
        yield store


def small(value: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((3,), float(value))}


def names(store: Kept) -> set[str]:
    return {checkpoint.name for checkpoint in store.client.checkpoints()}


def test_unused_checkpoints_expire(tmp_path: Path, machine: Machine) -> None:
    with serving(tmp_path / "store") as store:
        used, unused = (store.client.upload(small(i)) for i in (1, 2))
        assert machine.seconds_to(unused) == TTL
        machine.step(0.6 * TTL)
        store.client.report(used)
        machine.swept()
        assert names(store) == {used.name, unused.name}
        assert machine.seconds_to(store.client.checkpoint(unused.name)) == 0.4 * TTL
        assert machine.seconds_to(store.client.checkpoint(used.name)) == TTL
        machine.step(0.6 * TTL)
        eventually(lambda: names(store), {used.name})
        # It is counted when it has been removed from the disk.
        eventually(lambda: series(store.server, "secateur_evictions_total", reason="ttl"), 1.0)
        with pytest.raises(secateur.CheckpointNotFound):
            store.client.report(unused)


@pytest.mark.parametrize("jump", [HOURS, -HOURS, 10 * UPLOAD_SECONDS])
def test_setting_the_clock_changes_no_age(tmp_path: Path, machine: Machine, jump: float) -> None:
    """A checkpoint that was uploaded, one that was pruned, one in use, and an unfinished upload."""
    data = file_of(model(1000))
    with serving(tmp_path / "store") as store:
        uploaded = store.client.upload(small(1))
        pruned = store.client.prune(uploaded, HALF, keep=True).checkpoint
        assert pruned is not None
        leave_unfinished(store, data, 500)
        machine.step(0.5 * TTL)
        store.client.report(uploaded)
        machine.wall += jump
        machine.swept()
        rest = [machine.seconds_to(store.client.checkpoint(c.name)) for c in (uploaded, pruned)]
        assert rest == [TTL, 0.5 * TTL]
        assert committed(store.channel, file_message(data)) == 500
        machine.step(0.6 * TTL)
        eventually(lambda: names(store), {uploaded.name})
        store.client.report(uploaded)
        assert committed(store.channel, file_message(data)) == 500
        machine.step(UPLOAD_SECONDS - TTL)
        eventually(lambda: committed(store.channel, file_message(data)), 0)
        eventually(lambda: names(store), set())


@pytest.mark.parametrize("jump", [HOURS, -HOURS])
def test_setting_the_clock_before_a_restart_changes_no_age(
    tmp_path: Path, machine: Machine, jump: float
) -> None:
    with serving(tmp_path / "store") as store:
        uploaded = store.client.upload(small(1))
        machine.step(0.3 * TTL)
        machine.wall += jump
        machine.swept()
    machine.uptime = 10.0  # the machine was restarted as well
    with serving(tmp_path / "store") as store:
        assert machine.seconds_to(store.client.checkpoint(uploaded.name)) == 0.7 * TTL
        machine.step(0.69 * TTL)
        machine.swept()
        assert names(store) == {uploaded.name}
        machine.step(0.02 * TTL)
        eventually(lambda: names(store), set())


def test_system_clock_counts_while_no_server_runs(tmp_path: Path, machine: Machine) -> None:
    with serving(tmp_path / "store") as store:
        uploaded = store.client.upload(small(1))
    machine.step(0.8 * TTL)
    with serving(tmp_path / "store") as store:
        assert machine.seconds_to(store.client.checkpoint(uploaded.name)) == 0.2 * TTL


def test_last_use_in_the_future_counts_as_now(tmp_path: Path, machine: Machine) -> None:
    """The clock was set back while no server ran: a checkpoint is kept for one TTL at most."""
    with serving(tmp_path / "store") as store:
        first, second = (store.client.upload(small(i)) for i in (1, 2))
        machine.step(1.0)
        store.client.report(first)
    machine.wall -= 10 * HOURS
    for left in (TTL, 0.6 * TTL, 0.2 * TTL):
        with serving(tmp_path / "store") as store:
            for checkpoint in (first, second):
                assert machine.seconds_to(store.client.checkpoint(checkpoint.name)) == left
        machine.step(0.4 * TTL)
    with serving(tmp_path / "store") as store:
        eventually(lambda: names(store), set())
