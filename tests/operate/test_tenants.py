"""Tenants: their checkpoints, quotas and URIs."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safetensors.numpy import save, save_file

import secateur
from secateur.errors import QuotaExceeded, from_rpc
from secateur_proto import checkpoints_pb2 as pb
from secateur_proto.checkpoints_pb2_grpc import CheckpointsStub
from secateur_proto.pruner_pb2 import ReportHeader, ReportRequest
from secateur_proto.pruner_pb2_grpc import PrunerStub
from secateur_server.errors import UriNotAllowed
from secateur_server.uris.requests import Requests
from secateur_server.uris.scratch import Scratch
from secateur_server.uris.uris import Uris
from tests.conftest import RunningServer, eventually, inner_server
from tests.contract.raw import OWN_CONNECTION, TIMEOUT, bearer, failure, open_streams, series
from tests.storage.stored import (
    file_message,
    upload_file,
    upload_requests,
)

KIB = 1 << 10
HALF = secateur.l1_unstructured("*", 0.5)

# Quotas in bytes. A model is slightly larger than its floats; the folder of its owner is a block.
STORE, MEMORY = 68 * KIB, 64 * KIB

TOKENS = {
    name: f"the token of {name}"
    for name in ("vision", "speech", "small", "small2", "light", "single", "wide", "astray")
}
FILE = """
[tenants.vision]
tokens = ["{vision}"]
allow = ["file://{root}/vision"]
[tenants.speech]
tokens = ["{speech}"]
[tenants.small]
tokens = ["{small}", "{small2}"]
store = "68KiB"
[tenants.light]
tokens = ["{light}"]
memory = "64KiB"
[tenants.single]
tokens = ["{single}"]
requests = 1
[tenants.wide]
tokens = ["{wide}"]
allow = ["file:///"]
[tenants.astray]
tokens = ["{astray}"]
allow = ["file://{root}/out", "file://{root}2", "file://{outside}", "s3://bucket/x"]
"""


@dataclass(frozen=True)
class Service:
    """A server with tenants.

    Attributes:
        server: The server.
        channel: A channel to it.
        root: The folder that it may open.
        tokens: The tokens file.
    """

    server: RunningServer
    channel: grpc.Channel
    root: Path
    tokens: Path

    def client(self, name: str) -> secateur.Client:
        return secateur.Client(self.server.address, token=TOKENS[name], timeout=300)

    def evicted(self) -> float:
        return series(self.server, "secateur_evictions_total")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    root, outside, tokens = folder / "models", folder / "outside", folder / "tokens.toml"
    for path in (root / "vision", root / "vision2", root / "speech", folder / "models2", outside):
        path.mkdir(parents=True)
        save_file(model(1), path / "m.safetensors")
    (root / "vision" / "link.safetensors").symlink_to(root / "speech" / "m.safetensors")
    (root / "vision" / "folder").symlink_to(root / "speech")
    (root / "out").symlink_to(outside)
    tokens.write_text(FILE.format(**TOKENS, root=root, outside=outside))
    with (
        inner_server("--tokens-file", str(tokens), "--allow-path", str(root)) as running,
        grpc.insecure_channel(running.address) as channel,
    ):
        yield Service(running, channel, root, tokens)


def model(seed: int, size: int = KIB) -> dict[str, Any]:
    """Makes a model of about `size` bytes."""
    return {"w": np.random.default_rng(seed).standard_normal(size // 4, np.float32)}


def metadata(name: str) -> tuple[tuple[str, str], ...]:
    return bearer(TOKENS[name])


@contextmanager
def emptied(service: Service, *names: str) -> Iterator[list[secateur.Client]]:
    """Yields clients of tenants, and deletes their checkpoints after the block."""
    with ExitStack() as opened:
        clients = [opened.enter_context(service.client(name)) for name in names]
        yield clients
        for client in clients:
            for checkpoint in list(client.checkpoints()):
                client.delete(checkpoint)


# Owners of checkpoints ------------------------------------------------------------------------


def test_checkpoints_of_a_tenant_are_invisible_to_others(service: Service, tmp_path: Path) -> None:
    with emptied(service, "speech", "small") as (owner, other):
        kept = owner.upload(model(1))
        for use in (
            lambda: other.checkpoint(kept.name),
            lambda: other.delete(kept),
            lambda: other.download(kept, tmp_path / "out"),
            lambda: other.prune(kept, HALF),
            lambda: other.prune(kept, HALF, keep=True),
            lambda: other.report(kept),
            lambda: other.finalize(kept),
        ):
            with pytest.raises(secateur.CheckpointNotFound) as refused:
                use()
            assert "size" not in str(refused.value)
        assert list(tmp_path.iterdir()) == []
        assert list(other.checkpoints()) == []
        request = pb.DeleteRequest(name=kept.name, allow_missing=True)
        stub = CheckpointsStub(service.channel)
        stub.Delete(request, metadata=metadata("small"), timeout=TIMEOUT)
        newest = owner.upload(model(2))
        page = pb.ListRequest(page_token=newest.name.removeprefix("checkpoints/"))
        found = stub.List(page, metadata=metadata("small"), timeout=TIMEOUT)
        assert not found.checkpoints
        assert list(owner.checkpoints()) == [newest, kept]
        assert owner.report(kept).total == 256


def test_known_digest_of_another_tenants_file_must_be_sent(service: Service) -> None:
    data = save(model(1), {"format": "pt"})  # as the client sends tensors
    message = file_message(data)
    with emptied(service, "speech", "small") as (owner, other):
        owner.upload(model(1))
        for name, size in (("speech", len(data)), ("small", 0), ("vision", 0)):
            query = pb.QueryUploadRequest(files=[message])
            stub = CheckpointsStub(service.channel)
            answer = stub.QueryUpload(query, metadata=metadata(name), timeout=TIMEOUT)
            assert list(answer.committed_sizes) == [size], name
        requests = upload_requests([upload_file(message, len(data))])
        found = failure(
            CheckpointsStub(service.channel).Upload,
            requests,
            metadata=metadata("small"),
            timeout=TIMEOUT,
        )
        assert found is not None
        assert found.reason == "INVALID_REQUEST", found
        assert list(other.checkpoints()) == []


def test_another_token_of_a_tenant_has_the_same_checkpoints(service: Service) -> None:
    """So has a token that replaces the one with which they were created."""
    with emptied(service, "small") as (first,), service.client("small2") as second:
        kept = first.upload(model(1))
        assert list(second.checkpoints()) == [kept]
        before = service.tokens.read_text()
        new = "the token that comes after it"
        service.tokens.write_text(before.replace(TOKENS["small"], new))
        try:
            with secateur.Client(service.server.address, token=new, timeout=300) as third:
                eventually(lambda: is_authenticated(third), True)
                assert list(third.checkpoints()) == [kept]
                assert third.report(kept).total == 256
                assert not is_authenticated(first)
        finally:
            service.tokens.write_text(before)
        eventually(lambda: is_authenticated(first), True)


def is_authenticated(client: secateur.Client) -> bool:
    try:
        list(client.checkpoints())
    except secateur.Unauthenticated:
        return False
    return True


# Quotas ---------------------------------------------------------------------------------------


def sizes(client: secateur.Client) -> int:
    """Returns the bytes of a tenant's checkpoints, where each file counts once."""
    found = {file.blake3: file.size_bytes for c in client.checkpoints() for file in c.files}
    return sum(found.values())


def test_least_recently_used_checkpoint_of_a_tenant_is_evicted_for_its_quota(
    service: Service,
) -> None:
    with emptied(service, "speech", "small") as (other, small):
        older = other.upload(model(0, 20 * KIB))
        first = small.upload(model(1, 20 * KIB))
        small.upload(model(2, 20 * KIB))
        small.report(first)  # now the second one is the least recently used
        before = service.evicted()
        third = small.upload(model(3, 20 * KIB))
        assert list(small.checkpoints()) == [third, first]
        assert service.evicted() == before + 1
        assert series(service.server, "secateur_evictions_total", reason="room") == 0
        result = small.prune(third, HALF, keep=True)  # masks, and no second copy of the weights
        assert result.checkpoint is not None
        assert {c.name for c in small.checkpoints()} >= {third.name, result.checkpoint.name}
        assert list(other.checkpoints()) == [older]


def test_upload_above_a_quota_is_refused_and_evicts_nothing(service: Service) -> None:
    with emptied(service, "speech", "small") as (other, small):
        kept = small.upload(model(1, 20 * KIB))
        with pytest.raises(QuotaExceeded, match=f"quota of {STORE}; delete checkpoints"):
            small.upload(model(2, STORE))
        with pytest.raises(QuotaExceeded):
            small.prune(model(3, STORE), HALF, keep=True)
        assert list(small.checkpoints()) == [kept]
        assert other.upload(model(2, 2 * STORE)).size_bytes > 2 * STORE  # a quota is one tenant's
        assert small.prune(model(3, STORE), HALF).report.total == STORE // 4


def test_concurrent_uploads_keep_within_a_quota(service: Service) -> None:
    def upload(seed: int) -> bool:
        try:
            small.upload(model(seed, 20 * KIB))
        except QuotaExceeded:
            return False
        return True

    with emptied(service, "small") as (small,):
        with ThreadPoolExecutor(8) as threads:
            succeeded = list(threads.map(upload, range(16)))
        assert any(succeeded)
        assert 0 < sizes(small) <= STORE


def test_shards_together_keep_within_a_quota(service: Service) -> None:
    shards = [save({f"w{i}": model(i, 20 * KIB)["w"]}) for i in range(6)]
    index = index_of(shards)
    data = [*shards, index]
    names = [*(f"{i}.safetensors" for i in range(6)), "m.safetensors.index.json"]
    files = [upload_file(file_message(d, n)) for d, n in zip(data, names, strict=True)]
    with emptied(service, "small") as (small,):
        stub, requests = CheckpointsStub(service.channel), upload_requests(files, b"".join(data))
        found = failure(stub.Upload, requests, metadata=metadata("small"), timeout=TIMEOUT)
        assert sizes(small) <= STORE
        assert found is not None
        assert found.reason == "QUOTA_EXCEEDED"


def index_of(shards: list[bytes]) -> bytes:
    weight_map = {f"w{i}": f"{i}.safetensors" for i in range(len(shards))}
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


def test_broken_upload_does_not_block_a_quota(service: Service) -> None:
    """Its bytes are kept for an hour, unless other data needs the space."""
    data = save(model(7, 50 * KIB))
    message = file_message(data)

    def broken() -> Iterator[pb.UploadRequest]:
        yield from upload_requests([upload_file(message)], data[: 30 * KIB])
        sent.set()
        never.wait(300)

    sent, never = threading.Event(), threading.Event()
    with emptied(service, "small") as (small,):
        stub = CheckpointsStub(service.channel)
        call = stub.Upload.future(broken(), metadata=metadata("small"))
        query = pb.QueryUploadRequest(files=[message])
        sent.wait(300)
        eventually(lambda: committed_bytes(stub, query), 30 * KIB)
        call.cancel()
        never.set()
        eventually(lambda: has_been_cancelled(small), True)
        assert committed_bytes(stub, query) == 0
    eventually(lambda: series(service.server, "secateur_requests_in_flight"), 0.0)


def committed_bytes(stub: CheckpointsStub, query: pb.QueryUploadRequest) -> int:
    answer = stub.QueryUpload(query, metadata=metadata("small"), timeout=TIMEOUT)
    return answer.committed_sizes[0]


def has_been_cancelled(client: secateur.Client) -> bool:
    """Whether the server has seen the cancellation, so that it accepts another model."""
    try:
        client.upload(model(8, 30 * KIB))
    except QuotaExceeded:
        return False
    return True


@contextmanager
def report_in_service(service: Service, name: str, data: bytes) -> Iterator[Any]:
    """Runs a Report whose last byte is sent when the block ends."""
    rest = threading.Event()

    def messages() -> Iterator[ReportRequest]:
        yield ReportRequest(header=ReportHeader(data_bytes=len(data)), data=data[:-1])
        rest.wait(300)
        yield ReportRequest(data=data[-1:])

    stub, before = (
        PrunerStub(service.channel),
        series(service.server, "secateur_requests_in_flight"),
    )
    call = stub.Report.future(messages(), metadata=metadata(name), timeout=300)
    eventually(lambda: series(service.server, "secateur_requests_in_flight"), before + 1)
    try:
        yield call
    finally:
        rest.set()
        call.result(timeout=300)


@pytest.mark.parametrize(("name", "size"), [("light", 40 * KIB), ("single", KIB)])
def test_quota_in_service_blocks_its_own_tenant_only(
    service: Service, name: str, size: int
) -> None:
    data = save(model(1, size))
    with (
        service.client(name) as mine,
        service.client("speech") as others,
        ThreadPoolExecutor(1) as thread,
    ):
        with report_in_service(service, name, data):
            eventually(lambda: series(service.server, "secateur_model_bytes"), float(len(data)))
            second = thread.submit(mine.report, model(2, size))
            eventually(lambda: series(service.server, "secateur_requests_waiting"), 1.0)
            for seed in range(3):
                assert others.report(model(seed, 2 * MEMORY)).total == 2 * MEMORY // 4
            assert not second.done()
            if name == "light":  # the others were served beside the first call
                assert series(service.server, "secateur_model_bytes") == len(data)
        assert second.result(300).total == size // 4
    eventually(lambda: series(service.server, "secateur_model_bytes"), 0.0)


def test_a_model_above_a_tenants_memory_is_refused_at_once(service: Service) -> None:
    with service.client("light") as light:
        with pytest.raises(QuotaExceeded, match=f"{MEMORY} of tenant 'light'.* raise `memory`"):
            light.report(model(1, MEMORY))
        assert light.report(model(1, MEMORY // 2)).total == MEMORY // 8


# URIs -----------------------------------------------------------------------------------------

REFUSED = (
    "file://{root}/speech/m.safetensors",
    "file://{root}/vision2/m.safetensors",
    "file://{root}/visio/m.safetensors",
    "file://{root}/m.safetensors",
    "file://{root}/vision/../speech/m.safetensors",
    "file://{root}/vision/%2e%2e/speech/m.safetensors",
    "file://{root}/vision/..%2fspeech/m.safetensors",
    "file://{root}/vision/./../vision2/m.safetensors",
    "file://{root}/vision/link.safetensors",
    "file://{root}/vision/folder/m.safetensors",
    "file://{root}/vision/folder/missing.safetensors",
    "file://{root}2/m.safetensors",
    "file://{root}/out/m.safetensors",
    "file:///etc/passwd",
    "file://{root}/vision/m.safetensors?/../../speech",
    "s3://bucket/x/m.safetensors",
    "http://127.0.0.1:1/m.safetensors",
    "FILE://{root}/vision/m.safetensors",
)


def denied(client: secateur.Client, uri: str) -> None:
    with pytest.raises(secateur.PermissionDenied):
        client.report(uri)
    with pytest.raises(secateur.PermissionDenied):
        client.upload(uri)
    with pytest.raises(secateur.PermissionDenied):
        client.prune(model(1), HALF, output="dense", destination=uri)


@pytest.mark.parametrize("uri", REFUSED)
def test_tenant_opens_only_uris_of_its_allow(service: Service, uri: str) -> None:
    # A write to a link replaces the link itself, inside the folder.
    with service.client("vision") as vision:
        if "link" in uri:
            with pytest.raises(secateur.PermissionDenied):
                vision.report(uri.format(root=service.root))
        else:
            denied(vision, uri.format(root=service.root))
        assert vision.report(f"file://{service.root}/vision/m.safetensors").total == 256


def test_allow_narrows_what_the_server_allows_and_never_widens_it(service: Service) -> None:
    places = [f"file://{service.root}/{name}/m.safetensors" for name in ("vision", "speech")]
    outside = service.root.parent / "outside"
    with service.client("speech") as every, service.client("wide") as wide:
        for uri in places:
            assert every.report(uri).total == wide.report(uri).total == 256
        denied(wide, f"file://{outside}/m.safetensors")
        denied(wide, "file:///etc/passwd")
    with service.client("astray") as astray:
        for uri in (
            *places,
            f"file://{service.root}/out/m.safetensors",
            f"file://{outside}/m.safetensors",
            f"file://{service.root}2/m.safetensors",
            "s3://bucket/x/m.safetensors",
        ):
            denied(astray, uri)


@pytest.mark.parametrize(
    ("allow", "allowed"),
    [
        (["s3://bucket/models"], {"s3://bucket/models/a"}),
        (["s3://bucket/models/"], {"s3://bucket/models/a"}),
        (["s3://bucket"], {"s3://bucket/models/a", "s3://bucket/more/a"}),
        (["s3://bucket/mod"], set()),
        (["s3://buck"], set()),
        (["s3://bucket2"], set()),
        (["s3://bucket/models2"], set()),
        (["s3://bucket/models/../more"], set()),
        (["gs://bucket/models"], set()),
        ([""], set()),
        ([], set()),
    ],
)
def test_remote_uris_must_be_in_both_lists(allow: list[str], allowed: set[str]) -> None:
    scratch = Scratch(Path("/nowhere"), 0, lambda count: None)
    uris = Uris((), ("s3://bucket/models", "s3://bucket/more/"), scratch, Requests(1)).among(allow)
    found = set()
    for uri in ("s3://bucket/models/a", "s3://bucket/models2/a", "s3://bucket/more/a", "s3://b/a"):
        with suppress(UriNotAllowed):
            uris.check("header.uri", uri)
            found.add(uri)
    assert found == allowed


def test_silent_calls_of_a_tenant_block_neither_others_nor_probes(service: Service) -> None:
    """One tenant gets half of the 128 calls at most; a refusal has a retry delay."""
    channels = [grpc.insecure_channel(service.server.address, [OWN_CONNECTION]) for _ in range(2)]
    with ExitStack() as opened:
        stubs = [PrunerStub(opened.enter_context(channel)) for channel in channels]
        silent = opened.enter_context(open_streams())
        calls = [
            stubs[number % 2].Report.future(silent(), metadata=metadata("speech"), timeout=300)
            for number in range(70)
        ]
        eventually(lambda: sum(call.done() for call in calls), 70 - 64)
        for call in calls:
            if call.done():
                error = call.exception()
                assert isinstance(error, grpc.RpcError)
                busy = from_rpc(error)
                assert isinstance(busy, secateur.ServerBusy)
                assert busy.retry_after == 1.0
        with service.client("vision") as other:
            assert other.prune(model(1), HALF).report.total == KIB // 4
        probe = health_pb2_grpc.HealthStub(service.channel)
        answer = probe.Check(health_pb2.HealthCheckRequest(), timeout=300)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
