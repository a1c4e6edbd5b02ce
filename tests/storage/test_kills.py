"""A server that is killed at any moment loses no acknowledged checkpoint."""

import json
import random
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest
from torch import Tensor

import secateur
from tests.conftest import RunningServer, eventually, inner_server, start_server
from tests.reference import assert_same_tensors
from tests.storage.lost_pages import losing_disk
from tests.storage.stored import blobs, check_tidy, downloaded, model

CALLERS = 3
MOST_KEPT = 12
# From less than a block of the store to several.
MODELS = [model(count, seed) for seed, count in enumerate((100, 60_000, 700_000, 2_000_000))]


@dataclass(frozen=True)
class Expected:
    """The expected content of a checkpoint: weights and masks."""

    weights: Mapping[str, Tensor]
    masks: Mapping[str, Tensor] = field(default_factory=dict)

    def dense(self) -> dict[str, Tensor]:
        return {n: t * self.masks[n] if n in self.masks else t for n, t in self.weights.items()}


class Ledger:
    """What a server has acknowledged.

    A checkpoint of a call during which the server was killed may exist or not; it is in neither.

    Attributes:
        kept: Checkpoints that must exist.
        deleted: Names of checkpoints that must not exist.
        answers: The number of answers.
    """

    def __init__(self) -> None:
        self.answers = 0
        self.kept: dict[secateur.Checkpoint, Expected] = {}
        self.deleted: set[str] = set()
        self._lock = threading.Lock()

    def add(self, checkpoint: secateur.Checkpoint | None, expected: Expected) -> None:
        assert checkpoint is not None
        with self._lock:
            self.kept[checkpoint] = expected

    def pick(self, draws: random.Random) -> tuple[secateur.Checkpoint, Expected] | None:
        with self._lock:
            return draws.choice(list(self.kept.items())) if self.kept else None

    def take(self, draws: random.Random) -> secateur.Checkpoint | None:
        """Removes a checkpoint from the ledger, for a delete of which the outcome is open."""
        with self._lock:
            checkpoint = draws.choice(list(self.kept)) if self.kept else None
            if checkpoint:
                del self.kept[checkpoint]
            return checkpoint


def step(client: secateur.Client, ledger: Ledger, draws: random.Random) -> None:
    """Makes an upload, a kept prune, or a delete."""
    kind = draws.choice(["upload", "prune", "prune", "delete"])
    if len(ledger.kept) >= MOST_KEPT:
        kind = "delete"
    if kind == "upload":
        weights = draws.choice(MODELS)
        ledger.add(client.upload(weights), Expected(weights))
    elif kind == "delete":
        if taken := ledger.take(draws):
            client.delete(taken)
            ledger.deleted.add(taken.name)
    elif picked := ledger.pick(draws):
        checkpoint, expected = picked
        spec = secateur.l1_unstructured(draws.choice(["*", "b"]), draws.uniform(0.1, 0.5))
        # Another caller may delete it meanwhile.
        with suppress(secateur.CheckpointNotFound):
            result = client.prune(checkpoint, spec, keep=True)
            masks = {**expected.masks, **result.masks}
            ledger.add(result.checkpoint, Expected(expected.weights, masks))


@contextmanager
def callers(server: RunningServer, ledger: Ledger, seed: int) -> Iterator[list[Exception]]:
    """Runs callers while the block runs, and then kills their server.

    Yields:
        Errors of calls before that.
    """
    dies = threading.Event()
    errors: list[Exception] = []
    client = secateur.Client(server.address, timeout=300)

    def work(draws: random.Random) -> None:
        while not dies.is_set():
            try:
                step(client, ledger, draws)
                ledger.answers += 1
            except Exception as error:
                if not dies.is_set():
                    errors.append(error)
                    return

    draws = [random.Random(f"{seed} {index}") for index in range(CALLERS)]
    threads = [threading.Thread(target=work, args=(each,)) for each in draws]
    for thread in threads:
        thread.start()
    try:
        yield errors
        dies.set()
        server.process.kill()
        server.process.wait()
    finally:
        dies.set()
        client.close()  # else callers would wait for another server
        for thread in threads:
            thread.join(300)
    assert "Traceback" not in server.log.read_text()
    shutil.rmtree(server.log.parent)


def digests_in_records(folder: Path) -> set[str]:
    """Returns the blobs in the records on the disk."""
    found = set()
    for path in (folder / "checkpoints").glob("*/*.json"):
        record = json.loads(path.read_text().splitlines()[1])
        found |= {file["blake3"] for file in [*record["files"], record["masks"]] if file}
    return found


def check_all_kept(server: RunningServer, ledger: Ledger, folder: Path, scratch: Path) -> None:
    """Checks that acknowledged checkpoints are complete, and that no other files exist."""
    with secateur.Client(server.address, timeout=300) as client:
        listed = {checkpoint.name: checkpoint for checkpoint in client.checkpoints()}
        check_tidy(folder, len(listed), digests_in_records(folder))
        assert {checkpoint.name for checkpoint in ledger.kept} <= listed.keys()
        assert not ledger.deleted & listed.keys()
        for checkpoint, expected in ledger.kept.items():
            assert listed.pop(checkpoint.name) == checkpoint
            assert_same_tensors(downloaded(client, checkpoint, scratch), expected.dense())
        for checkpoint in listed.values():  # they were in work when the server was killed
            downloaded(client, checkpoint, scratch)
            client.delete(checkpoint)
    assert blobs(folder).keys() == digests_in_records(folder)


def survive(
    kills: int, folder: Path, scratch: Path, crash: Callable[[], object] = lambda: None
) -> tuple[int, int]:
    """Kills a server repeatedly.

    Args:
        kills: How often.
        folder: Of the store.
        scratch: For downloads.
        crash: Changes the disk after each kill.

    Returns:
        How many checkpoints were made, and how many of them were deleted.
    """
    ledger, draws, made = Ledger(), random.Random(kills), set()
    for seed in range(kills):
        server = start_server("--store-dir", str(folder))
        check_all_kept(server, ledger, folder, scratch)
        with callers(server, ledger, seed) as errors:
            enough = ledger.answers + draws.randint(1, 12)
            eventually(lambda enough=enough: bool(errors) or ledger.answers >= enough, True)  # type: ignore[misc]
            threading.Event().wait(draws.uniform(0, 0.05))
            assert errors == []
        crash()
        made |= {checkpoint.name for checkpoint in ledger.kept} | ledger.deleted
    with inner_server("--store-dir", str(folder)) as server:
        check_all_kept(server, ledger, folder, scratch)
    return len(made), len(ledger.deleted)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=SLOW)])
def test_killed_server_loses_no_acknowledged_checkpoint(tmp_path: Path, kills: int) -> None:
    made, deleted = survive(kills, tmp_path / "store", tmp_path)
    print(f"{kills} kills, {made} checkpoints made, {deleted} of them deleted")
    assert made > kills
    assert deleted > 0


@pytest.mark.parametrize("crashes", [4, pytest.param(500, marks=SLOW)])
def test_loss_of_unsynced_data_loses_no_acknowledged_checkpoint(
    tmp_path: Path, crashes: int
) -> None:
    disk, draws, kills, lost = losing_disk(tmp_path), random.Random(crashes), count(), list[int]()

    def crash() -> None:
        if next(kills) % 5:  # else only the server is killed, and the power fails later
            lost.append(disk.crash(draws))

    with disk.preloaded():
        made, deleted = survive(crashes * 5 // 4, disk.store, tmp_path, crash)
    assert len(lost) == crashes
    print(f"{crashes} crashes, {made} checkpoints made, {deleted} of them deleted")
    if crashes > 100:  # a few crashes may all happen when nothing is being written
        assert sum(lost) > crashes  # unacknowledged names and files
    assert made > crashes
    assert deleted > 0
