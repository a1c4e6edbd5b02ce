"""Servers that share the checkpoints in an object store: moto's S3 in this process."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur
from secateur_server.errors import CheckpointNotFound, QuotaExceeded, RequestError, StoreFailed
from secateur_server.runtime.context import RequestContext
from secateur_server.storage.records import Record
from secateur_server.storage.shared.claims import claimed, remove_unnamed
from secateur_server.storage.shared.objects import Objects
from secateur_server.storage.shared.records import SharedRecords
from secateur_server.storage.shared.store import SharedStore
from secateur_server.storage.store import Store
from tests.conftest import eventually, inner_server, run_server
from tests.storage.stored import OWNER, downloaded, file_of, model
from tests.uris.conftest import Bucket, bucket  # noqa: F401

HALF = secateur.l1_unstructured("*.weight", 0.5)
COUNT = 4000


@pytest.fixture
def uri(bucket: Bucket, request: pytest.FixtureRequest) -> str:  # noqa: F811
    """A prefix of its own."""
    return f"s3://bucket/{request.node.name}"


@contextmanager
def clients(uri: str, count: int, *options: str) -> Iterator[list[secateur.Client]]:
    """Connections to as many servers."""
    with ExitStack() as opened:
        found = []
        for _ in range(count):
            server = opened.enter_context(inner_server("--store-uri", uri, *options))
            client = secateur.Client(server.address, timeout=300)
            found.append(opened.enter_context(client))
        yield found


@contextmanager
def stores(uri: str, folder: Path, count: int = 2, **limits: Any) -> Iterator[list[SharedStore]]:
    with ExitStack() as opened:
        found = []
        for number in range(count):
            local = Store(folder / str(number), 1 << 30, ttl=0)
            store = SharedStore(
                Objects(uri, 60.0), local, **{"max_bytes": 1 << 40, "ttl": 0.0, **limits}
            )
            opened.callback(store.close)
            found.append(store)
        yield found


def create(store: SharedStore, seed: int, quota: int | None = None) -> Record:
    data = file_of(model(COUNT, seed))
    upload = store.uploads.begin(OWNER, len(data))
    store.uploads.write(upload, data)
    file = store.uploads.finish(RequestContext(), upload, "model.safetensors")
    try:
        return store.create(RequestContext(), OWNER, (file,), quota=quota)
    finally:
        store.uploads.abandon(upload)


def keys(bucket: Bucket, uri: str, kind: str) -> list[str]:  # noqa: F811
    prefix = f"{uri.removeprefix('s3://bucket/')}/{kind}/"
    return [key.removeprefix(prefix) for key in bucket.keys() if key.startswith(prefix)]  # noqa: SIM118


def test_any_server_answers_for_any_checkpoint(uri: str, tmp_path: Path) -> None:
    tensors = model(COUNT)
    with clients(uri, 2) as (one, other), secateur.embedded() as alone:
        checkpoint = one.upload(tensors)
        assert other.checkpoint(checkpoint.name) == checkpoint
        assert list(other.checkpoints()) == [checkpoint]
        result = other.prune(checkpoint, HALF, keep=True)
        expected = alone.prune(tensors, HALF)
        assert all(torch.equal(mask, expected.masks[n]) for n, mask in result.masks.items())
        again = one.prune(result.checkpoint, HALF, keep=True)
        assert one.report(again.checkpoint).tensors["a.weight"].sparsity == 0.75
        for client in (one, other):
            assert list(client.checkpoints()) == [
                again.checkpoint,
                result.checkpoint,
                checkpoint,
            ]
            found = downloaded(client, checkpoint, tmp_path)
            assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
        one.delete(checkpoint)
        with pytest.raises(secateur.CheckpointNotFound):
            other.report(checkpoint)
        assert other.report(again.checkpoint).tensors["a.weight"].sparsity == 0.75


@pytest.mark.slow
def test_a_server_that_starts_later_has_them_too(uri: str, tmp_path: Path) -> None:
    tensors = model(COUNT)
    with clients(uri, 1) as (client,):
        checkpoint = client.upload(tensors)
    with clients(uri, 1) as (client,):
        found = downloaded(client, checkpoint, tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_nothing_is_left_of_what_is_deleted(bucket: Bucket, uri: str, tmp_path: Path) -> None:  # noqa: F811
    with stores(uri, tmp_path) as (one, other):
        first, second = create(one, 0), create(other, 0)
        assert len(keys(bucket, uri, "blobs")) == 1, "the same content is stored once"
        other.delete(OWNER, first.name)
        assert len(keys(bucket, uri, "blobs")) == 1
        one.delete(OWNER, second.name)
        for kind in ("records", "blobs", "used", "claims", "removing"):
            assert keys(bucket, uri, kind) == []
        for store in (one, other):
            with pytest.raises(CheckpointNotFound):
                store.delete(OWNER, second.name)


def test_a_quota_holds_across_servers(uri: str, tmp_path: Path) -> None:
    with stores(uri, tmp_path) as (one, other):
        quota = 3 * (create(one, 0).files[0].size + 3 * 4096)
        made = [create(store, seed, quota) for seed, store in ((1, other), (2, one), (3, other))]
        assert [r.id for r in one.page(OWNER, "", 9)] == [record.id for record in made[::-1]]
        with pytest.raises(QuotaExceeded):
            create(one, 4, quota=8192)
        assert [r.id for r in other.page(OWNER, "", 9)] == [record.id for record in made[::-1]]


def test_two_that_are_created_at_once_do_not_evict_each_other(uri: str, tmp_path: Path) -> None:
    """While one server decides whether its checkpoint fits, another one does not evict it."""
    with stores(uri, tmp_path) as (one, other):
        first = create(one, 0)
        quota = first.files[0].size + 4 * 4096
        objects, digests = Objects(uri, 60.0), [first.files[0].blake3]
        with claimed(RequestContext(), objects, digests, first.id), pytest.raises(QuotaExceeded):
            create(other, 1, quota)
        assert [r.id for r in other.page(OWNER, "", 9)] == [first.id]
        second = create(other, 1, quota)
        assert [r.id for r in one.page(OWNER, "", 9)] == [second.id]


@pytest.mark.slow
def test_the_least_recently_used_is_evicted(uri: str, tmp_path: Path) -> None:
    evicted: list[str] = []

    def note(reason: str, count: int) -> None:
        assert count > 0
        evicted.append(reason)

    size = len(file_of(model(COUNT))) + 3 * 4096
    with stores(uri, tmp_path, max_bytes=2 * size + 4096, evicted=note) as (one, other):
        first, second = create(one, 0), create(other, 1)
        time.sleep(1.1)  # the times of objects are whole seconds
        one._uses.clear()
        with one.open(RequestContext(), OWNER, first.name):
            pass
        third = create(other, 2)
        assert {r.id for r in one.page(OWNER, "", 9)} == {first.id, third.id}
        assert evicted == ["room"]
        with pytest.raises(CheckpointNotFound):
            one.get(OWNER, second.name)


@pytest.mark.slow
def test_unused_checkpoints_expire(uri: str, tmp_path: Path) -> None:
    with stores(uri, tmp_path, ttl=1.0) as (one, other):
        record = create(one, 0)
        assert other.expire_time(OWNER, record) is not None
        time.sleep(2.1)
        with other.open(RequestContext(), OWNER, record.name):
            other.expire()  # in use
        other._uses.clear()
        assert one.get(OWNER, record.name) == record
        time.sleep(2.1)
        one.expire()
        other.expire()
        assert one.count == 0
        with pytest.raises(CheckpointNotFound):
            other.get(OWNER, record.name)


@pytest.mark.slow
def test_damage_is_found(bucket: Bucket, uri: str, tmp_path: Path) -> None:  # noqa: F811
    with clients(uri, 3) as (one, other, third):
        checkpoint = one.upload(model(COUNT))
        (digest,) = keys(bucket, uri, "blobs")
        key = f"{uri.removeprefix('s3://bucket/')}/blobs/{digest}"
        data = bytearray(bucket.s3.get_object(Bucket="bucket", Key=key)["Body"].read())
        bucket.s3.delete_object(Bucket="bucket", Key=key)
        with pytest.raises(secateur.DataLoss, match="is missing"):
            other.report(checkpoint)
        assert one.report(checkpoint).total == COUNT, "its cache has the file"
        other.upload(model(COUNT))
        assert other.report(checkpoint).total == COUNT, "the upload has repaired it"
        data[-1] ^= 1
        bucket.s3.put_object(Bucket="bucket", Key=key, Body=bytes(data))
        with pytest.raises(secateur.DataLoss, match="is damaged"):
            third.report(checkpoint)
        third.upload(model(COUNT))
        assert third.report(checkpoint).total == COUNT, "the upload has repaired it"
        path = f"records/{'0' * 32}/{checkpoint.name.removeprefix('checkpoints/')}.json"
        assert path.removeprefix("records/") in keys(bucket, uri, "records")
        key = f"{uri.removeprefix('s3://bucket/')}/{path}"
        bucket.s3.put_object(Bucket="bucket", Key=key, Body=b"{}")
        with pytest.raises(secateur.DataLoss, match="record is damaged"):
            one.report(checkpoint)
        one.delete(checkpoint)
        with pytest.raises(secateur.CheckpointNotFound):
            other.report(checkpoint)


@pytest.mark.parametrize("name", ["checkpoints/../../blobs/x", "checkpoints/", "a", ""])
def test_other_names_are_not_found(uri: str, tmp_path: Path, name: str) -> None:
    with stores(uri, tmp_path, 1) as (store,), pytest.raises(CheckpointNotFound):
        store.get(OWNER, name)


def test_a_blob_that_is_claimed_or_named_is_kept(
    bucket: Bucket,  # noqa: F811
    uri: str,
    tmp_path: Path,
) -> None:
    objects, context = Objects(uri, 60.0), RequestContext()
    records = SharedRecords(objects)
    with stores(uri, tmp_path, 1) as (store,):
        record = create(store, 0)
        digest = record.files[0].blake3
        assert remove_unnamed(context, objects, records, [digest]) == []
        objects.remove(context, f"records/{OWNER}/{record.id}.json")
        with claimed(context, objects, [digest], record.id):
            assert remove_unnamed(context, objects, records, [digest]) == []
        assert keys(bucket, uri, "removing") == []
        assert remove_unnamed(context, objects, records, [digest]) == [digest]
        assert keys(bucket, uri, "blobs") == []


def test_a_claim_waits_for_a_removal(
    bucket: Bucket,  # noqa: F811
    uri: str,
    tmp_path: Path,
) -> None:
    """Without the wait, the record would name a blob that is about to be removed."""
    objects, context = Objects(uri, 60.0), RequestContext()
    with stores(uri, tmp_path) as (one, other), ThreadPoolExecutor() as threads:
        digest = create(one, 0).files[0].blake3
        objects.write(context, f"removing/{digest}/other")
        creation = threads.submit(create, other, 0)
        eventually(lambda: len(keys(bucket, uri, "claims")), 1)
        assert len(keys(bucket, uri, "records")) == 1
        objects.remove(context, f"blobs/{digest}")
        objects.remove(context, f"removing/{digest}/other")
        creation.result()
    assert keys(bucket, uri, "blobs") == [digest]
    assert len(keys(bucket, uri, "records")) == 2


def test_calls_that_need_a_checkpoint_fetch_it_once(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    download = Objects.download

    def slowly(self: Objects, context: RequestContext, key: str) -> Iterator[bytes]:
        fetched.append(key)
        time.sleep(0.5)
        yield from download(self, context, key)

    monkeypatch.setattr(Objects, "download", slowly)
    with stores(uri, tmp_path) as (one, other), ThreadPoolExecutor() as threads:
        record = create(one, 0)

        def read(number: int) -> int:
            with other.open(RequestContext(), OWNER, record.name) as opened:
                return len(opened.files[0].data)

        assert list(threads.map(read, range(5))) == 5 * [record.files[0].size]
        late = RequestContext(deadline=time.monotonic() - 1)
        other._local.delete(OWNER, record.name)
        with pytest.raises(RequestError), other.open(late, OWNER, record.name):
            pass
    assert len(fetched) <= 2


def test_a_sweep_removes_what_servers_have_left_behind(
    bucket: Bucket,  # noqa: F811
    uri: str,
    tmp_path: Path,
) -> None:
    objects, context = Objects(uri, 60.0), RequestContext()
    with stores(uri, tmp_path, 1) as (store,):
        record = create(store, 0)
        objects.write(context, "blobs/" + "0" * 64, b"data")
        objects.write(context, f"used/{OWNER}/{'0' * 32}")
        store.sweep(3600.0)
        assert len(keys(bucket, uri, "blobs")) == 2
        store.sweep(-5.0)
        assert keys(bucket, uri, "blobs") == [record.files[0].blake3]
        assert keys(bucket, uri, "used") == [f"{OWNER}/{record.id}"]


@pytest.mark.slow
def test_an_object_store_that_fails_is_unavailable(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stores(uri, tmp_path, 1) as (store,):
        record = create(store, 0)
        monkeypatch.setattr(store._objects, "_root", "no-such-bucket/prefix")
        with pytest.raises(StoreFailed, match="bucket does not exist"):
            create(store, 1)
        with pytest.raises(CheckpointNotFound):
            store.get(OWNER, record.name)


@pytest.mark.slow
def test_a_server_does_not_start_without_its_bucket(bucket: Bucket) -> None:  # noqa: F811
    ended = run_server("--store-uri", "s3://no-such-bucket/prefix")
    assert ended.returncode == 1
    assert "cannot store checkpoints in s3://no-such-bucket/prefix (--store-uri)" in ended.stderr
    assert "Traceback" not in ended.stderr
