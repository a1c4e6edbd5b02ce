"""An object is written completely or not at all, and leaves no unfinished parts."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from safetensors.torch import load_file

import secateur
from secateur_proto import pruner_pb2 as pb
from secateur_proto.pruner_pb2_grpc import PrunerStub
from secateur_server.errors import UriChanged
from secateur_server.runtime.context import RequestContext
from secateur_server.uris.remote import RemoteFile
from secateur_server.uris.requests import Requests
from secateur_server.uris.scratch import Scratch
from tests.conftest import caught, eventually
from tests.contract.raw import check_serves, failure, header, message, series
from tests.reference import assert_same_tensors
from tests.uris.conftest import Bucket
from tests.uris.served import HALF, MODEL, Served, check, saved, serving, weights

MODELS = "s3://bucket/models"
OUT = f"{MODELS}/out.safetensors"


@pytest.fixture(scope="module")
def served(bucket: Bucket) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_MAX_ATTEMPTS", "1")  # what fails is to fail soon
        with serving("--allow-uri", MODELS) as running:
            yield running


@pytest.fixture(scope="module")
def large(served: Served, tmp_path_factory: pytest.TempPathFactory) -> secateur.Checkpoint:
    """A checkpoint that takes some seconds to write: twenty parts and more."""
    model = weights((16 << 20,), (16 << 20,), (16 << 20,))
    return served.client.upload(saved(tmp_path_factory.mktemp("large") / "m.safetensors", model))


@pytest.fixture(autouse=True)
def _nothing_is_left(served: Served, bucket: Bucket) -> Iterator[None]:
    yield
    eventually(bucket.uploads, [])
    assert bucket.keys() == ["models-private/model.safetensors", "models/model.safetensors"]
    check_serves(served.server, served.channel)


def begin_to_write(served: Served, source: secateur.Checkpoint, bucket: Bucket) -> Any:
    """A call that has a multipart upload under way."""
    fields = {"checkpoint": source.name, "destination_uri": OUT, "output": pb.OUTPUT_DENSE}
    first = message("Prune", header=header("Prune", 0, **fields))
    return caught(
        lambda: PrunerStub(served.channel).Prune(iter([first]), timeout=300),
        lambda: len(bucket.uploads()) == 1,
    )


def in_flight(served: Served) -> Callable[[], float]:
    return lambda: series(served.server, "secateur_requests_in_flight")


def test_cancelled_call_leaves_nothing(
    served: Served, large: secateur.Checkpoint, bucket: Bucket
) -> None:
    call = begin_to_write(served, large, bucket)
    call.cancel()
    eventually(in_flight(served), 0.0)  # a part that is on its way comes to its end
    assert call.code() == grpc.StatusCode.CANCELLED


def test_call_past_its_deadline_leaves_nothing(served: Served, large: secateur.Checkpoint) -> None:
    hurried = secateur.Client(channel=served.channel, timeout=1.0)
    with pytest.raises(secateur.DeadlineExceeded):
        hurried.prune(large, HALF, "dense", destination=OUT)
    eventually(in_flight(served), 0.0)


def test_failed_upload_leaves_nothing(
    served: Served, large: secateur.Checkpoint, bucket: Bucket
) -> None:
    call = begin_to_write(served, large, bucket)
    (upload,) = bucket.uploads()
    bucket.s3.abort_multipart_upload(Bucket="bucket", Key="models/out.safetensors", UploadId=upload)
    check(failure(list, call), "FAILED_PRECONDITION", "URI_FAILED", OUT, "cannot be written")


def test_failed_write_leaves_the_old_object(
    served: Served, large: secateur.Checkpoint, bucket: Bucket
) -> None:
    bucket.s3.put_object(Bucket="bucket", Key="models/out.safetensors", Body=b"before")
    call = begin_to_write(served, large, bucket)
    call.cancel()
    eventually(in_flight(served), 0.0)
    found = bucket.s3.get_object(Bucket="bucket", Key="models/out.safetensors")
    assert found["Body"].read() == b"before"
    bucket.s3.delete_object(Bucket="bucket", Key="models/out.safetensors")


def test_replaced_object_is_detected(bucket: Bucket, tmp_path: Path) -> None:
    source = f"{MODELS}/model.safetensors"
    file = RemoteFile(RequestContext(), "uri", source, Requests(300), (MODELS,))
    file.fetch(Scratch(tmp_path, file.size, lambda count: None))
    before = bytes(file.data)
    file.check_unchanged()
    bucket.put("models/model.safetensors", saved(tmp_path / "other", weights((5,))))
    with pytest.raises(UriChanged, match="changed while it was read"):
        file.check_unchanged()
    (tmp_path / "fetched").write_bytes(before)
    assert_same_tensors(load_file(tmp_path / "fetched"), MODEL)
    assert sorted(os.listdir(tmp_path)) == ["fetched", "other"]
    bucket.put("models/model.safetensors", tmp_path / "fetched")
