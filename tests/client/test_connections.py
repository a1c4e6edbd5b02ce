"""Errors of calls that reach no server: advice, followed by gRPC's own message."""

import contextlib
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest

import secateur
from secateur import cli
from tests.client.both import both
from tests.conftest import RunningServer
from tests.operate.certificates import Authority

MODEL = {"w": np.arange(4, dtype=np.float32)}
OURS, THEIRS = Authority("ours"), Authority("theirs")


@dataclass(frozen=True)
class TlsServers:
    """Ports at 127.0.0.1 and the authority's file.

    plain: Takes callers without a certificate. mutual: Does not.
    """

    plain: int
    mutual: int
    ca: Path
    other_ca: Path


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsServers]:
    folder = tmp_path_factory.mktemp("tls")
    (folder / "ca.crt").write_bytes(OURS.cert)
    (folder / "other.crt").write_bytes(THEIRS.cert)
    pair = OURS.pair("server")
    chain = [(pair.key, pair.cert)]
    server = grpc.server(ThreadPoolExecutor(1))
    ports = [
        server.add_secure_port("0.0.0.0:0", grpc.ssl_server_credentials(chain)),
        server.add_secure_port(
            "127.0.0.1:0", grpc.ssl_server_credentials(chain, OURS.cert, require_client_auth=True)
        ),
    ]
    server.start()
    yield TlsServers(ports[0], ports[1], folder / "ca.crt", folder / "other.crt")
    server.stop(None).wait()


def said(
    address: str,
    tls: object = None,
    timeout: float = 20,
    kind: type[secateur.Client] = secateur.Client,
) -> tuple[type[secateur.SecateurError], str]:
    """The kind and the message of the error."""
    with (
        pytest.raises(secateur.SecateurError) as raised,
        kind(address, tls=tls, timeout=timeout) as client,  # type: ignore[arg-type]
    ):
        client.report(MODEL)
    assert "\n" not in str(raised.value)
    return type(raised.value), str(raised.value)


def test_a_server_with_tls_called_without(tls: TlsServers) -> None:
    kind, text = said(f"127.0.0.1:{tls.plain}")
    assert kind is secateur.Unavailable
    assert f"127.0.0.1:{tls.plain} speaks TLS" in text
    assert "--tls-ca" in text
    assert "Socket closed" in text  # gRPC's own words


def test_a_server_without_tls_called_with_it(server: RunningServer, tls: TlsServers) -> None:
    kind, text = said(server.address, tls.ca)
    assert kind is secateur.Unavailable
    assert f"{server.address} does not speak TLS: leave out tls=" in text


@both
@pytest.mark.parametrize("by", ["path", "credentials", "system"])
def test_an_untrusted_authority(tls: TlsServers, by: str, kind: type[secateur.Client]) -> None:
    trusted = {
        "path": tls.other_ca,
        "credentials": grpc.ssl_channel_credentials(THEIRS.cert),
        "system": True,
    }[by]
    error, text = said(f"localhost:{tls.plain}", trusted, kind=kind)
    assert error is secateur.Unavailable
    assert "is not trusted: another authority signed it" in text
    assert "--tls-ca" in text


@pytest.mark.parametrize("by", ["path", "credentials"])
def test_a_certificate_for_another_name(tls: TlsServers, by: str) -> None:
    trusted = tls.ca if by == "path" else grpc.ssl_channel_credentials(OURS.cert)
    _, text = said(f"127.0.0.2:{tls.plain}", trusted)
    assert "it is for another name" in text


def test_a_server_that_wants_a_certificate(tls: TlsServers) -> None:
    for trusted in (tls.ca, grpc.ssl_channel_credentials(OURS.cert)):
        _, text = said(f"127.0.0.1:{tls.mutual}", trusted)
        assert "--tls-cert and --tls-key" in text


def test_a_wrong_file_of_authorities(tls: TlsServers, tmp_path: Path) -> None:
    (tmp_path / "broken.crt").write_bytes(OURS.cert[:60] + b"\n-----END CERTIFICATE-----\n")
    _, text = said(f"127.0.0.1:{tls.plain}", tmp_path / "broken.crt")
    assert "not valid PEM" in text
    (tmp_path / "der.key").write_bytes(bytes(range(256)))
    files = secateur.channel.TlsFiles(tls.ca, tmp_path / "der.key", tls.ca)
    with pytest.raises(secateur.SecateurError, match=r"der\.key: is not a PEM file"):
        secateur.Client(f"127.0.0.1:{tls.plain}", tls=files)


@pytest.mark.parametrize("has_tls", [False, True])
def test_the_metrics_port(server: RunningServer, tls: TlsServers, has_tls: bool) -> None:
    _, text = said(server.metrics_address, tls.ca if has_tls else None)
    assert "speaks HTTP/1, and not gRPC: it may be the server's metrics port" in text


@both
def test_nothing_listens(kind: type[secateur.Client]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        error, text = said(address, kind=kind)
    assert error is secateur.Unavailable
    assert f"no server listens at {address} (Connection refused)" in text


def test_no_socket_at_a_path(tmp_path: Path) -> None:
    _, text = said(f"unix:{tmp_path}/none")
    assert f"no server listens at unix:{tmp_path}/none: No such file or directory" in text


def test_a_host_that_has_no_address() -> None:
    kind, text = said("no-such-host.invalid:50051")
    assert kind is secateur.Unavailable
    assert "'no-such-host.invalid' cannot be resolved" in text


def test_an_address_without_a_port() -> None:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", 443), 1):
        pytest.skip("something serves port 443 of this machine")
    _, text = said("127.0.0.1")
    assert "has no port" in text
    assert "127.0.0.1:50051" in text


@both
@pytest.mark.parametrize("has_tls", [False, True])
def test_a_listener_that_never_answers(
    tls: TlsServers, has_tls: bool, kind: type[secateur.Client]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        error, text = said(address, tls.ca if has_tls else None, timeout=0.2, kind=kind)
    assert error is secateur.DeadlineExceeded
    assert "not done within the timeout of 0.2 s" in text
    assert f"{address} " in text
    assert "does not answer" in text
    assert ("it may still be starting" in text) is not has_tls


def test_a_listener_whose_queue_is_full_is_a_black_hole() -> None:
    """The system drops connections that it cannot queue, as a firewall does."""
    with socket.socket() as hole, contextlib.ExitStack() as waiting:
        hole.bind(("127.0.0.1", 0))
        hole.listen(0)
        for _ in range(4):
            queued = waiting.enter_context(socket.socket())
            queued.setblocking(False)
            queued.connect_ex(hole.getsockname())
        address = f"127.0.0.1:{hole.getsockname()[1]}"
        kind, text = said(address, timeout=0.2)
    assert kind is secateur.DeadlineExceeded
    assert f"{address} " in text
    assert "does not answer" in text


def test_a_server_that_answers_in_time_is_not_blamed_for_a_short_timeout(
    server: RunningServer,
) -> None:
    kind, text = said(server.address, timeout=1e-6)
    assert kind is secateur.DeadlineExceeded
    assert text == "not done within the timeout of 1e-06 s (Deadline Exceeded)"


@pytest.mark.parametrize(
    ("address", "part"),
    [
        ("http://127.0.0.1:50051", "give '127.0.0.1:50051'"),
        ("http://127.0.0.1:50051/path", "give '127.0.0.1:50051'"),
        ("https://prune.example", "give 'prune.example:50051' and tls=True (--tls)"),
        ("grpc://[::1]", "give '[::1]:50051'"),
        ("grpcs://a:1", "and tls=True"),
        ("", "HOST:PORT"),
        ("a b:1", "HOST:PORT"),
        ("a\0:1", "HOST:PORT"),
        ("\ud800:1", "HOST:PORT"),
        (5, "HOST:PORT"),
        ("localhost:99999", "port '99999'"),
        ("localhost:0", "port '0'"),
        ("localhost:http", "port 'http'"),
    ],
)
def test_an_address_that_cannot_be_right_is_refused_at_once(address: str, part: str) -> None:
    with pytest.raises(secateur.SecateurError, match="address: ") as raised:
        secateur.Client(address)
    assert part in str(raised.value)


@pytest.mark.parametrize("form", ["{}", "dns:{}", "dns:///{}", "ipv4:{}", "dns://8.8.8.8/{}"])
def test_addresses_of_every_form_of_grpc_are_taken(server: RunningServer, form: str) -> None:
    with secateur.Client(form.format(server.address), timeout=20) as client:
        if "8.8.8.8" not in form:
            assert client.report(MODEL).total == 4


# Tokens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address", ["prune.example:50051", "10.0.0.1:50051", "dns:///a:1", "[fe80::1]:1"]
)
def test_a_token_is_not_sent_to_another_machine_in_plaintext(address: str) -> None:
    with pytest.raises(secateur.SecateurError, match=r"insecure=True \(--insecure\)") as raised:
        secateur.Client(address, token="secret of mine")
    assert "secret of mine" not in str(raised.value)
    secateur.Client(address, token="secret", insecure=True).close()
    secateur.Client(address, token="secret", tls=True).close()
    secateur.Client(address).close()


@pytest.mark.parametrize(
    "address",
    ["localhost:1", "127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "dns:///localhost:1", "unix:/s"],
)
def test_a_token_is_sent_in_plaintext_on_this_machine(address: str) -> None:
    """The call fails because nothing listens there, and not because of the token."""
    with (
        secateur.Client(address, token="secret", timeout=0.5) as client,
        pytest.raises(secateur.Unavailable) as raised,
    ):
        client.server_info()
    assert "--insecure" not in str(raised.value)


def test_the_command_takes_insecure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_TOKEN", "secret")
    command = ["checkpoints", "ls", "--server", "no-such-host.invalid:1"]
    assert cli.main(command) == 1
    assert "--insecure" in capsys.readouterr().err
    assert cli.main([*command, "--insecure"]) == 1
    assert "cannot be resolved" in capsys.readouterr().err


@pytest.mark.parametrize("token", ["a\nb", "\u00e9", 5, b"bytes"])
def test_a_token_that_no_header_can_carry_is_refused_and_not_shown(token: str) -> None:
    with pytest.raises(secateur.SecateurError, match="printable ASCII") as raised:
        secateur.Client("localhost:1", token=token)
    assert str(token) not in str(raised.value)


# Variables ----------------------------------------------------------------------------------------


def test_without_an_address_the_variables_count(
    server: RunningServer, tls: TlsServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SECATEUR_SERVER", raising=False)
    with pytest.raises(secateur.SecateurError, match="SECATEUR_SERVER"):
        secateur.Client()
    monkeypatch.setenv("SECATEUR_SERVER", server.address)
    with secateur.Client(timeout=20) as client:
        assert client.report(MODEL).total == 4
    monkeypatch.setenv("SECATEUR_SERVER", "prune.example:1")
    monkeypatch.setenv("SECATEUR_TOKEN", "secret")
    with pytest.raises(secateur.SecateurError, match="without encryption"):
        secateur.Client()
    monkeypatch.setenv("SECATEUR_TLS_CA", str(tls.ca))
    secateur.Client().close()
    monkeypatch.setenv("SECATEUR_TLS_CA", f"{tls.ca}.absent")
    with pytest.raises(secateur.SecateurError, match="No such file"):
        secateur.Client()
    with secateur.Client(server.address, timeout=20) as client:  # an address stands by itself
        assert client.report(MODEL).total == 4


# Clients that are closed --------------------------------------------------------------------------

HALF = secateur.l1_unstructured("w", 0.5)


@pytest.mark.parametrize("kind", ["address", "embedded", "channel"])
def test_every_method_of_a_closed_client_says_so(
    server: RunningServer, tmp_path: Path, kind: str
) -> None:
    if kind == "embedded":
        with secateur.embedded(device="cpu") as client:
            pass
    elif kind == "address":
        client = secateur.Client(server.address)
        client.report(MODEL)
        client.close()
    else:
        channel = grpc.insecure_channel(server.address)
        client = secateur.Client(channel=channel)
        channel.close()
    calls: dict[str, Callable[[], object]] = {
        "prune": lambda: client.prune(MODEL, HALF),
        "prune, streamed": lambda: client.prune(MODEL, HALF, "dense"),
        "prune, kept": lambda: client.prune(MODEL, HALF, keep=True),
        "report": lambda: client.report(MODEL),
        "plan": lambda: client.plan(MODEL, HALF),
        "sensitivity": lambda: client.sensitivity({"w": np.ones((2, 2))}),
        "finalize": lambda: client.finalize(MODEL),
        "upload": lambda: client.upload(MODEL),
        "upload of a URI": lambda: client.upload("file:///x.safetensors"),
        "download": lambda: client.download("checkpoints/x", tmp_path / "x.safetensors"),
        "checkpoint": lambda: client.checkpoint("checkpoints/x"),
        "checkpoints": lambda: list(client.checkpoints()),
        "delete": lambda: client.delete("checkpoints/x"),
    }
    if kind != "channel":
        calls["wait_until_ready"] = lambda: client.wait_until_ready(1)
    for call in calls.values():
        with pytest.raises(secateur.SecateurError, match="the client is closed"):
            call()
    client.close()  # twice is once


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "5", True, 1j])
def test_a_wrong_timeout_is_refused(timeout: float) -> None:
    with pytest.raises(secateur.SecateurError, match="timeout="):
        secateur.Client("localhost:1", timeout=timeout)


def test_a_server_that_is_not_ready_in_time(server: RunningServer) -> None:
    with secateur.Client(server.address) as client:
        client.wait_until_ready(20)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with (
            secateur.Client(f"127.0.0.1:{taken.getsockname()[1]}") as client,
            pytest.raises(
                secateur.Unavailable, match=r"no server listens at .* after 0\.1 seconds"
            ),
        ):
            client.wait_until_ready(0.1)
