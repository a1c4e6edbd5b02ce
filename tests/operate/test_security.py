"""Authentication, and configurations with which a server refuses to start."""

import hashlib
import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc.error_details_pb2 import ErrorInfo, RequestInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from grpc_status import rpc_status

import secateur
from secateur_proto.codec import SINGLE
from secateur_server.app import App
from secateur_server.check import check
from secateur_server.config import is_public, read_config
from secateur_server.operate.tokens_file import BadTokens, read_tokens
from secateur_server.startup import CannotStart
from tests.conftest import RunningServer, eventually, run_server, start_server, stop_server
from tests.contract.raw import OWN_CONNECTION, TIMEOUT, bearer, failure, open_streams

TOKEN, HASHED = "the first token of ours", "the second token, which is hashed"
SCRAPER = "the scraper's own token"
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
MODEL = {"w": np.arange(4, dtype=np.float32)}

Metadata = tuple[tuple[str, str | bytes], ...]


def table(name: str, *tokens: str) -> str:
    return f"[tenants.{name}]\ntokens = {json.dumps(tokens)}\n"


def hashed(token: str) -> str:
    return f"sha256:{hashlib.sha256(token.encode()).hexdigest()}"


@dataclass(frozen=True)
class Guarded:
    """A server that needs tokens, and a channel to it."""

    server: RunningServer
    channel: grpc.Channel
    tokens: Path
    first: str
    scraper: Path

    def client(self, token: str | None) -> secateur.Client:
        return secateur.Client(self.server.address, token=token, timeout=300)

    def knows(self, token: str) -> bool:
        request = health_pb2.HealthCheckRequest()
        watch = health_pb2_grpc.HealthStub(self.channel).Watch
        call = watch(request, metadata=bearer(token), timeout=TIMEOUT)
        found = failure(next, call)
        call.cancel()
        assert found is None or found.code == UNAUTHENTICATED, found
        return found is None

    def reloads(self, result: str) -> float:
        return sample(self, "secateur_reloads_total", file="tokens", result=result)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    tokens, scraper = folder / "tokens.toml", folder / "scraper"
    first = table("ours", TOKEN, hashed(HASHED))
    tokens.write_text(first)
    scraper.write_text(f"{SCRAPER}\n")
    options = ["--tokens-file", str(tokens), "--metrics-token-file", str(scraper)]
    running = start_server(*options)
    with grpc.insecure_channel(running.address) as channel:
        yield Guarded(running, channel, tokens, first, scraper)
    logged = stop_server(running)
    assert "Traceback" not in logged, logged
    assert "Bearer" not in logged
    for token in (TOKEN, HASHED, SCRAPER, *_SENT):
        assert token not in logged, token
    assert hashed(HASHED).removeprefix("sha256:") not in logged


# Tokens that were sent, or were in a file. No line of the log may have them.
_SENT: list[str] = ["a wrong token of mine"]


# Every call -----------------------------------------------------------------------------------

_KINDS = {
    (False, False): "unary_unary",
    (True, False): "stream_unary",
    (False, True): "unary_stream",
    (True, True): "stream_stream",
}


def methods(channel: grpc.Channel) -> dict[str, str]:
    """Returns each method of each service and its kind, by reflection with a token."""
    with_token = grpc.intercept_channel(channel, _WithToken())
    database = ProtoReflectionDescriptorDatabase(with_token)
    found = {}
    for service in database.get_services():
        file = database.FindFileContainingSymbol(service)
        (described,) = (s for s in file.service if f"{file.package}.{s.name}" == service)
        for method in described.method:
            kind = _KINDS[method.client_streaming, method.server_streaming]
            found[f"/{service}/{method.name}"] = kind
    return found


class _WithToken(grpc.StreamStreamClientInterceptor):
    def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
        return continuation(details._replace(metadata=bearer(TOKEN)), requests)


def call(channel: grpc.Channel, path: str, kind: str, metadata: Metadata, data: bytes) -> Any:
    """Calls a method of any kind with bytes, which may raise grpc.RpcError."""
    sends_many, gets_many = kind.startswith("stream"), kind.endswith("stream")
    method = getattr(channel, kind)(path)
    answer = method(iter([data]) if sends_many else data, metadata=metadata, timeout=TIMEOUT)
    return list(answer) if gets_many else answer


def check_unauthenticated(error: Any) -> None:
    """Checks that the status has the reason and the request id, and no other details."""
    assert error.code() == UNAUTHENTICATED, error
    info, request = ErrorInfo(), RequestInfo()
    status = rpc_status.from_call(error)
    assert status is not None
    assert [any(map(detail.Unpack, (info, request))) for detail in status.details] == [True, True]
    assert (info.reason, info.domain) == ("UNAUTHENTICATED", "secateur")
    assert request.request_id == dict(error.trailing_metadata())["x-request-id"]
    assert error.details().startswith("authorization: "), error


def test_every_listed_method_needs_a_token(guarded: Guarded) -> None:
    with guarded.client(TOKEN) as client:
        kept = client.upload(MODEL)
    found = methods(guarded.channel)
    services = {path.split("/")[1] for path in found}
    assert {"secateur.v1.Pruner", "secateur.v1.Checkpoints", "grpc.health.v1.Health"} < services
    assert "grpc.reflection.v1alpha.ServerReflection" in services
    assert len(found) >= 12
    assert found.pop("/grpc.health.v1.Health/Check") == "unary_unary"
    before = sample(guarded, "secateur_received_bytes_total")
    # An empty message, a name, which Delete would accept, and bytes that are not a message.
    for path, kind in [*found.items(), ("/secateur.v1.Pruner/Prune", "unary_unary")]:
        for metadata in ((), bearer("a wrong token of mine")):
            for data in (b"", b"\n" + bytes([len(kept.name)]) + kept.name.encode(), b"\xff" * 9):
                single = (SINGLE,) if kind == "unary_unary" else ()
                with pytest.raises(grpc.RpcError) as refused:
                    call(guarded.channel, path, kind, (*metadata, *single), data)
                check_unauthenticated(refused.value)
    with guarded.client(TOKEN) as client:
        assert list(client.checkpoints()) == [kept]
        assert client.report(kept).total == 4
        client.delete(kept)
    assert sample(guarded, "secateur_received_bytes_total") == before
    rejected = sample(guarded, "secateur_rejected_requests_total", reason="UNAUTHENTICATED")
    assert rejected >= 2 * 3 * len(found)


def test_reflection_lists_every_method() -> None:
    """No test would cover a service that reflection does not list."""
    config = read_config(["--address", "127.0.0.1:0", "--metrics-address", ""], {})
    with App(config) as app:
        handlers = app._server._state.generic_handlers  # type: ignore[attr-defined]
        served = {
            path
            for handler in handlers
            for name in ("_handlers", "_method_handlers")
            for path in getattr(handler, name, ())
        }
        with grpc.insecure_channel(app.address) as channel:
            assert set(methods(channel)) == served


@pytest.mark.parametrize("metadata", [(), bearer("a wrong token of mine"), bearer(TOKEN)])
@pytest.mark.parametrize(
    "path",
    [
        "/secateur.v1.Pruner/Nothing",
        "/secateur.v1.Nothing/Prune",
        "//secateur.v1.Pruner/Prune",
        "/secateur.v1.Pruner//Prune",
        "/secateur.v1.Pruner/Prune/",
        "/x/secateur.v1.Checkpoints/List",
        "/secateur.v1.Checkpoints/List?x",
        "/secateur.v1.Checkpoints/%4cist",
        "/SECATEUR.V1.CHECKPOINTS/LIST",
        "/grpc.health.v1.Health/Check/../../secateur.v1.Checkpoints/List",
        "/",
    ],
)
def test_unknown_method_is_unimplemented(guarded: Guarded, path: str, metadata: Metadata) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        call(guarded.channel, path, "unary_unary", metadata, b"")
    error: Any = refused.value
    assert error.code() == grpc.StatusCode.UNIMPLEMENTED
    assert error.details() in ("Method not found!", "Bad path")


def test_probe_needs_no_token(guarded: Guarded) -> None:
    stub = health_pb2_grpc.HealthStub(guarded.channel)
    for metadata in ((), bearer("a wrong token of mine")):
        answer = stub.Check(health_pb2.HealthCheckRequest(), metadata=metadata, timeout=TIMEOUT)
        assert answer == health_pb2.HealthCheckResponse(status="SERVING")


def test_silent_callers_without_a_token_occupy_no_worker(guarded: Guarded) -> None:
    """More calls and probes than workers, and their messages never arrive."""
    paths = ["/secateur.v1.Checkpoints/List"] * 10 + ["/grpc.health.v1.Health/Check"] * 150
    address = guarded.server.address
    with ExitStack() as opened:
        channels = [
            opened.enter_context(grpc.insecure_channel(address, [OWN_CONNECTION])) for _ in range(2)
        ]
        silent = opened.enter_context(open_streams())
        calls: list[Any] = [
            channels[index % 2].stream_unary(path).future(silent())
            for index, path in enumerate(paths)
        ]
        eventually(lambda: sum(not call.done() for call in calls), 16)
        assert {call.code() for call in calls[:10]} == {UNAUTHENTICATED}
        stub = health_pb2_grpc.HealthStub(guarded.channel)
        for _ in range(3):
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with guarded.client(TOKEN) as client:
            assert client.report(MODEL).total == 4
        assert sample(guarded, "secateur_requests_in_flight") <= 16
    eventually(lambda: sample(guarded, "secateur_requests_in_flight"), 0.0)


# Valid and invalid tokens ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        f"Bearer {TOKEN}",
        f"bearer {TOKEN}",
        f"BEARER  {TOKEN} ",
        f"Bearer {HASHED}",
    ],
)
def test_token_of_the_file_is_accepted(guarded: Guarded, value: str) -> None:
    assert listed(guarded, (("authorization", value),)) is None


@pytest.mark.parametrize(
    "metadata",
    [
        (("authorization", TOKEN),),
        (("authorization", f"Basic {TOKEN}"),),
        (("authorization", f"Bearer{TOKEN}"),),
        (("authorization", "Bearer"),),
        (("authorization", "Bearer "),),
        (("authorization", "Bearer    "),),
        (("authorization", ""),),
        bearer(TOKEN[:-1]),
        bearer(TOKEN + "x"),
        bearer(TOKEN.upper()),
        bearer(hashed(HASHED)),  # a hash is not a token
        bearer(hashed(HASHED).removeprefix("sha256:")),
        bearer(f"{TOKEN},{HASHED}"),
        bearer(f"Bearer {TOKEN}"),
        (("authorization-bin", f"Bearer {TOKEN}".encode()),),
        (("x-authorization", f"Bearer {TOKEN}"),),
        (("proxy-authorization", f"Bearer {TOKEN}"),),
        (*bearer(TOKEN), *bearer(TOKEN)),  # a proxy may have checked the other one
        (*bearer("a wrong token of mine"), *bearer(TOKEN)),
        (*bearer(TOKEN), *bearer("a wrong token of mine")),
    ],
)
def test_every_other_token_is_refused(guarded: Guarded, metadata: Metadata) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        call(guarded.channel, "/secateur.v1.Checkpoints/List", "unary_unary", metadata, b"")
    check_unauthenticated(refused.value)


def test_error_without_a_token_says_how_to_give_one(guarded: Guarded) -> None:
    with (
        guarded.client(None) as stranger,
        pytest.raises(secateur.Unauthenticated, match=r"--token, SECATEUR_TOKEN, .*token="),
    ):
        list(stranger.checkpoints())


def listed(guarded: Guarded, metadata: Metadata) -> object:
    path = "/secateur.v1.Checkpoints/List"
    return failure(call, guarded.channel, path, "unary_unary", metadata, b"")


def test_invalid_metadata_is_refused_and_harmless(guarded: Guarded) -> None:
    found = [
        listed(guarded, (("authorization", "Bearer " + "x" * size),)) for size in (7_000, 1_000_000)
    ]
    assert [getattr(one, "code", None) for one in found] == [
        UNAUTHENTICATED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    ]
    assert listed(guarded, (*bearer(TOKEN), ("x-request-id", "y" * 7_000))) is None
    assert listed(guarded, (*bearer(TOKEN), ("x-bin", bytes(range(256))))) is None


def test_client_with_a_token_is_served_and_one_without_gets_the_reason(guarded: Guarded) -> None:
    with guarded.client(HASHED) as client:
        assert client.prune(MODEL, secateur.l1_unstructured("w", 2)).report.zeros == 2
    for token in (None, "a wrong token of mine"):
        with guarded.client(token) as stranger:
            with pytest.raises(secateur.Unauthenticated) as refused:
                stranger.prune(MODEL, secateur.l1_unstructured("w", 2))
            assert refused.value.request_id


# The file of tokens ---------------------------------------------------------------------------


def test_changed_tokens_are_reloaded_and_a_broken_file_is_ignored(guarded: Guarded) -> None:
    new = "a token that comes later"
    _SENT.append(new)
    good = guarded.reloads("ok")
    assert not guarded.knows(new)
    with grpc.insecure_channel(guarded.server.address) as old:
        watch = health_pb2_grpc.HealthStub(old).Watch(
            health_pb2.HealthCheckRequest(), metadata=bearer(HASHED)
        )
        next(watch)
        guarded.tokens.write_text(table("ours", TOKEN, new))
        eventually(lambda: guarded.knows(new), True)
        assert not guarded.knows(HASHED)
        assert guarded.knows(TOKEN)
        assert watch.is_active()  # running calls continue
        watch.cancel()
    assert guarded.reloads("ok") == good + 1
    for text in (f'[tenants.ours]\ntokens = ["{new}', "", None):
        failed = guarded.reloads("failed")
        guarded.tokens.write_text(text) if text is not None else guarded.tokens.unlink()
        eventually(lambda: (guarded.knows(new), guarded.reloads("failed")), (True, failed + 1))
        assert not guarded.knows(HASHED)
    guarded.tokens.write_text(guarded.first)
    eventually(lambda: guarded.knows(HASHED), True)
    assert not guarded.knows(new)


SECRET = "a-secret-that-nobody-prints"
_LISTED = f'tokens = ["{SECRET}"]\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must have tables [tenants.NAME], at least one"),
        (_LISTED, "must have tables [tenants.NAME]"),
        (f"[tenants]\n{SECRET} = 'ours'\n", "must have tables [tenants.NAME]"),
        (f"[tenants.ours]\n{_LISTED}[other]\n", "must have tables [tenants.NAME]"),
        (f"tenants = ['{SECRET}']\n", "must have tables [tenants.NAME]"),
        (f"{SECRET}\n", "is not TOML"),
        (f'[tenants.ours]\ntokens = ["{SECRET}\n', "is not TOML"),
        (f"[tenants.ours]\ntokens = [{SECRET}]\n", "is not TOML"),
        (f"[tenants.ours]\n{_LISTED}{_LISTED}", "is not TOML"),
        (f"a = {'[' * 5000}", "is not TOML"),
        (f"a = {'9' * 5000}", "is not TOML"),
        ("[tenants.ours]\n", "tenants.ours.tokens: the list is empty"),
        ("[tenants.ours]\ntokens = []\n", "tenants.ours.tokens: the list is empty"),
        (f"[tenants.ours]\ntokens = '{SECRET}'\n", "tenants.ours.tokens: is not a list"),
        (f"[tenants.ours]\ntokens = ['{SECRET}', 1]\n", "tenants.ours.tokens: is not a list"),
        (f"[tenants.ours]\ntokens = ['{SECRET[:15]}']\n", "less than 16 characters"),
        (f"[tenants.ours]\ntokens = ['{SECRET}é']\n", "a token cannot be sent"),
        (f"[tenants.ours]\ntokens = ['{SECRET} ']\n", "a token cannot be sent"),
        (f'[tenants.ours]\ntokens = ["{SECRET}\\n"]\n', "a token cannot be sent"),
        (f"[tenants.ours]\ntokens = ['sha256:{SECRET}']\n", "is not followed by 64 hex digits"),
        (
            f"[tenants.ours]\n{_LISTED}[tenants.b]\n{_LISTED}",
            "tenants.b: a token belongs to another",
        ),
        (f"[tenants.ours]\n{_LISTED}[tenants.b]\ntokens = ['{hashed(SECRET)}']\n", "another"),
        (f"[tenants.ours]\n{_LISTED}requests = 0\n", "tenants.ours.requests"),
        (f"[tenants.ours]\n{_LISTED}requests = true\n", "tenants.ours.requests"),
        (f"[tenants.ours]\n{_LISTED}requests = '{SECRET}'\n", "tenants.ours.requests"),
        (f"[tenants.ours]\n{_LISTED}memory = '1 apple'\n", "tenants.ours.memory"),
        (f"[tenants.ours]\n{_LISTED}store = -1\n", "tenants.ours.store"),
        (f"[tenants.ours]\n{_LISTED}allow = '/models'\n", "tenants.ours.allow"),
        (f"[tenants.ours]\n{_LISTED}allow = ['/models']\n", "'/models' is not scheme://place"),
        (f"[tenants.ours]\n{_LISTED}allow = ['file://models']\n", "is not scheme://place"),
        (f"[tenants.ours]\n{_LISTED}allow = ['file:///models/..']\n", "is not scheme://place"),
        (
            f"[tenants.ours]\n{_LISTED}quota = 1\n",
            "'quota' is unknown; the keys are",
        ),
        (f"[tenants.ours]\n{_LISTED}stroe = 1\n", "'stroe' is unknown; the nearest is 'store'"),
        (f"[tenants.ours]\ntoken = ['{SECRET}']\n", "'token' is unknown; the nearest is 'tokens'"),
        (
            f"[tenants.ours]\n{_LISTED}{SECRET} = 1\n",
            "a key is unknown; the keys are",
        ),
    ],
)
def test_error_of_a_wrong_tokens_file_contains_no_token(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadTokens) as refused:
        read_tokens(path)
    told = str(refused.value)
    assert message in told
    assert told.startswith(str(path)), told
    assert SECRET[:10] not in told
    assert len(told.splitlines()) == 1
    assert len(told) < 400


def test_wrong_tokens_file_prevents_the_start_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tokens.toml"
    path.write_bytes(b"\xff\xfe")
    options = ["--address", "127.0.0.1:0", "--metrics-address", "", "--tokens-file", str(path)]
    config = read_config(options, {})
    with pytest.raises(CannotStart, match=r"cannot read the tokens: .* is not TOML"):
        App(config)
    assert check(config) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"secateur-server: cannot read the tokens: {path} is not TOML")


# Addresses ------------------------------------------------------------------------------------

PUBLIC = (
    *("0.0.0.0:50051", "[::]:50051", "10.1.2.3:50051", "192.168.0.1:0", "[fe80::1]:50051"),
    *("models.example.com:50051", "localhost.example.com:50051", "dns:///models.example.com:1"),
    *("ipv4:0.0.0.0:50051", "127.0.0.1.example.com:1", "0.0.0.0", ":50051", "50051"),
    *("[::ffff:10.0.0.1]:1", "127.0.0.1:1,0.0.0.0:2", "0.0.0.0:2,127.0.0.1:1", "vsock:1:2"),
    *("0.0.0.0:1/127.0.0.1:2", "unix.example.com:1"),
)
PRIVATE = (
    *("127.0.0.1:50051", "localhost:50051", "[::1]:50051", "127.8.9.10:1"),
    *("unix:/run/secateur", "unix:secateur", "unix:///run/secateur", "unix-abstract:secateur"),
)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_address_needs_tls_and_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], address: str
) -> None:
    for name in ("cert", "key", "ca", "tokens"):
        (tmp_path / name).touch()
    tls = ["--tls-cert", str(tmp_path / "cert"), "--tls-key", str(tmp_path / "key")]
    tokens = ["--tokens-file", str(tmp_path / "tokens")]
    for options, missing, given in (
        ([], ["--tls-cert and --tls-key", "--tokens-file"], []),
        (tls, ["--tokens-file"], ["--tls-cert"]),
        (tokens, ["--tls-cert and --tls-key"], ["--tokens-file"]),
    ):
        with pytest.raises(SystemExit) as ended:
            read_config(["--address", address, *options], {})
        assert ended.value.code == 2
        said = capsys.readouterr().err.rpartition("error: ")[2]
        assert all(part in said for part in (address, "--insecure", *missing)), said
        assert not any(part in said for part in given), said
    assert read_config(["--address", address, *tls, *tokens], {}).address == address
    mutual = [*tls, "--tls-client-ca", str(tmp_path / "ca")]
    assert read_config(["--address", address, *mutual], {}).address == address


def test_check_reports_insecure_public_addresses(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--address", "0.0.0.0:0", "--insecure", "--metrics-address", ""]
    assert check(read_config(options, {})) == 0
    assert "for other machines too (--insecure)" in capsys.readouterr().out


@pytest.mark.parametrize("address", PUBLIC[:6])
def test_insecure_allows_a_public_address(address: str) -> None:
    config = read_config(["--address", address, "--insecure", "--metrics-address", ""], {})
    assert (config.address, is_public(config.address)) == (address, True)
    environment = {"SECATEUR_ADDRESS": address}
    assert read_config([], {**environment, "SECATEUR_INSECURE": "1"}).insecure
    for value in ("0", "false", "", "no"):
        with pytest.raises(SystemExit):
            read_config([], {**environment, "SECATEUR_INSECURE": value})


@pytest.mark.parametrize("address", PRIVATE)
def test_local_address_needs_neither_tls_nor_tokens(address: str) -> None:
    assert read_config(["--address", address], {}).address == address


@pytest.mark.parametrize("address", ["0.0.0.0:9464", "[::]:9464", ":9464", "metrics.example:9464"])
def test_metrics_at_a_public_address_need_a_token(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, address: str
) -> None:
    (tmp_path / "scraper").write_text(SCRAPER)
    with pytest.raises(SystemExit, match="2"):
        read_config(["--metrics-address", address], {})
    message = f"--metrics-address {address} can be reached from other machines: give --metrics-tok"
    assert message in capsys.readouterr().err
    for enough in (["--metrics-token-file", str(tmp_path / "scraper")], ["--insecure"]):
        assert read_config(["--metrics-address", address, *enough], {}).metrics_address == address


@pytest.mark.parametrize("address", ["127.0.0.1:9464", "[::1]:9464", "localhost:9464", ""])
def test_metrics_at_a_local_address_need_no_token(address: str) -> None:
    assert read_config(["--metrics-address", address], {}).metrics_address == (address or None)


def test_server_starts_at_a_public_address_only_if_allowed() -> None:
    ended = run_server("--address", "0.0.0.0:0")
    assert ended.returncode == 2
    assert "--address 0.0.0.0:0 can be reached from other machines: give --tls-cert" in ended.stderr
    options = ["--address", "0.0.0.0:0", "--metrics-address", "", "--insecure"]
    with App(read_config(options, {})) as app:
        port = app.address.rpartition(":")[2]
        with secateur.Client(f"127.0.0.1:{port}", timeout=300) as client:
            assert client.report(MODEL).total == 4


# The metrics ----------------------------------------------------------------------------------


def scrape(guarded: Guarded, authorization: str | None, path: str = "/metrics") -> tuple[int, str]:
    """Returns the status and the text of a scrape."""
    request = urllib.request.Request(f"http://{guarded.server.metrics_address}{path}")
    if authorization is not None:
        request.add_header("Authorization", authorization)
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def sample(guarded: Guarded, name: str, **labels: str) -> float:
    """Like raw.series, with the token."""
    from prometheus_client.parser import text_string_to_metric_families

    _, text = scrape(guarded, f"Bearer {SCRAPER}")
    return sum(
        found.value
        for family in text_string_to_metric_families(text)
        for found in family.samples
        if found.name == name and labels.items() <= found.labels.items()
    )


def test_metrics_need_their_token(guarded: Guarded) -> None:
    status, text = scrape(guarded, f"Bearer {SCRAPER}")
    assert (status, "secateur_build_info" in text) == (200, True)
    assert scrape(guarded, f"bearer {SCRAPER}")[0] == 200
    for wrong in (
        *(None, "", SCRAPER, "Bearer", "Bearer ", f"Basic {SCRAPER}", f"Bearer {SCRAPER}x"),
        *(f"Bearer {SCRAPER[:-1]}", f"Bearer {TOKEN}", "Bearer caf\xe9", f"Bearer\t{SCRAPER}"),
    ):
        status, text = scrape(guarded, wrong)
        assert (status, text) == (401, "a bearer token is needed\n"), wrong
    for path in ("/%6detrics", "/metrics?name[]=up", "/metrics?x=/metrics"):
        assert scrape(guarded, None, path)[0] == 401
        assert scrape(guarded, f"Bearer {SCRAPER}", path)[0] == 200
    for path in ("/", "/metrics/", "/metricsx", "/Metrics", "/../metrics", "/favicon.ico"):
        assert scrape(guarded, None, path)[0] == 401  # without a token the path is not revealed
        status, text = scrape(guarded, f"Bearer {SCRAPER}", path)
        assert (status, text) == (404, "metrics are at /metrics\n"), path


def test_silent_and_broken_scrapers_block_nobody_and_are_not_logged(guarded: Guarded) -> None:
    host, _, port = guarded.server.metrics_address.rpartition(":")
    before = guarded.server.log.read_text()
    sockets = [socket.create_connection((host, int(port)), timeout=300) for _ in range(20)]
    for index, opened in enumerate(sockets):
        opened.sendall((b"", b"GET /met", b"GET /metrics HTTP/1.1\r\n")[index % 3])
    assert scrape(guarded, f"Bearer {SCRAPER}")[0] == 200
    for index, opened in enumerate(sockets):
        if index % 2:  # a reset, not an end
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        opened.close()
    for data in (b"\0\xff\r\n\r\n", b"A" * 70_000 + b"\r\n\r\n", b"GET\r\n\r\n"):
        with socket.create_connection((host, int(port)), timeout=300) as opened:
            opened.sendall(data)
            while opened.recv(65536):
                pass
    assert scrape(guarded, f"Bearer {SCRAPER}")[0] == 200
    added = guarded.server.log.read_text().removeprefix(before)
    assert "Exception" not in added, added


def test_missing_metrics_token_file_refuses_everybody(guarded: Guarded) -> None:
    for spoil in (
        lambda: guarded.scraper.write_text(""),
        lambda: guarded.scraper.write_text(" \n"),
        guarded.scraper.unlink,
        guarded.scraper.mkdir,
    ):
        spoil()
        for authorization in (f"Bearer {SCRAPER}", "Bearer ", "Bearer", None):
            assert scrape(guarded, authorization)[0] == 401
    guarded.scraper.rmdir()
    guarded.scraper.write_bytes("pässword of scrapers".encode())
    assert scrape(guarded, f"Bearer {SCRAPER}")[0] == 401
    # Headers are bytes: urllib writes text as Latin-1.
    assert scrape(guarded, "Bearer " + "pässword of scrapers".encode().decode("latin-1"))[0] == 200
    guarded.scraper.write_text(SCRAPER)
    assert scrape(guarded, f"Bearer {SCRAPER}")[0] == 200
