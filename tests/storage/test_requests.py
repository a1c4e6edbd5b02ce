"""The calls on checkpoints: arguments, access and errors."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import safetensors.torch
import torch

import secateur
from secateur_proto import checkpoints_pb2 as pb
from secateur_proto import pruner_pb2
from secateur_proto.checkpoint_pb2 import File
from secateur_proto.checkpoints_pb2_grpc import CheckpointsStub
from secateur_proto.pruner_pb2_grpc import PrunerStub
from tests.conftest import eventually
from tests.contract.raw import (
    TIMEOUT,
    Failure,
    bearer,
    check_failed,
    check_invalid,
    entry,
    failure,
    file,
    series,
    spec,
)
from tests.storage.stored import (
    Kept,
    committed,
    digest_of,
    file_message,
    file_of,
    kept,
    on_disk,
    send_upload,
    upload_file,
    upload_requests,
)

DATA = file_of({"w": torch.arange(1.0, 7)})
SIZE = len(DATA)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    with kept(tmp_path_factory.mktemp("requests")) as running:
        yield running


@pytest.fixture(autouse=True)
def _store_is_empty_afterwards(store: Kept) -> Iterator[None]:
    yield
    for checkpoint in store.client.checkpoints():
        store.client.delete(checkpoint)
    eventually(lambda: on_disk(store.folder), {})


# List -----------------------------------------------------------------------------------------


def page(store: Kept, **fields: Any) -> pb.ListResponse:
    return CheckpointsStub(store.channel).List(pb.ListRequest(**fields), timeout=TIMEOUT)


def test_pages_list_each_checkpoint_once_newest_first(store: Kept) -> None:
    made = [store.client.upload({"w": torch.full((2,), i)}).name for i in range(7)]
    found: list[list[str]] = []
    following = ""
    while True:
        answer = page(store, page_size=3, page_token=following)
        found.append([checkpoint.name for checkpoint in answer.checkpoints])
        following = answer.next_page_token
        if not following:
            break
    assert [len(names) for names in found] == [3, 3, 1]
    assert [name for names in found for name in names] == made[::-1]
    times = [checkpoint.create_time for checkpoint in store.client.checkpoints()]
    assert times == sorted(times, reverse=True)


def test_full_last_page_has_no_next_page(store: Kept) -> None:
    for index in range(2):
        store.client.upload({"w": torch.full((2,), index)})
    assert page(store, page_size=2).next_page_token == ""
    assert page(store, page_size=1).next_page_token != ""
    assert len(page(store, page_size=5000).checkpoints) == 2
    assert len(page(store).checkpoints) == 2


def test_pages_continue_after_deletions_and_additions(store: Kept) -> None:
    first, second, third = (store.client.upload({"w": torch.full((2,), i)}) for i in range(3))
    answer = page(store, page_size=2)
    store.client.delete(second)
    store.client.upload({"w": torch.ones(9)})
    rest = page(store, page_token=answer.next_page_token)
    assert [checkpoint.name for checkpoint in rest.checkpoints] == [first.name]
    assert answer.checkpoints[0].name == third.name


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"page_size": -1}, "page_size"),
        ({"page_token": "x"}, "page_token"),
        ({"page_token": "A" * 32}, "page_token"),
        ({"page_token": "0" * 31}, "page_token"),
    ],
)
def test_invalid_page_token_is_refused(store: Kept, fields: dict[str, Any], field: str) -> None:
    found = failure(page, store, **fields)
    check_invalid(found, "INVALID_REQUEST", field, [str(next(iter(fields.values())))])


# Upload ---------------------------------------------------------------------------------------


def named(name: str) -> File:
    return file_message(DATA, name)


GOOD = upload_file(named("a.safetensors"))
FILE = "header.files[0].file"


@pytest.mark.parametrize(
    ("files", "field", "part"),
    [
        ([], "header.files", "is empty"),
        ([upload_file(named("a/b"))], f"{FILE}.filename", "'a/b'"),
        ([upload_file(named(".."))], f"{FILE}.filename", "'..'"),
        ([upload_file(named("."))], f"{FILE}.filename", "'.'"),
        ([upload_file(named("a\0b"))], f"{FILE}.filename", "name"),
        ([upload_file(named("é" * 128))], f"{FILE}.filename", "name"),
        ([upload_file(file_message(DATA, size_bytes=0))], f"{FILE}.size_bytes", "size"),
        ([upload_file(file_message(DATA, blake3="0" * 63))], f"{FILE}.blake3", "0" * 63),
        ([upload_file(file_message(DATA, blake3="A" * 64))], f"{FILE}.blake3", "A" * 64),
        ([upload_file(file_message(DATA, blake3="../" * 21 + "x"))], f"{FILE}.blake3", "../"),
        ([upload_file(named("a"), SIZE + 1)], "header.files[0].offset", str(SIZE + 1)),
        ([upload_file(named("a"), SIZE)], "header.files[0].offset", str(SIZE)),
        ([upload_file(named("a"), 1)], "header.files[0].offset", "0 bytes"),
        ([GOOD, GOOD], "header.files[1].file.filename", "'a.safetensors'"),
        ([GOOD, upload_file(named("b/"))], "header.files[1].file.filename", "'b/'"),
    ],
)
def test_wrong_header_is_refused_with_its_field(
    store: Kept, files: list[pb.UploadFile], field: str, part: str
) -> None:
    found = failure(send_upload, store.channel, upload_requests(files, DATA))
    check_invalid(found, "INVALID_REQUEST", field, [part])
    assert on_disk(store.folder) == {}


def test_wrong_offset_is_refused_with_the_field_of_its_file(store: Kept) -> None:
    files = [GOOD, upload_file(named("b.safetensors"), SIZE), upload_file(named("c"), SIZE + 1)]
    found = failure(send_upload, store.channel, upload_requests(files, DATA))
    check_invalid(found, "INVALID_REQUEST", "header.files[2].offset", [str(SIZE + 1)])


NOT_FILES = {
    "text": b"this is no model, whatever its name says",
    "short": b"123456789",
    "pickle": b"\x80\x02}q\x00.......",
    "gap": file({"w": entry("F32", [1], 4, 8)}, bytes(8)),
    "long": file({"w": entry("F32", [1], 0, 4)}, bytes(8)),
    "dtype": file({"w": entry("F31", [1], 0, 4)}, bytes(4)),
    "pair": safetensors.torch.save({"w_orig": torch.ones(3), "w_mask": torch.ones(4)}),
}


@pytest.mark.parametrize("is_announced", [True, False])
@pytest.mark.parametrize("kind", NOT_FILES)
def test_invalid_model_is_refused_and_not_kept(store: Kept, kind: str, is_announced: bool) -> None:
    data = NOT_FILES[kind]
    message = file_message(data, blake3=digest_of(data) if is_announced else "")
    requests = upload_requests([upload_file(message)], data)
    found = failure(send_upload, store.channel, requests)
    found = check_failed(found, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_STATE_DICT")
    assert found.fields[0].startswith("data")
    assert on_disk(store.folder) == {}
    assert committed(store.channel, file_message(data)) == 0


@pytest.mark.parametrize("kind", NOT_FILES)
def test_invalid_model_is_not_kept_by_a_prune(store: Kept, kind: str) -> None:
    found = kept_prune(store, NOT_FILES[kind])
    assert found is not None
    assert found.code == grpc.StatusCode.INVALID_ARGUMENT
    assert found.fields[0].startswith("header.data_bytes" if kind == "short" else "data")
    assert on_disk(store.folder) == {}


def kept_prune(store: Kept, data: bytes, more: bytes = b"", tensors: str = "*") -> Failure | None:
    header = pruner_pb2.PruneHeader(data_bytes=len(data), spec=spec(tensors), keep=True)
    requests = [pruner_pb2.PruneRequest(header=header, data=data)]
    if more:
        requests.append(pruner_pb2.PruneRequest(data=more))
    stub = PrunerStub(store.channel)
    return failure(lambda: list(stub.Prune(iter(requests), timeout=TIMEOUT)))


def test_failed_kept_prune_keeps_nothing(store: Kept) -> None:
    found = kept_prune(store, DATA, tensors="x")
    check_invalid(found, "INVALID_SPEC", "spec.rules[0].selection.tensors[0]", ["'x'"])
    assert on_disk(store.folder) == {}
    found = kept_prune(store, DATA, more=b"!")
    check_invalid(found, "INVALID_STATE_DICT", "data", [str(SIZE)])
    assert on_disk(store.folder) == {}
    assert kept_prune(store, DATA) is None
    assert series(store.server, "secateur_checkpoints") == 1


def test_files_that_do_not_form_a_model_are_refused(store: Kept) -> None:
    other = file_of({"v": torch.ones(3)})
    files = [GOOD, upload_file(file_message(other, "b.safetensors"))]
    found = failure(send_upload, store.channel, upload_requests(files, DATA + other))
    check_invalid(found, "INVALID_STATE_DICT", "data", ["2 files and 0 indices"])
    assert on_disk(store.folder) == {}


def test_a_query_without_a_digest_is_refused(store: Kept) -> None:
    request = pb.QueryUploadRequest(files=[GOOD.file, File(filename="x", size_bytes=3)])
    found = failure(CheckpointsStub(store.channel).QueryUpload, request, timeout=TIMEOUT)
    check_invalid(found, "INVALID_REQUEST", "files[1].blake3", [])


# Owners of checkpoints ------------------------------------------------------------------------

NAMED: dict[str, Callable[[CheckpointsStub, str], Any]] = {
    "get": lambda stub, name: stub.Get(pb.GetRequest(name=name), metadata=bearer("bob")),
    "delete": lambda stub, name: stub.Delete(pb.DeleteRequest(name=name), metadata=bearer("bob")),
    "download": lambda stub, name: list(
        stub.Download(pb.DownloadRequest(name=name), metadata=bearer("bob"))
    ),
}


@pytest.fixture
def of_alice(store: Kept) -> Iterator[secateur.Checkpoint]:
    with secateur.Client(store.server.address, token="alice", timeout=300) as alice:
        checkpoint = alice.upload({"w": torch.arange(1.0, 7)})
        yield checkpoint
        assert list(alice.checkpoints()) == [checkpoint]
        assert alice.report(checkpoint).total == 6
        alice.delete(checkpoint)


@pytest.mark.parametrize("rpc", NAMED)
def test_name_of_another_owners_checkpoint_is_not_found(
    store: Kept, of_alice: secateur.Checkpoint, rpc: str
) -> None:
    missing = f"checkpoints/{'0' * 32}"
    stub = CheckpointsStub(store.channel)
    ident = of_alice.name.removeprefix("checkpoints/")
    for name in (of_alice.name, missing, ident, "", "checkpoints/", f"checkpoints/../{ident}"):
        found = failure(NAMED[rpc], stub, name)
        found = check_failed(found, grpc.StatusCode.NOT_FOUND, "CHECKPOINT_NOT_FOUND")
        assert found.message == (
            f"checkpoint: {name!r} does not exist: it may have been deleted, evicted or expired, "
            "or belong to another token"
        )


def test_checkpoint_of_another_owner_cannot_be_pruned(
    store: Kept, of_alice: secateur.Checkpoint
) -> None:
    with secateur.Client(store.server.address, token="bob", timeout=300) as bob:
        assert list(bob.checkpoints()) == []
        for call in (bob.report, bob.finalize):
            with pytest.raises(secateur.CheckpointNotFound):
                call(of_alice)
        with pytest.raises(secateur.CheckpointNotFound):
            bob.prune(of_alice, secateur.l1_unstructured("w", 1), keep=True)


def test_digest_alone_gives_no_access(store: Kept, of_alice: secateur.Checkpoint) -> None:
    message = File(
        filename="model.safetensors",
        size_bytes=of_alice.size_bytes,
        blake3=of_alice.files[0].blake3,
    )
    for name in ("bob", ""):
        assert committed(store.channel, message, name) == 0
        requests = upload_requests([upload_file(message, message.size_bytes)])
        found = failure(send_upload, store.channel, requests, name)
        check_invalid(found, "INVALID_REQUEST", "header.files[0].offset", ["0 bytes"])
    assert committed(store.channel, message, "alice") == message.size_bytes


def test_same_model_of_two_owners_is_one_blob_with_separate_checkpoints(
    store: Kept, of_alice: secateur.Checkpoint, tmp_path: Path
) -> None:
    with secateur.Client(store.server.address, token="bob", timeout=300) as bob:
        of_bob = bob.upload({"w": torch.arange(1.0, 7)})
        assert len([name for name in on_disk(store.folder) if name.endswith(".sums")]) == 1
        bob.delete(of_bob)
        with pytest.raises(secateur.CheckpointNotFound):
            bob.delete(of_bob)


def test_checkpoint_is_found_by_its_full_name_only(store: Kept) -> None:
    uploaded = store.client.upload({"w": torch.ones(2)})
    ident = uploaded.name.removeprefix("checkpoints/")
    stub = CheckpointsStub(store.channel)
    for name in (ident, f"checkpoints/checkpoints/{ident}", uploaded.name.upper()):
        found = failure(stub.Get, pb.GetRequest(name=name), timeout=TIMEOUT)
        check_failed(found, grpc.StatusCode.NOT_FOUND, "CHECKPOINT_NOT_FOUND")


def test_deletion_of_a_missing_checkpoint_may_be_allowed(store: Kept) -> None:
    stub = CheckpointsStub(store.channel)
    request = pb.DeleteRequest(name="checkpoints/none", allow_missing=True)
    assert failure(stub.Delete, request, timeout=TIMEOUT) is None


@pytest.mark.parametrize("output", [pruner_pb2.OUTPUT_NONE, 77])
def test_invalid_output_of_a_download_is_refused(store: Kept, output: Any) -> None:
    uploaded = store.client.upload({"w": torch.ones(2)})
    request = pb.DownloadRequest(name=uploaded.name, output=output)
    stub = CheckpointsStub(store.channel)
    found = failure(lambda: list(stub.Download(request, timeout=TIMEOUT)))
    check_invalid(found, "INVALID_REQUEST", "output", [str(output)])
