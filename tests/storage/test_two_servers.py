"""Two servers over one object store, killed at random: nothing that was acknowledged is lost."""

import random
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

import secateur
from secateur_server.runtime.context import RequestContext
from secateur_server.storage.shared.objects import Objects
from secateur_server.storage.shared.records import SharedRecords
from secateur_server.storage.shared.store import SharedStore
from secateur_server.storage.store import Store
from tests.conftest import RunningServer, start_server, stop_server
from tests.storage.stored import digest_of, file_of, model
from tests.uris.conftest import Bucket, bucket  # noqa: F401

HALF = secateur.l1_unstructured("*.weight", 0.5)
SIZES = (300, 3000, 300_000)
ANSWERS = (secateur.SecateurError,)


class Pair:
    """Two servers of one store, and what callers know of its checkpoints.

    Attributes:
        kept: The digest of the weights of each checkpoint that was acknowledged, by its name.
        doubtful: Those whose deletion was tried.
    """

    def __init__(self, uri: str, folder: Path, *options: str) -> None:
        self._options = ("--store-uri", uri, "--log-format", "text", *options)
        self._folder = folder
        self._servers = [self._start(number) for number in range(2)]
        self.kept: dict[str, str] = {}
        self.doubtful: set[str] = set()

    def _start(self, number: int) -> RunningServer:
        return start_server("--store-dir", str(self._folder / str(number)), *self._options)

    def address(self, number: int) -> str:
        return self._servers[number].address

    def kill(self, number: int) -> None:
        """Kills a server, and starts it again."""
        self._servers[number].process.kill()
        self._servers[number].process.wait()
        self._servers[number] = self._start(number)

    def stop(self) -> None:
        for server in self._servers:
            assert "Traceback" not in stop_server(server)

    def call(self, numbers: random.Random) -> None:
        """Makes a random call to one of the servers, which may be killed meanwhile."""
        with (
            suppress(*ANSWERS),
            secateur.Client(self.address(numbers.randrange(2)), timeout=60) as client,
        ):
            what, names = numbers.random(), sorted(self.kept.keys() - self.doubtful)
            if not names or what < 0.4:
                tensors = model(numbers.choice(SIZES), numbers.randrange(6))
                made = client.upload(tensors, progress=False)
                self.kept[made.name] = digest_of(file_of(tensors))
                return
            name = numbers.choice(names)
            if what < 0.6:
                self.doubtful.add(name)
                client.delete(client.checkpoint(name))
            elif what < 0.8:
                result = client.prune(client.checkpoint(name), HALF, keep=True, progress=False)
                assert result.checkpoint is not None
                self.kept[result.checkpoint.name] = self.kept[name]
            else:
                client.report(client.checkpoint(name))


def check(pair: Pair, uri: str, folder: Path, is_lossless: bool, bucket: Bucket) -> None:  # noqa: F811
    """The servers agree, every checkpoint is whole, and nothing else is left after a sweep."""
    listed = []
    for number in range(2):
        with secateur.Client(pair.address(number), timeout=300) as client:
            found = {checkpoint.name: checkpoint for checkpoint in client.checkpoints()}
            listed.append(found)
            for name, checkpoint in found.items():
                client.report(checkpoint)  # reads, and so checks, all of it
                assert pair.kept.get(name, checkpoint.files[0].blake3) in {
                    file.blake3 for file in checkpoint.files
                }
    assert listed[0] == listed[1]
    if is_lossless:
        assert pair.kept.keys() - pair.doubtful <= listed[0].keys()
    local = Store(folder / "sweep", 1 << 30, ttl=0)
    store = SharedStore(Objects(uri, 60.0), local, 1 << 60, 0.0)
    store.sweep(-60.0)
    store.close()
    records = SharedRecords(Objects(uri, 60.0)).all(RequestContext())
    named = {file.blake3 for record in records for file in record.blobs()}
    prefix = f"{uri.removeprefix('s3://bucket/')}/blobs/"
    blobs = {k.removeprefix(prefix) for k in bucket.keys() if k.startswith(prefix)}  # noqa: SIM118
    assert blobs == named


def run(pair: Pair, seconds: float, seed: int) -> int:
    """Makes calls from several threads while servers are killed. Returns the number of kills."""
    end, kills = time.monotonic() + seconds, 0

    def caller(number: int) -> None:
        numbers = random.Random(seed + number)
        while time.monotonic() < end:
            pair.call(numbers)

    numbers = random.Random(seed)
    with ThreadPoolExecutor() as threads:
        callers = [threads.submit(caller, number) for number in range(1, 5)]
        while time.monotonic() < end:
            time.sleep(numbers.uniform(0.2, 3.0))
            pair.kill(numbers.randrange(2))
            kills += 1
        for one in callers:
            one.result()
    return kills


@pytest.fixture
def uri(bucket: Bucket, request: pytest.FixtureRequest) -> str:  # noqa: F811
    return f"s3://bucket/{request.node.name}"


@pytest.mark.slow  # a minute
@pytest.mark.parametrize("limit", [None, "6MiB"])
def test_killed_servers_lose_nothing(
    bucket: Bucket,  # noqa: F811
    uri: str,
    tmp_path: Path,
    limit: str | None,
) -> None:
    pair = Pair(uri, tmp_path, *(("--store-max-bytes", limit) if limit else ()))
    try:
        assert run(pair, 30, 0) > 3
        assert pair.kept
        check(pair, uri, tmp_path, limit is None, bucket)
    finally:
        pair.stop()
