"""s3:// URIs, against moto's S3 server: allowed prefixes only, and whole objects or none."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load

import secateur
from secateur_server.uris.systems import RANGE_BYTES
from tests.client.sharded import INDEX, SHARDS, read_shards, real_weights, write_shards
from tests.conftest import eventually
from tests.contract.raw import check_serves, failure, header, message, send, series
from tests.reference import assert_same_tensors
from tests.uris.conftest import Bucket
from tests.uris.served import (
    HALF,
    MODEL,
    SECRET,
    Served,
    check,
    check_refused,
    saved,
    serving,
    weights,
)

MODELS = "s3://bucket/models"
LISTED = f"{MODELS},s3://nowhere/x/"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def served(bucket: Bucket, store: Path) -> Iterator[Served]:
    with serving("--allow-uri", LISTED, "--store-dir", str(store)) as running:
        yield running


@pytest.fixture(autouse=True)
def _the_server_goes_on(served: Served, bucket: Bucket, store: Path) -> Iterator[None]:
    yield
    check_serves(served.server, served.channel)
    assert not os.listdir(store / "parts")
    assert not bucket.uploads()
    assert SECRET not in served.server.log.read_text()


@pytest.fixture
def large(bucket: Bucket, tmp_path: Path) -> str:
    """A model that takes several ranges, and several parts."""
    tensors = weights((5 << 20,), (3, (2 << 20) + 1), (1 << 20, 3))
    assert sum(tensor.nbytes for tensor in tensors.values()) > 6 * RANGE_BYTES
    bucket.put("models/large.safetensors", saved(tmp_path / "large", tensors))
    return f"{MODELS}/large.safetensors"


# The same bits -------------------------------------------------------------------------------


def test_a_model_is_read_and_written(served: Served, bucket: Bucket) -> None:
    source = f"{MODELS}/model.safetensors"
    of_data = served.client.prune(MODEL, HALF)
    assert_same_tensors(served.client.prune(source, HALF).masks, of_data.masks)
    for form in ("dense", "reparametrized"):
        served.client.prune(source, HALF, form, destination=f"{MODELS}/new/{form}")
        assert_same_tensors(bucket.get(f"models/new/{form}"), of_data.state_dict(form))
    served.client.finalize(f"{MODELS}/new/reparametrized", destination=f"{MODELS}/new/dense")
    assert_same_tensors(bucket.get("models/new/dense"), of_data.state_dict())
    assert served.client.report(f"{MODELS}/new/dense").zeros == of_data.report.zeros


def test_large_models_are_read_in_ranges_and_written_in_parts(
    served: Served, bucket: Bucket, large: str, tmp_path: Path
) -> None:
    served.client.prune(large, HALF, "dense", destination=f"{MODELS}/out")
    expected = served.client.prune(load((tmp_path / "large").read_bytes()), HALF).state_dict()
    assert_same_tensors(bucket.get("models/out"), expected)
    etag = bucket.s3.head_object(Bucket="bucket", Key="models/out")["ETag"]
    assert "-" in etag, "written in one part"


def test_uploaded_bytes_are_the_object(
    served: Served, bucket: Bucket, large: str, tmp_path: Path
) -> None:
    checkpoint = served.client.upload(large)
    served.client.download(checkpoint, tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == (tmp_path / "large").read_bytes()
    kept = served.client.prune(large, HALF, keep=True).checkpoint
    assert kept is not None
    assert kept.files == checkpoint.files
    for name in (checkpoint, kept):
        served.client.delete(name)


def test_shards_are_written_beside_their_index(
    served: Served, bucket: Bucket, crepe: Path, tmp_path: Path
) -> None:
    index, model = write_shards(tmp_path / "in", real_weights(crepe)), real_weights(crepe)
    for name in (*SHARDS, INDEX):
        bucket.put(f"models/in/{name}", index.parent / name)
    rule = secateur.global_unstructured("*.weight", 0.5)
    served.client.prune(f"{MODELS}/in/{INDEX}", rule, "dense", destination=f"{MODELS}/out/{INDEX}")
    (tmp_path / "out").mkdir()
    for name in (*SHARDS, INDEX):
        bucket.s3.download_file("bucket", f"models/out/{name}", str(tmp_path / "out" / name))
    assert_same_tensors(
        read_shards(tmp_path / "out"), served.client.prune(model, rule).state_dict()
    )


# Refused -------------------------------------------------------------------------------------

ELSEWHERE = [
    "s3://bucket/models-private/model.safetensors",
    "s3://bucket/models",
    "s3://bucket/model.safetensors",
    "s3://other/models/model.safetensors",
    "s3://bucket/models/../models-private/model.safetensors",
    "s3://bucket/models/./../models-private/model.safetensors",
    "s3://bucket/models/%2e%2e/models-private/model.safetensors",
    "s3://bucket/models/model.safetensors?versionId=1",
    "s3://bucket/models/model.safetensors#x",
    "s3://bucket/models/..\\models-private\\model.safetensors",
    "S3://bucket/models/model.safetensors",
    "s3a://bucket/models/model.safetensors",
    "simplecache::s3://bucket/models/model.safetensors",
    "s3://bucket/models/x::s3://bucket/models-private/model.safetensors",
    "zip://x::s3://bucket/models/model.safetensors",
    "memory://bucket/models/model.safetensors",
    "http://127.0.0.1/bucket/models/model.safetensors",
    "local:///etc/hostname",
    "file:///etc/hostname",
    "/etc/hostname",
    "bucket/models/model.safetensors",
]


@pytest.mark.parametrize("uri", ELSEWHERE)
def test_uris_that_are_not_allowed_are_neither_read_nor_written(
    served: Served, bucket: Bucket, uri: str
) -> None:
    before = bucket.keys()
    check_refused(served.read(uri))
    check_refused(served.write(f"{MODELS}/model.safetensors", uri))
    assert bucket.keys() == before


def test_nothing_is_allowed_by_default(client: secateur.Client) -> None:
    for uri in (f"{MODELS}/model.safetensors", "memory://x/y", "https://example.com/x"):
        with pytest.raises(secateur.PermissionDenied, match="--allow-uri"):
            client.report(uri)


# What cannot be read or written --------------------------------------------------------------


def test_missing_file_is_not_found(served: Served, bucket: Bucket) -> None:
    for uri in (f"{MODELS}/none", "s3://nowhere/x/none"):
        check(served.read(uri), "NOT_FOUND", "URI_NOT_FOUND", uri)
    found = served.write(f"{MODELS}/model.safetensors", "s3://nowhere/x/out")
    check(found, "FAILED_PRECONDITION", "URI_FAILED", "s3://nowhere/x/out", "bucket")


def test_invalid_model_is_an_error(served: Served, bucket: Bucket) -> None:
    for data in (b"", b"no model at all"):
        bucket.s3.put_object(Bucket="bucket", Key="models/broken/file", Body=data)
        found = served.read(f"{MODELS}/broken/file")
        check(found, "INVALID_ARGUMENT", "INVALID_STATE_DICT", "file")
    check(served.read(f"{MODELS}/broken"), "FAILED_PRECONDITION", "URI_FAILED", "is not a file")


def test_wrong_credentials_are_reported_without_their_values(
    bucket: Bucket, served: Served
) -> None:
    bucket.need_credentials("0")
    try:
        with serving("--allow-uri", LISTED) as stranger:
            checkpoint = stranger.client.upload(MODEL)
            for source in (checkpoint, f"{MODELS}/model.safetensors"):
                with pytest.raises(secateur.UriError, match=MODELS) as found:
                    stranger.client.prune(source, HALF, destination=f"{MODELS}/out")
                assert SECRET not in str(found.value)
            assert SECRET not in stranger.server.log.read_text()
    finally:
        bucket.need_credentials("inf")


def test_unreachable_endpoint_is_an_error(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        place = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", place)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with serving("--allow-uri", LISTED) as alone:
        check(alone.read(f"{MODELS}/x"), "FAILED_PRECONDITION", "URI_FAILED", "cannot be read")


def test_call_to_a_silent_endpoint_can_be_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_flight = "secateur_requests_in_flight"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with serving("--allow-uri", LISTED) as waiting:
            for rpc in ("Report", "Prune", "Finalize"):
                first = message(rpc, header=header(rpc, 0, uri=f"{MODELS}/x"))
                found = failure(send, waiting.channel, rpc, [first], timeout=0.5)
                assert found is not None
                assert found.code.name == "DEADLINE_EXCEEDED", found
                eventually(lambda: series(waiting.server, in_flight), 0.0)


@pytest.mark.parametrize("hidden", ["fsspec", pytest.param("s3fs", marks=pytest.mark.slow)])
def test_missing_package_error_says_what_to_install(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: str
) -> None:
    (tmp_path / f"{hidden}.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with serving("--allow-uri", LISTED) as bare:
        for found in (
            bare.read(f"{MODELS}/model.safetensors"),
            bare.write("", f"{MODELS}/out", uri=None, checkpoint=bare.client.upload(MODEL).name),
        ):
            check(found, "FAILED_PRECONDITION", "URI_FAILED", "pip install 'secateur[remote]'")
