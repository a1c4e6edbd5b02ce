"""A caller can neither tell what other tenants have stored, nor block the server with queries."""

import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from secateur_proto import checkpoints_pb2 as pb
from secateur_proto.checkpoints_pb2_grpc import CheckpointsStub
from secateur_server.errors import Cancelled, InvalidRequest
from secateur_server.runtime.context import RequestContext
from secateur_server.storage.records import StoredFile
from secateur_server.storage.store import Store
from secateur_server.storage.uploads import Uploads
from tests.conftest import eventually
from tests.contract.raw import TIMEOUT, check_invalid, failure, series
from tests.storage.stored import Kept, digest_of, file_message, kept

ALICE, BOB = "a" * 32, "b" * 32
DATA = b"what alice has stored"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store in which only alice has a checkpoint and a part of a file."""
    opened = Store(tmp_path / "store", 1 << 20, ttl=0)
    upload = opened.uploads.begin(ALICE, len(DATA), digest_of(DATA))
    opened.uploads.write(upload, DATA)
    stored = opened.uploads.finish(RequestContext(), upload, "a.safetensors")
    opened.create(RequestContext(), ALICE, (stored,))
    opened.uploads.leave(upload)
    part = opened.uploads.begin(ALICE, 100, digest_of(b"part"), is_resumable=True)
    opened.uploads.write(part, b"the first bytes")
    opened.uploads.leave(part)
    yield opened
    opened.close()


STORED, PART = StoredFile("", len(DATA), digest_of(DATA)), StoredFile("", 100, digest_of(b"part"))
UNKNOWN = digest_of(b"nobody has this")


class Lines:
    """Records every line that a thread executes, and every event of the interpreter."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, str]] = []

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        self.seen.append((frame.f_code.co_filename, frame.f_lineno, event))
        return self._trace

    def of(self, call: Any, *arguments: Any) -> tuple[Any, list[tuple[str, int, str]]]:
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            found = call(*arguments)
        except InvalidRequest as error:
            found = str(error)
        finally:
            sys.settrace(before)
        return found, self.seen


def query(store: Store, digest: str, size: int) -> int:
    return store.uploads.received(BOB, digest, size)


def resume(store: Store, digest: str, size: int) -> object:
    return store.uploads.begin(BOB, size, digest, offset=size, is_resumable=True)


@pytest.mark.parametrize("call", [query, resume])
@pytest.mark.parametrize("theirs", [STORED, PART], ids=["stored", "part"])
def test_digest_of_another_tenant_takes_the_steps_of_an_unknown_one(
    store: Store, call: Any, theirs: StoredFile
) -> None:
    """Compares executed lines instead of times: both answers come from the same lines of code."""
    answer, steps = Lines().of(call, store, theirs.blake3, theirs.size)
    expected, expected_steps = Lines().of(call, store, UNKNOWN, theirs.size)
    assert answer == expected
    assert len(steps) > 5
    assert steps == expected_steps
    assert store.uploads.received(ALICE, theirs.blake3, theirs.size) > 0


def test_name_of_another_tenant_takes_the_steps_of_an_unknown_one(store: Store) -> None:
    (theirs,) = store.page(ALICE, "", 10)
    found = []
    for name in (theirs.name, f"checkpoints/{'0' * 32}"):
        lines = Lines()
        with pytest.raises(Exception, match="does not exist"):
            lines.of(store.get, BOB, name)
        found.append(lines.seen)
    assert found[0] == found[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    with kept(tmp_path_factory.mktemp("queries")) as running:
        yield running


def test_a_query_has_a_limit_of_entries(server: Kept) -> None:
    request = pb.QueryUploadRequest(files=[file_message(b"x")] * 100_001)
    stub = CheckpointsStub(server.channel)
    found = failure(stub.QueryUpload, request, timeout=TIMEOUT)
    check_invalid(found, "INVALID_REQUEST", "files", ["100001", "100000"])


def test_an_upload_has_a_limit_of_files(server: Kept) -> None:
    file = pb.UploadFile(file=file_message(b"x"))
    request = pb.UploadRequest(header=pb.UploadHeader(files=[file] * 10_001))
    stub = CheckpointsStub(server.channel)
    found = failure(stub.Upload, iter([request]), timeout=TIMEOUT)
    check_invalid(found, "INVALID_REQUEST", "header.files", ["10001", "10000"])


def test_query_ends_when_it_is_cancelled(server: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    held, check, looked, count = Uploads.received, RequestContext.check, threading.Event(), 0
    contexts: list[RequestContext] = []

    def noting(context: RequestContext) -> None:
        if context.method.name == "QueryUpload":
            contexts.append(context)
        check(context)

    def slow(uploads: Uploads, owner: str, digest: str, size: int) -> int:
        """Waits until the server knows that the call was cancelled."""
        nonlocal count
        count += 1
        looked.set()
        with suppress(Cancelled):
            while True:
                check(contexts[-1])
                threading.Event().wait(0.01)
        return held(uploads, owner, digest, size)

    monkeypatch.setattr(RequestContext, "check", noting)
    monkeypatch.setattr(Uploads, "received", slow)
    request = pb.QueryUploadRequest(files=[file_message(b"x")] * 1000)
    call = CheckpointsStub(server.channel).QueryUpload.future(request, timeout=TIMEOUT)
    assert looked.wait(TIMEOUT)
    call.cancel()
    ended = {"grpc_method": "QueryUpload", "grpc_code": "Canceled"}
    eventually(lambda: series(server.server, "grpc_server_handled_total", **ended), 1.0)
    assert count == 1
