"""Models in an object store: tasks fetch the files, and write them in parts."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import secateur as s
from secateur_server.cut.drivers.ray import Ray
from secateur_server.uris import references
from secateur_server.uris.remote import RemoteFile
from tests.cluster.divided import INDEX, InProcess, split, write_files
from tests.conftest import PATIENCE, inner_server
from tests.contract.golden_digests import plain_report
from tests.storage.test_damage import small_disk
from tests.uris.conftest import Bucket, bucket  # noqa: F401 (a fixture)

MODELS = "s3://bucket/models"
HALF = s.global_unstructured("*", 0.5)


@pytest.fixture(scope="module", autouse=True)
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder of fetched files that tests in other processes do not share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("node")))
        yield


@pytest.fixture(scope="module")
def in_process() -> InProcess:
    return InProcess()


@pytest.fixture(scope="module")
def model(bucket: Bucket, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:  # noqa: F811
    """Files in the bucket, one of them of several parts."""
    numbers = torch.Generator().manual_seed(0)
    tensors = {f"w{i}": torch.randn(1 << i, 256, generator=numbers) for i in (14, 5, 3, 7, 6)}
    folder = tmp_path_factory.mktemp("files") / "model"
    write_files(folder, split(tensors, 3))
    for path in folder.iterdir():
        bucket.put(f"models/{path.name}", path)
    return tensors


@pytest.fixture(scope="module")
def clients(bucket: Bucket, in_process: InProcess) -> Iterator[list[s.Client]]:  # noqa: F811
    """Of a server, and of one with a cluster."""
    with ExitStack() as opened:
        local = opened.enter_context(inner_server("--allow-uri", MODELS))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Ray, "at", lambda *_: in_process)
            options = ("--allow-uri", MODELS, "--ray-address", "auto")
            divided = opened.enter_context(inner_server(*options))
        yield [
            opened.enter_context(s.Client(server.address, timeout=PATIENCE))
            for server in (local, divided)
        ]


def keys(bucket: Bucket) -> list[str]:  # noqa: F811
    return bucket.keys()


def fetched() -> list[Path]:
    return list(references._folder().iterdir())


@pytest.mark.parametrize("output", ["none", "masks", "dense", "packed"])
def test_objects_have_the_bits_of_one_server(
    clients: list[s.Client],
    bucket: Bucket,  # noqa: F811
    in_process: InProcess,
    model: dict[str, Tensor],
    output: Any,
) -> None:
    found = []
    in_process.tasks.clear()
    for number, client in enumerate(clients):
        folder = f"models/{output}-{number}"
        name = "masks.safetensors" if output == "masks" else INDEX
        to = {} if output == "none" else {"destination": f"s3://bucket/{folder}/{name}"}
        result = client.prune(f"{MODELS}/{INDEX}", HALF, output, **to)  # type: ignore[call-overload]
        objects = {
            key.removeprefix(folder): bucket.s3.get_object(Bucket="bucket", Key=key)["Body"].read()
            for key in keys(bucket)
            if key.startswith(folder)
        }
        assert bool(objects) == (output != "none")
        found.append((plain_report(result.report), objects))
    assert found[0] == found[1]
    assert "prune_file" in in_process.tasks
    assert not bucket.uploads()
    assert not fetched()


def test_a_report_is_that_of_one_server(
    clients: list[s.Client], in_process: InProcess, model: dict[str, Tensor]
) -> None:
    first, second = (plain_report(client.report(f"{MODELS}/{INDEX}")) for client in clients)
    assert first == second
    assert not fetched()


def test_an_upload_that_fails_is_aborted(
    clients: list[s.Client],
    bucket: Bucket,  # noqa: F811
    model: dict[str, Tensor],
) -> None:
    wrong = s.global_unstructured("*", 10**9)  # more units than there are
    with pytest.raises(s.InvalidSpec):
        clients[1].prune(f"{MODELS}/{INDEX}", wrong, "dense", destination=f"{MODELS}/no/{INDEX}")
    assert not bucket.uploads()
    assert not fetched()
    assert not [key for key in keys(bucket) if key.startswith("models/no/")]


def test_a_file_that_does_not_fit_a_node_is_not_fetched(
    clients: list[s.Client],
    model: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun: list[str] = []
    save = RemoteFile.save

    def spied(self: RemoteFile, *to: Any) -> None:
        begun.append(self.uri)
        save(self, *to)

    monkeypatch.setattr(RemoteFile, "save", spied)
    with small_disk(tmp_path / "disk", 8 << 20) as disk:
        monkeypatch.setattr(tempfile, "tempdir", str(disk))
        with pytest.raises(s.SecateurError, match="does not fit on the disk of node") as found:
            clients[1].report(f"{MODELS}/{INDEX}")
        assert not fetched()
    assert found.value.reason == "STORE_FULL"
    assert begun
    assert not [uri for uri in begun if uri.endswith("model-0.safetensors")]  # the large one


@pytest.mark.cluster
@pytest.mark.filterwarnings("default")
def test_nodes_fetch_and_write_objects(
    clients: list[s.Client],
    bucket: Bucket,  # noqa: F811
    model: dict[str, Tensor],
    cluster: Any,  # after the bucket, whose environment the nodes inherit
) -> None:
    expected = clients[0].prune(
        f"{MODELS}/{INDEX}", HALF, "dense", destination=f"{MODELS}/e/{INDEX}"
    )
    options = ("--allow-uri", MODELS, "--work-memory", "64MiB", "--ray-address", cluster.address)
    with inner_server(*options) as server, s.Client(server.address, timeout=PATIENCE) as client:
        found = client.prune(f"{MODELS}/{INDEX}", HALF, "dense", destination=f"{MODELS}/f/{INDEX}")
    assert plain_report(found.report) == plain_report(expected.report)
    for key in [key for key in keys(bucket) if key.startswith("models/e/")]:
        first, second = (
            bucket.s3.get_object(Bucket="bucket", Key=of)["Body"].read()
            for of in (key, key.replace("/e/", "/f/"))
        )
        assert first == second
    assert not bucket.uploads()
    assert not fetched()
