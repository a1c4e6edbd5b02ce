"""Object stores that fail, or are slow, for the tasks of a cluster. The server has a good one."""

import os
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from secateur_server.api.shards import model as shards_model
from tests.cluster.conftest import NODE
from tests.cluster.divided import INDEX, split, write_files
from tests.cluster.store import Proxy, proxied
from tests.cluster.test_calls import asked, busy, cancelled
from tests.cluster.test_ray import in_thread
from tests.conftest import PATIENCE, eventually, inner_server
from tests.contract.raw import failure, send
from tests.uris.conftest import Bucket
from tests.uris.conftest import bucket as bucket  # a fixture
from tests.uris.served import Served, check, connected

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("default")]

MODELS = "s3://bucket/models"
SOURCE = f"{MODELS}/{INDEX}"


@pytest.fixture(scope="module")
def fetched() -> Iterator[Path]:
    """The folder of the node for what it fetches. Its path is short, as sockets need."""
    with tempfile.TemporaryDirectory(prefix="n") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def proxy(bucket: Bucket) -> Iterator[Proxy]:
    with proxied(bucket.endpoint) as made:
        yield made


@pytest.fixture(scope="module")
def address(proxy: Proxy, fetched: Path) -> Iterator[str]:
    """The address of a cluster whose tasks use the proxy."""
    pytest.importorskip("ray", reason="pip install 'secateur[ray]'")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        patch.setenv("RAY_TMPDIR", tempfile.gettempdir())
        patch.setenv("TMPDIR", str(fetched))
        node = {**NODE, "num_cpus": 2, "include_dashboard": False}
        made = Cluster(initialize_head=True, head_node_args=node)
    yield str(made.address)
    made.shutdown()


@pytest.fixture(scope="module")
def served(
    bucket: Bucket, address: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    numbers = torch.Generator().manual_seed(0)
    tensors = {f"w{i}": torch.randn(1 << i, 256, generator=numbers) for i in (14, 5, 3, 7, 6)}
    folder = tmp_path_factory.mktemp("files") / "model"
    write_files(folder, split(tensors, 3))
    for path in folder.iterdir():
        bucket.put(f"models/{path.name}", path)
    options = ("--allow-uri", MODELS, "--work-memory", "64MiB", "--ray-address", address)
    with (
        pytest.MonkeyPatch.context() as patch,
        inner_server(*options) as server,
        connected(server) as made,
    ):
        # On a busy machine too, all fetched files are removed at the end of a call.
        patch.setattr(shards_model, "FORGET_SECONDS", PATIENCE)
        yield made


@pytest.fixture(autouse=True)
def nothing_is_left(
    served: Served,
    proxy: Proxy,
    bucket: Bucket,
    fetched: Path,
) -> Iterator[None]:
    """After a test no task runs, and no upload and no fetched file is left."""
    proxy.reset()
    yield
    eventually(busy, [])
    proxy.released.set()
    eventually(bucket.uploads, [])
    eventually(lambda: list(fetched.rglob("secateur-ray-*/*")), [])


def keys(bucket: Bucket) -> list[str]:
    return bucket.keys()


def objects(bucket: Bucket, folder: str) -> dict[str, bytes]:
    return {
        key.rpartition("/")[2]: bucket.s3.get_object(Bucket="bucket", Key=key)["Body"].read()
        for key in keys(bucket)
        if key.startswith(f"models/{folder}/")
    }


def is_part(method: str, path: str) -> bool:
    return method == "PUT" and "partNumber=" in path


def is_shard(method: str, path: str) -> bool:
    return method == "GET" and path.endswith(".safetensors")


FAULTS = {"fetch": is_shard, "write": is_part}


@pytest.fixture(scope="module")
def good(served: Served, bucket: Bucket) -> dict[str, bytes]:
    """What a Prune writes if nothing fails."""
    assert served.write(SOURCE, f"{MODELS}/good/{INDEX}") is None
    return objects(bucket, "good")


def test_failures_that_end_change_no_bit(
    served: Served, proxy: Proxy, bucket: Bucket, good: dict[str, bytes]
) -> None:
    failed = Counter[str]()

    def fails(method: str, path: str) -> bool:
        failed[f"{method} {path}"] += is_part(method, path) or is_shard(method, path)
        return 0 < failed[f"{method} {path}"] <= 2

    proxy.fails = fails
    assert served.write(SOURCE, f"{MODELS}/retried/{INDEX}") is None
    assert {key.partition(" ")[0] for key, count in failed.items() if count > 2} == {"GET", "PUT"}
    assert objects(bucket, "retried") == good


def test_a_process_that_is_killed_while_it_uploads_changes_no_bit(
    served: Served, proxy: Proxy, bucket: Bucket, good: dict[str, bytes]
) -> None:
    proxy.waits = lambda method, path: is_part(method, path) and not proxy.waiting
    thread, ended = in_thread(lambda: served.write(SOURCE, f"{MODELS}/killed/{INDEX}"))
    eventually(lambda: bool(proxy.waiting), True)
    for process in busy():
        os.kill(process, signal.SIGKILL)
    thread.join()
    assert ended == [None]
    assert objects(bucket, "killed") == good


@pytest.mark.parametrize("phase", FAULTS)
def test_failures_that_last_end_the_call(
    served: Served,
    proxy: Proxy,
    bucket: Bucket,
    phase: str,
) -> None:
    proxy.fails = FAULTS[phase]
    found = served.write(SOURCE, f"{MODELS}/failed/{INDEX}")
    check(found, "FAILED_PRECONDITION", "URI_FAILED", f"{MODELS}/", "not now")
    assert not objects(bucket, "failed")


@pytest.mark.parametrize("phase", FAULTS)
def test_calls_on_a_slow_store_end_at_their_deadline(
    served: Served,
    proxy: Proxy,
    bucket: Bucket,
    phase: str,
) -> None:
    proxy.waits = FAULTS[phase]
    destination = f"{MODELS}/late/{INDEX}"
    first = asked(SOURCE, destination)
    found = failure(send, served.channel, "Prune", [first], timeout=8.0)
    assert found is not None
    assert found.code.name == "DEADLINE_EXCEEDED", found
    assert proxy.waiting
    assert not objects(bucket, "late")


@pytest.mark.parametrize("phase", FAULTS)
def test_cancelled_calls_on_a_slow_store_end(
    served: Served, proxy: Proxy, bucket: Bucket, phase: str
) -> None:
    proxy.waits = FAULTS[phase]
    first = asked(SOURCE, f"{MODELS}/cancelled/{INDEX}")
    with cancelled(served, first, lambda _: bool(proxy.waiting)):
        eventually(lambda: bucket.uploads(), [])
    assert not objects(bucket, "cancelled")
