"""Broken downloads resume."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch

import secateur
from secateur.blocking import run
from secateur_proto import pruner_pb2
from secateur_proto.checkpoints_pb2 import DownloadRequest, DownloadResult
from secateur_proto.checkpoints_pb2_grpc import CheckpointsStub
from tests.client.both import OnALoop
from tests.client.sharded import write_shards
from tests.contract.raw import TIMEOUT, check_invalid, failure
from tests.reference import assert_same_tensors
from tests.storage.proxy import proxy
from tests.storage.stored import Kept, kept, model

MIB = 1 << 20
BIG = model(12 * MIB)  # 48 MiB
SHARD = model(3 * MIB)["b"]  # 6 MiB
HALF = secateur.l1_unstructured("*", 0.5)
# Bytes in transit when connections are cut. A restart each time would cost 40 MiB.
LOST = 25 * MIB
OUTPUTS = {
    "dense": pruner_pb2.OUTPUT_DENSE,
    "reparametrized": pruner_pb2.OUTPUT_REPARAMETRIZED,
    "masks": pruner_pb2.OUTPUT_MASKS,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    with kept(tmp_path_factory.mktemp("download")) as running:
        yield running


@pytest.fixture(scope="module")
def uploaded(store: Kept) -> secateur.Checkpoint:
    return store.client.upload(BIG)


@pytest.fixture(scope="module")
def pruned(store: Kept, uploaded: secateur.Checkpoint) -> secateur.Checkpoint:
    kept_one = store.client.prune(uploaded, HALF, keep=True).checkpoint
    assert kept_one is not None
    return kept_one


@pytest.mark.parametrize(
    ("which", "kind"),
    [
        ("uploaded", secateur.Client),
        ("pruned", secateur.Client),
        ("pruned", OnALoop),
    ],
)
def test_connection_that_breaks_repeatedly_resends_little(
    store: Kept,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    which: str,
    kind: type[secateur.Client],
) -> None:
    checkpoint = request.getfixturevalue(which)
    whole, path = tmp_path / "whole.safetensors", tmp_path / "cut" / "model.safetensors"
    path.parent.mkdir()
    store.client.download(checkpoint, whole)
    size, shown = whole.stat().st_size, list[tuple[int, int]]()
    with (
        proxy(store.server.address, 24 * MIB, 16 * MIB, 1000, is_back=True) as broken,
        kind(broken.address, timeout=300) as client,
    ):
        client.checkpoint(checkpoint.name)
        client.download(checkpoint, path, progress=lambda *done: shown.append(done))
        assert broken.connections == 4
        assert size <= broken.carried < size + LOST
    assert path.read_bytes() == whole.read_bytes()
    assert list(path.parent.iterdir()) == [path]
    assert shown[-1] == (size, size)
    assert shown == sorted(shown)


def test_shards_are_resumed_too(store: Kept, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    write_shards(source, {f"w{index}": SHARD + index for index in range(3)})
    checkpoint = store.client.upload(source)
    with (
        proxy(store.server.address, 8 * MIB, 8 * MIB, is_back=True) as broken,
        secateur.Client(broken.address, timeout=300) as client,
    ):
        client.checkpoint(checkpoint.name)
        client.download(checkpoint, target)
        assert broken.connections == 3
    for path in source.iterdir():
        assert (target / path.name).read_bytes() == path.read_bytes()


def test_checkpoint_deleted_during_a_broken_download_leaves_no_file(
    store: Kept, tmp_path: Path
) -> None:
    checkpoint = store.client.upload({"w": BIG["b"] + 1})

    def deleting(done: int, total: int) -> None:
        run(store.client._calls._delete(checkpoint, is_there=False))

    with (
        # No connection carries all of it, and the client may receive nothing from one that is cut.
        proxy(store.server.address, *[4 * MIB] * 100, is_back=True) as broken,
        secateur.Client(broken.address, timeout=300) as client,
    ):
        client.checkpoint(checkpoint.name)
        with pytest.raises(secateur.CheckpointNotFound):
            client.download(checkpoint, tmp_path / "model.safetensors", progress=deleting)
    assert list(tmp_path.iterdir()) == []


def test_download_ends_without_a_server(uploaded: secateur.Checkpoint, tmp_path: Path) -> None:
    with (
        secateur.Client("127.0.0.1:1", timeout=300) as client,
        pytest.raises(secateur.Unavailable),
    ):
        client.download(uploaded, tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def received(store: Kept, name: str, output: str, offset: int) -> tuple[DownloadResult, bytes]:
    request = DownloadRequest(name=name, output=OUTPUTS[output], offset=offset)
    messages = list(CheckpointsStub(store.channel).Download(request, timeout=TIMEOUT))
    return messages[0].result, b"".join(message.data for message in messages)


@pytest.mark.parametrize("output", OUTPUTS)
def test_offset_skips_exactly_the_bytes_before_it(store: Kept, output: str) -> None:
    """Within a block, at its ends, and in a file that is computed for the answer."""
    tensors = model(600_000, 7)  # 2.3 MiB
    checkpoint = store.client.prune(tensors, HALF, keep=True).checkpoint
    assert checkpoint is not None
    for name in (checkpoint.name, store.client.upload(tensors).name):
        result, whole = received(store, name, output, 0)
        size = result.data_bytes
        for offset in (1, size // 2, MIB - 1, MIB, MIB + 1, size - 1, size):
            if offset <= size:
                assert received(store, name, output, offset) == (result, whole[offset:])
        if name == checkpoint.name and output == "dense":
            masks = store.client.prune(tensors, HALF).masks
            expected = {name: tensor * masks[name] for name, tensor in tensors.items()}
            assert_same_tensors(safetensors.torch.load(whole), expected)


def test_offset_after_the_end_is_refused(store: Kept, uploaded: secateur.Checkpoint) -> None:
    size = uploaded.size_bytes
    request = DownloadRequest(name=uploaded.name, offset=size + 1)
    stub = CheckpointsStub(store.channel)
    found = failure(lambda: list(stub.Download(request, timeout=TIMEOUT)))
    check_invalid(found, "INVALID_REQUEST", "offset", [str(size + 1), str(size)])
