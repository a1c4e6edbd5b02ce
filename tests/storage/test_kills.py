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
    """What a checkpoint is: weights, and the masks on them."""

    weights: Mapping[str, Tensor]
    masks: Mapping[str, Tensor] = field(default_factory=dict)

    def dense(self) -> dict[str, Tensor]:
        return {n: t * self.masks[n] if n in self.masks else t for n, t in self.weights.items()}


class Ledger:
    """What a server has answered for.

    kept: checkpoints that are to be there.  gone: names of those that are not.
    answers: how often it has answered.
    What a call was at when the server was killed is in neither.
    """

    def __init__(self) -> None:
        self.answers = 0
        self.kept: dict[secateur.Checkpoint, Expected] = {}
        self.gone: set[str] = set()
        self._lock = threading.Lock()

    def add(self, checkpoint: secateur.Checkpoint | None, expected: Expected) -> None:
        assert checkpoint is not None
        with self._lock:
            self.kept[checkpoint] = expected

    def pick(self, draws: random.Random) -> tuple[secateur.Checkpoint, Expected] | None:
        with self._lock:
            return draws.choice(list(self.kept.items())) if self.kept else None

    def take(self, draws: random.Random) -> secateur.Checkpoint | None:
        """One that is to be deleted: from now on nobody knows whether it is there."""
        with self._lock:
            checkpoint = draws.choice(list(self.kept)) if self.kept else None
            if checkpoint:
                del self.kept[checkpoint]
            return checkpoint


def step(client: secateur.Client, ledger: Ledger, draws: random.Random) -> None:
    """An upload, a kept prune, or a delete."""
    kind = draws.choice(["upload", "prune", "prune", "delete"])
    if len(ledger.kept) >= MOST_KEPT:
        kind = "delete"
    if kind == "upload":
        weights = draws.choice(MODELS)
        ledger.add(client.upload(weights), Expected(weights))
    elif kind == "delete":
        if taken := ledger.take(draws):
            client.delete(taken)
            ledger.gone.add(taken.name)
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
    """Callers who do one thing after another while the block runs, and until their server dies.

    Yields: what went wrong before that.
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
        client.close()  # whoever would wait for another server sees that there is none
        for thread in threads:
            thread.join(300)
    assert "Traceback" not in server.log.read_text()
    shutil.rmtree(server.log.parent)


def digests_in_records(folder: Path) -> set[str]:
    """The blobs that the records on the disk name."""
    found = set()
    for path in (folder / "checkpoints").glob("*/*.json"):
        record = json.loads(path.read_text().splitlines()[1])
        found |= {file["blake3"] for file in [*record["files"], record["masks"]] if file}
    return found


def check_all_there(server: RunningServer, ledger: Ledger, folder: Path, scratch: Path) -> None:
    """What was answered for is whole; what was not is whole or not there; and no file is stray."""
    with secateur.Client(server.address, timeout=300) as client:
        listed = {checkpoint.name: checkpoint for checkpoint in client.checkpoints()}
        check_tidy(folder, len(listed), digests_in_records(folder))
        assert {checkpoint.name for checkpoint in ledger.kept} <= listed.keys()
        assert not ledger.gone & listed.keys()
        for checkpoint, expected in ledger.kept.items():
            assert listed.pop(checkpoint.name) == checkpoint
            assert_same_tensors(downloaded(client, checkpoint, scratch), expected.dense())
        for checkpoint in listed.values():  # made or to be deleted when the server was killed
            downloaded(client, checkpoint, scratch)
            client.delete(checkpoint)
    assert blobs(folder).keys() == digests_in_records(folder)


def survive(
    kills: int, folder: Path, scratch: Path, crash: Callable[[], object] = lambda: None
) -> tuple[int, int]:
    """Kills a server so often. Returns: checkpoints made, and those of them that were deleted.

    crash: what becomes of the disk each time.
    """
    ledger, draws, made = Ledger(), random.Random(kills), set()
    for seed in range(kills):
        server = start_server("--store-dir", str(folder))
        check_all_there(server, ledger, folder, scratch)
        with callers(server, ledger, seed) as errors:
            enough = ledger.answers + draws.randint(1, 12)
            eventually(lambda enough=enough: bool(errors) or ledger.answers >= enough, True)  # type: ignore[misc]
            threading.Event().wait(draws.uniform(0, 0.05))
            assert errors == []
        crash()
        made |= {checkpoint.name for checkpoint in ledger.kept} | ledger.gone
    with inner_server("--store-dir", str(folder)) as server:
        check_all_there(server, ledger, folder, scratch)
    return len(made), len(ledger.gone)


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
        if next(kills) % 5:  # else the server alone is killed, and the power goes later
            lost.append(disk.crash(draws))

    with disk.preloaded():
        made, deleted = survive(crashes * 5 // 4, disk.store, tmp_path, crash)
    assert len(lost) == crashes
    print(f"{crashes} crashes, {made} checkpoints made, {deleted} of them deleted")
    if crashes > 100:  # a few may all come when nothing is being written
        assert sum(lost) > crashes  # names and files, of what nobody had been told
    assert made > crashes
    assert deleted > 0
