"""`secateur doctor`: what it finds on servers that work, and on those that fail in known ways."""

import json
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numba
import pytest
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

import secateur
from secateur import cli
from secateur.channel import TlsFiles
from secateur.checkup import Check
from secateur.checkup.check import Clock
from secateur.checkup.embedded import check_embedded
from secateur.checkup.examination import check_server
from tests.conftest import PATIENCE, RunningServer, start_server, stop_server
from tests.operate.certificates import Authority, Pair

OURS, THEIRS = Authority("ours"), Authority("theirs")
TOKEN = "a token of 23 characters"


def checks(address: str, tls: TlsFiles | None = None, token: str | None = None) -> dict[str, Check]:
    found = list(check_server(address, token, tls, False, Clock(PATIENCE)))
    assert all(check.advice for check in found if check.status != "ok")
    assert not any("\n" in check.found + check.advice for check in found)
    return {check.name: check for check in found}


def failure(address: str, tls: TlsFiles | None = None, token: str | None = None) -> tuple[str, ...]:
    """The check that fails, and which is the last: its name, finding and advice."""
    *before, last = checks(address, tls, token).values()
    assert all(check.status != "fail" for check in before)
    assert last.status == "fail"
    return last.name, last.found, last.advice


def test_all_is_well(server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    limit = ["--timeout", str(PATIENCE)]
    named = server.address.replace("127.0.0.1", "localhost")
    assert cli.main(["doctor", "--server", named, "--json", *limit]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    answer = json.loads(shown.out)
    assert answer["ok"] is True
    found: dict[str, dict[str, str]] = {check["name"]: check for check in answer["checks"]}
    order = ["client", "dns", "connection", "grpc", "token", "server", "device", "line"]
    assert list(found) == [*order, "selection", "embedded"]
    measured = {"line", "selection"}  # which are warnings on a slow machine
    assert {n for n, check in found.items() if check["status"] != "ok"} <= measured
    python = sys.version.split()[0]
    versions = f"numba {numba.__version__}, python {python}, torch {torch.__version__}"
    assert f"secateur {secateur.__version__}, " in found["client"]["found"]
    assert found["server"]["found"].endswith(versions)
    assert "4.2 MB sent" in found["line"]["found"]
    assert "1,048,576 weights" in found["selection"]["found"]
    assert "prunes 1,048,576 weights on cpu" in found["embedded"]["found"]


def test_a_closed_port(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")  # no command needs an embedded server then
    limit = ["--timeout", str(PATIENCE)]
    assert cli.main(["doctor", "--quiet", "--server", "localhost:1", *limit]) == 1
    shown = capsys.readouterr()
    connection, embedded = shown.out.splitlines()
    assert connection == (
        "fail  connection  no server listens at localhost:1 (Connection refused): start one, or "
        "check host and port"
    )
    assert embedded.split()[:2] == ["warn", "embedded"]
    assert shown.err == "secateur: 1 of 4 checks failed: connection\n"


def test_no_server_at_all(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.delenv("SECATEUR_SERVER", raising=False)
    assert cli.main(["doctor", "--json"]) == 1
    shown = capsys.readouterr()
    answer = json.loads(shown.out)
    assert answer["ok"] is False
    assert [check["status"] for check in answer["checks"]] == ["ok", "fail"]
    assert shown.err == "secateur: 1 of 2 checks failed: embedded\n"
    monkeypatch.undo()
    late = check_embedded(Clock(0), is_needed=True)  # it has a tenth of a second
    assert late.found == "it does not start in 0.1 s"
    assert "--timeout" in late.advice


def test_addresses_that_are_wrong() -> None:
    name, found, advice = failure("nowhere.invalid:50051")
    assert (name, advice) == ("dns", "check the name of the host")
    assert "'nowhere.invalid' cannot be resolved" in found
    assert failure("http://localhost:1")[0] == "options"
    assert failure("unix:/nowhere")[:2] == (
        "connection",
        "no server listens at unix:/nowhere",
    )
    assert failure("server.example:1", token=TOKEN)[0] == "options"  # it would be sent in plaintext


def test_other_servers(server: RunningServer) -> None:
    name, found, advice = failure(server.metrics_address)
    assert (name, "speaks HTTP/1" in found) == ("grpc", True)
    assert "its gRPC port is 50051 by default" in advice
    tls = TlsFiles()
    name, found, advice = failure(server.address, tls)
    assert (name, found.endswith("does not speak TLS")) == ("tls", True)
    assert "--tls-ca" in advice


def test_a_server_that_does_not_serve() -> None:
    from concurrent.futures import ThreadPoolExecutor

    servicer = health.HealthServicer()
    servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    other = grpc.server(ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, other)
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    try:
        assert failure(f"127.0.0.1:{port}")[:2] == (
            "grpc",
            "the server answers that it does not serve now",
        )
        servicer.set("", health_pb2.HealthCheckResponse.SERVING)
        name, found, _ = failure(f"127.0.0.1:{port}")
        assert (name, "has no such method" in found) == ("server", True)
    finally:
        other.stop(None).wait()


def test_another_version(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.checkup.service.VERSION", "98.7.6")
    found = checks(server.address)["server"]
    assert found.status == "warn"
    assert found.advice == "install the same version on both: this client has 98.7.6"


# TLS and tokens ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor")
    (folder / "ca.crt").write_bytes(OURS.cert)
    (folder / "theirs.crt").write_bytes(THEIRS.cert)
    OURS.pair("server", days=90).put(folder / "server.crt", folder / "server.key")
    (folder / "tokens.toml").write_text(f'[tenants.ours]\ntokens = ["{TOKEN}"]\n')
    return folder


@pytest.fixture(scope="module")
def secured(files: Path) -> Iterator[RunningServer]:
    options = ["--tls-cert", str(files / "server.crt"), "--tls-key", str(files / "server.key")]
    running = start_server(*options, "--tokens-file", str(files / "tokens.toml"))
    yield running
    stop_server(running)


def test_tls_and_a_token(secured: RunningServer, files: Path) -> None:
    ours = TlsFiles(files / "ca.crt")
    found = checks(secured.address, ours, TOKEN)
    assert found["tls"].status == "ok"
    assert "certificate for localhost, 127.0.0.1, expires in 90 days" in found["tls"].found
    assert (found["token"].status, found["token"].found) == ("ok", "accepted")
    refused = {
        None: ("this server needs a bearer token", "give --token, SECATEUR_TOKEN, or in Python"),
        "another token, no less long": ("the token is unknown", "check it, or ask the operator"),
    }
    for token, (said, advice) in refused.items():
        name, found_, advised = failure(secured.address, ours, token)
        assert (name, found_) == ("token", said)
        assert advised.startswith(advice)
    name, said, advice = failure(secured.address)
    assert (name, "speaks TLS, and this client does not" in said) == ("grpc", True)
    assert "--tls-ca" in advice
    for files_of in (TlsFiles(files / "theirs.crt"), TlsFiles()):
        name, said, advice = failure(secured.address, files_of)
        assert (name, "is not trusted" in said) == ("tls", True)
        assert advice == "give the file of the authority that signed it: --tls-ca FILE"
    swapped = TlsFiles(files / "ca.crt", files / "server.crt", files / "server.key")
    name, said, advice = failure(secured.address, swapped)
    assert (name, said.startswith("the files for TLS do not fit (")) == ("tls", True)
    assert advice == "check --tls-ca, --tls-cert and --tls-key"
    name, said, _ = failure(secured.address, TlsFiles(files / "none"))
    assert (name, "none" in said) == ("options", True)


@contextmanager
def handshakes(folder: Path, pair: Pair, address: str) -> Iterator[str]:
    """A server that has a certificate, and nothing else."""
    pair.put(folder / "other.crt", folder / "other.key")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "other.crt", folder / "other.key")
    listening = socket.create_server((address, 0))

    def serve() -> None:
        while True:
            try:
                with listening.accept()[0] as connection:
                    context.wrap_socket(connection, server_side=True).close()
            except ssl.SSLError:
                continue
            except OSError:
                return

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"{address}:{listening.getsockname()[1]}"
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()


@pytest.mark.parametrize(
    ("address", "days", "said", "advice"),
    [
        ("127.0.0.1", -1, "certificate has expired", "renew the certificate on the server"),
        ("127.0.0.2", 1, "for localhost, 127.0.0.1, not for 127.0.0.2", "connect by a name that"),
    ],
)
def test_certificates(files: Path, address: str, days: int, said: str, advice: str) -> None:
    with handshakes(files, OURS.pair("other", days=days), address) as place:
        name, found, advised = failure(place, TlsFiles(files / "ca.crt"))
    assert name == "tls"
    assert said in found
    assert advised.startswith(advice)


def test_a_certificate_that_expires_soon(files: Path) -> None:
    with handshakes(files, OURS.pair("other", days=2), "127.0.0.1") as place:
        found: Any = checks(place, TlsFiles(files / "ca.crt"))["tls"]
    assert (found.status, found.advice) == ("warn", "renew the certificate on the server")
