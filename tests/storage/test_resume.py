"""Broken uploads resume."""

import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

import secateur
from secateur_proto.checkpoints_pb2 import UploadRequest
from secateur_proto.checkpoints_pb2_grpc import CheckpointsStub
from tests.client.both import both
from tests.conftest import RunningServer, eventually, inner_server, start_server
from tests.contract.raw import (
    Failure,
    check_failed,
    check_invalid,
    failure,
    kept_open,
    series,
)
from tests.reference import assert_same_tensors
from tests.storage.proxy import proxy
from tests.storage.stored import (
    Kept,
    check_tidy,
    committed,
    digest_of,
    downloaded,
    file_message,
    file_of,
    kept,
    leave_unfinished,
    model,
    on_disk,
    received,
    send_upload,
    upload_file,
    upload_requests,
)

MIB = 1 << 20
BIG = model(6 * MIB)  # 24 MiB
SMALL = model(1 * MIB)  # 4 MiB
# Bytes in transit when a connection is cut are sent again: 4 MiB in gRPC's buffers, and some in the
# system's. A restart each time would cost 60 MiB.
LOST = 10 * MIB


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    with kept(tmp_path_factory.mktemp("resume"), of_its_own=True) as running:
        yield running


@pytest.fixture(autouse=True)
def _store_is_empty_without_checkpoints(request: pytest.FixtureRequest) -> Iterator[None]:
    """When a test has deleted its checkpoints, the disk is empty."""
    yield
    if "store" not in request.fixturenames:
        return
    store: Kept = request.getfixturevalue("store")
    for checkpoint in store.client.checkpoints():
        store.client.delete(checkpoint)
    eventually(lambda: on_disk(store.folder), {})


def part_bytes(folder: Path) -> int:
    return sum(size for name, size in on_disk(folder).items() if name.startswith("parts/"))


@both
def test_connection_that_breaks_repeatedly_resends_little(
    store: Kept, tmp_path: Path, kind: type[secateur.Client]
) -> None:
    tensors = model(16 * MIB)  # 64 MiB
    size = len(file_of(tensors))
    shown: list[tuple[int, int]] = []
    with (
        proxy(store.server.address, 30 * MIB, 20 * MIB, 10 * MIB) as broken,
        kind(broken.address, timeout=300) as client,
    ):
        before = received(store.server)
        uploaded = client.upload(tensors, lambda done, total: shown.append((done, total)))
        assert broken.connections == 4
        assert size <= broken.carried < size + 3 * LOST
    assert received(store.server) - before < size + 3 * LOST
    assert series(store.server, "secateur_uploads_resumed_total") >= 3
    assert series(store.server, "secateur_uploads_broken_total") >= 3
    assert_same_tensors(downloaded(store.client, uploaded, tmp_path), tensors)
    assert shown[-1] == (size, size)  # progress does not count bytes twice
    assert shown == sorted(shown)


def test_upload_survives_a_restart_of_the_server(tmp_path: Path) -> None:
    """The server loses the received bytes, so the upload starts again, and succeeds."""
    folder = tmp_path / "store"
    for end in (signal.SIGKILL, signal.SIGTERM):
        restarted_half_way(folder, tmp_path, end)


def restarted_half_way(folder: Path, tmp_path: Path, end: signal.Signals) -> None:
    first = start_server("--store-dir", str(folder), "--drain-timeout", "0.1")
    with proxy(first.address) as network, secateur.Client(network.address, timeout=300) as client:
        done: list[secateur.Checkpoint] = []
        half, again = threading.Event(), threading.Event()

        def wait(sent: int, total: int) -> None:
            if sent > total // 2 and not half.is_set():
                half.set()
                again.wait(300)

        sending = threading.Thread(target=lambda: done.append(client.upload(BIG, wait)))
        sending.start()
        assert half.wait(300)
        first.process.send_signal(end)
        first.process.wait()
        shutil.rmtree(first.log.parent)
        with inner_server("--store-dir", str(folder)) as second:
            network.target = second.address
            again.set()
            sending.join(300)
            (uploaded,) = done
            assert_same_tensors(downloaded(client, uploaded, tmp_path), BIG)
            check_tidy(folder, 1, [uploaded.files[0].blake3])
            client.delete(uploaded)


def test_concurrent_uploads_of_one_model_all_succeed(store: Kept, tmp_path: Path) -> None:
    """Calls of one owner take over the upload from each other."""
    done: list[secateur.Checkpoint] = []
    errors: list[Exception] = []

    def send() -> None:
        with secateur.Client(store.server.address, timeout=300) as client:
            try:
                done.append(client.upload(BIG))
            except Exception as error:
                errors.append(error)

    senders = [threading.Thread(target=send) for _ in range(4)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    assert errors == []
    assert len({checkpoint.name for checkpoint in done}) == len(senders)
    check_tidy(store.folder, len(senders), [digest_of(file_of(BIG))])
    for checkpoint in done:
        assert_same_tensors(downloaded(store.client, checkpoint, tmp_path), BIG)


def test_short_deadline_is_reported_and_a_later_upload_resumes(store: Kept, tmp_path: Path) -> None:
    size, is_half = len(file_of(BIG)), False

    def slow(done: int, total: int) -> None:
        nonlocal is_half
        if done > total // 2:
            is_half = True
            threading.Event().wait(2)

    with secateur.Client(store.server.address, timeout=1) as hurried:
        while not is_half:  # a busy machine needs several attempts
            with pytest.raises(secateur.DeadlineExceeded):
                hurried.upload(BIG, slow)
    before = received(store.server)
    assert_same_tensors(downloaded(store.client, store.client.upload(BIG), tmp_path), BIG)
    assert received(store.server) - before < size // 2 + LOST


def test_missing_server_does_not_count_as_a_broken_upload() -> None:
    with (
        secateur.Client("127.0.0.1:1", timeout=300) as client,
        pytest.raises(secateur.Unavailable),
    ):
        client.upload(SMALL)


def resumed(store: Kept, data: bytes, offset: int, sent: bytes, name: str = "") -> Failure | None:
    requests = upload_requests([upload_file(file_message(data), offset)], sent)
    return failure(send_upload, store.channel, requests, name)


def test_bytes_of_a_broken_upload_are_not_sent_again(store: Kept, tmp_path: Path) -> None:
    data, half = file_of(SMALL), 2 * MIB + 123
    leave_unfinished(store, data, half)
    assert resumed(store, data, half, data[half:]) is None
    (checkpoint,) = store.client.checkpoints()
    assert_same_tensors(downloaded(store.client, checkpoint, tmp_path), SMALL)


def test_broken_uploads_keep_no_file_open(store: Kept, tmp_path: Path) -> None:
    """File descriptors are limited: many broken uploads would take them from other calls."""
    data, half = file_of(SMALL), 2 * MIB + 123
    open_files = Path(f"/proc/{store.server.process.pid}/fd")
    before = len(list(open_files.iterdir()))
    for index in range(20):
        leave_unfinished(store, file_of(model(1000, index)), 100)
    leave_unfinished(store, data, half)
    eventually(lambda: len(list(open_files.iterdir())) < before + 10, True)
    for index in range(20):
        other = file_of(model(1000, index))
        assert resumed(store, other, 100, other[100:]) is None
    assert resumed(store, data, half, data[half:]) is None
    newest = next(store.client.checkpoints())
    assert_same_tensors(downloaded(store.client, newest, tmp_path), SMALL)


def test_upload_of_more_than_the_missing_bytes_succeeds(store: Kept, tmp_path: Path) -> None:
    """More bytes may have arrived after the answer of QueryUpload."""
    data, half = file_of(SMALL), 2 * MIB + 123
    leave_unfinished(store, data, half)
    assert resumed(store, data, half - 77_777, data[half - 77_777 :]) is None
    (checkpoint,) = store.client.checkpoints()
    assert_same_tensors(downloaded(store.client, checkpoint, tmp_path), SMALL)


def test_offset_after_the_received_bytes_is_refused_and_harmless(store: Kept) -> None:
    data, half = file_of(SMALL), 2 * MIB
    requests = upload_requests([upload_file(file_message(data))], data[:half])
    with kept_open(requests) as messages:
        call = CheckpointsStub(store.channel).Upload.future(messages)
        eventually(lambda: committed(store.channel, file_message(data)), half)
        found = resumed(store, data, half + 1, data[half + 1 :])
        check_invalid(found, "INVALID_REQUEST", "header.files[0].offset", [str(half)])
        assert not call.done()
    assert resumed(store, data, half, data[half:]) is None


def test_wrong_digest_is_refused_and_nothing_is_kept(store: Kept) -> None:
    data = file_of(SMALL)
    announced = file_message(data, blake3="0" * 64)
    found = failure(send_upload, store.channel, upload_requests([upload_file(announced)], data))
    check_invalid(found, "INVALID_STATE_DICT", "data", [digest_of(data), "0" * 64])
    assert committed(store.channel, announced) == 0
    assert on_disk(store.folder) == {}


def test_wrong_bytes_are_detected_in_a_resumed_upload(
    store: Kept,
) -> None:
    data, half = file_of(SMALL), 2 * MIB
    leave_unfinished(store, data, half)
    other = data[half:-1] + bytes([data[-1] ^ 1])
    found = resumed(store, data, half, other)
    check_invalid(found, "INVALID_STATE_DICT", "data", [digest_of(data)])
    assert on_disk(store.folder) == {}


def test_broken_upload_without_a_digest_is_not_kept(store: Kept) -> None:
    data = file_of(SMALL)
    announced = file_message(data, blake3="")
    with kept_open(upload_requests([upload_file(announced)], data[: 2 * MIB])) as messages:
        call = CheckpointsStub(store.channel).Upload.future(messages)
        eventually(lambda: part_bytes(store.folder), 2 * MIB)
        call.cancel()
    eventually(lambda: on_disk(store.folder), {})


def test_call_that_ends_too_early_fails_and_can_be_resumed(store: Kept) -> None:
    data = file_of(SMALL)
    found = resumed(store, data, 0, data[: 3 * MIB])
    check_invalid(found, "INVALID_STATE_DICT", "data", [str(len(data)), str(3 * MIB)])
    assert committed(store.channel, file_message(data)) == 3 * MIB
    assert resumed(store, data, 3 * MIB, data[3 * MIB :]) is None


def test_call_with_too_many_bytes_is_refused(store: Kept) -> None:
    data = file_of(SMALL)
    found = resumed(store, data, 0, data + b"!")
    check_invalid(found, "INVALID_STATE_DICT", "data", [str(len(data))])
    assert list(store.client.checkpoints()) == []
    assert resumed(store, data, 0, data) is None


def test_newer_call_takes_over_an_upload(store: Kept) -> None:
    data, half = file_of(SMALL), 2 * MIB
    first = upload_requests([upload_file(file_message(data))], data[:half])
    ending = threading.Event()

    def slowly() -> Iterator[UploadRequest]:
        yield from first
        ending.wait(300)
        yield UploadRequest(data=data[half:])

    call = CheckpointsStub(store.channel).Upload.future(slowly())
    eventually(lambda: committed(store.channel, file_message(data)), half)
    requests = upload_requests([upload_file(file_message(data), half)], data[half:-5])
    with kept_open(requests) as messages:
        newer = CheckpointsStub(store.channel).Upload.future(messages)
        eventually(lambda: committed(store.channel, file_message(data)), len(data) - 5)
        ending.set()
        found = failure(call.result, timeout=300)
        check_failed(found, grpc.StatusCode.ABORTED, "UPLOAD_TAKEN_OVER")
        newer.cancel()
    assert resumed(store, data, len(data) - 5, data[-5:]) is None


def test_upload_of_another_caller_is_invisible(store: Kept) -> None:
    data, half = file_of(SMALL), 2 * MIB
    leave_unfinished(store, data, half, "alice")
    assert committed(store.channel, file_message(data), "bob") == 0
    found = resumed(store, data, half, data[half:], "bob")
    check_invalid(found, "INVALID_REQUEST", "header.files[0].offset", ["0"])
    assert resumed(store, data, 0, data, "bob") is None
    assert committed(store.channel, file_message(data), "alice") == half
    assert resumed(store, data, half, data[half:], "alice") is None
    for name in ("alice", "bob"):
        with secateur.Client(store.server.address, token=name) as client:
            (checkpoint,) = client.checkpoints()
            client.delete(checkpoint)


def test_stored_model_is_not_sent_again(store: Kept, tmp_path: Path) -> None:
    store.client.upload(BIG)
    before = received(store.server)
    again = store.client.upload(BIG)
    assert received(store.server) == before
    assert_same_tensors(downloaded(store.client, again, tmp_path), BIG)


def resumed_uploads(server: RunningServer) -> float:
    return series(server, "secateur_uploads_resumed_total")


def test_resumed_upload_is_counted(store: Kept) -> None:
    data, half = file_of(SMALL), 2 * MIB
    before = resumed_uploads(store.server)
    leave_unfinished(store, data, half)
    assert resumed(store, data, half, data[half:]) is None
    assert resumed(store, data, len(data), b"") is None  # without bytes it does not count
    assert resumed_uploads(store.server) == before + 1
