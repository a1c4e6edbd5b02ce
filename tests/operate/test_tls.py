"""TLS: accepted clients, and certificates that change while the server runs."""

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safetensors.numpy import save_file

import secateur
from secateur_proto.pruner_pb2 import ReportHeader, ReportRequest
from secateur_proto.pruner_pb2_grpc import PrunerStub
from secateur_server.check import check
from secateur_server.config import read_config
from secateur_server.options import Config
from tests.conftest import RunningServer, eventually, run_server, start_server, stop_server
from tests.contract.raw import OWN_CONNECTION, bearer, entry, failure, file, series
from tests.operate.certificates import Authority, Pair, serial_at

TOKEN = "a token of 23 characters"
MODEL = {"w": np.arange(4, dtype=np.float32)}
FILE = file({"w": entry("F32", [4], 0, 16)}, b"\0" * 16)

_OURS, _THEIRS = Authority("ours"), Authority("theirs")


@dataclass(frozen=True)
class Served:
    """A server with TLS, its files, and its first certificate."""

    server: RunningServer
    cert: Path
    key: Path
    ca: Path
    first: Pair

    @property
    def address(self) -> str:
        return self.server.address

    def reloads(self, result: str) -> float:
        return series(self.server, "secateur_reloads_total", file="tls", result=result)


def files_of(folder: Path, pair: Pair) -> tuple[Path, Path, Path]:
    """Writes a pair and our authority to a folder."""
    cert, key, ca = (folder / name for name in ("server.crt", "server.key", "ca.crt"))
    pair.put(cert, key)
    ca.write_bytes(_OURS.cert)
    return cert, key, ca


def served(folder: Path, *options: str, is_mutual: bool = False) -> Iterator[Served]:
    pair = _OURS.pair("server")
    cert, key, ca = files_of(folder, pair)
    tls = ["--tls-cert", str(cert), "--tls-key", str(key)]
    tls += ["--tls-client-ca", str(ca)] if is_mutual else []
    running = start_server(*tls, *options)
    yield Served(running, cert, key, ca, pair)
    logged = stop_server(running)
    assert "Traceback" not in logged, logged


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("tls")
    tokens = folder / "tokens.toml"
    tokens.write_text(f'[tenants.ours]\ntokens = ["{TOKEN}"]\n')
    yield from served(folder, "--tokens-file", str(tokens))


@pytest.fixture(scope="module")
def mutual(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from served(tmp_path_factory.mktemp("mutual"), is_mutual=True)


def refusal(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.StatusCode | None:
    """Makes a call over a new connection. Returns the code of its failure, or None."""
    channel = (
        grpc.secure_channel(address, credentials, [OWN_CONNECTION])
        if credentials
        else grpc.insecure_channel(address, [OWN_CONNECTION])
    )
    with channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        found = failure(check, health_pb2.HealthCheckRequest(), timeout=300)
    return found.code if found else None


# Accepted clients -----------------------------------------------------------------------------


@pytest.mark.parametrize("as_what", [str, Path, Path.read_bytes])
def test_client_that_trusts_the_ca_is_served(
    tls: Served, as_what: Callable[[Path], str | Path | bytes]
) -> None:
    """The client accepts the path of the CA, as str or Path, and credentials of grpc."""
    trust = as_what(tls.ca)
    with secateur.Client(
        tls.address,
        token=TOKEN,
        tls=grpc.ssl_channel_credentials(trust) if isinstance(trust, bytes) else trust,
        timeout=300,
    ) as client:
        assert client.report(MODEL).total == 4
        assert client.prune(MODEL, secateur.l1_unstructured("w", 2)).report.zeros == 2


def test_plaintext_and_other_cas_are_not_served(tls: Served) -> None:
    assert refusal(tls.address, _OURS.credentials()) is None
    assert refusal(tls.address, None) == grpc.StatusCode.UNAVAILABLE
    assert refusal(tls.address, _THEIRS.credentials()) == grpc.StatusCode.UNAVAILABLE
    with (
        secateur.Client(tls.address, token=TOKEN, timeout=300) as client,
        pytest.raises(secateur.Unavailable, match=f"{tls.address} speaks TLS"),
    ):
        client.report(MODEL)


def test_over_tls_a_token_is_needed_as_well(tls: Served) -> None:
    for token in (None, TOKEN + "!"):
        with (
            secateur.Client(tls.address, token=token, tls=tls.ca, timeout=300) as client,
            pytest.raises(secateur.Unauthenticated),
        ):
            client.report(MODEL)


def test_mutual_tls_accepts_certificates_of_the_ca_only(mutual: Served) -> None:
    assert refusal(mutual.address, _OURS.credentials(_OURS.pair("caller"))) is None
    for credentials in (
        None,
        _OURS.credentials(),
        _OURS.credentials(_THEIRS.pair("caller")),
        _OURS.credentials(_THEIRS.pair("ours")),  # the name does not matter
    ):
        assert refusal(mutual.address, credentials) == grpc.StatusCode.UNAVAILABLE


def command(address: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {name: value for name, value in os.environ.items() if not name.startswith("SECATEUR_")}
    return subprocess.run(
        [sys.executable, "-m", "secateur.cli", *options, "--server", address],
        capture_output=True,
        text=True,
        timeout=300,
        env={**known, **environment},
    )


def test_the_command_line_speaks_mutual_tls(mutual: Served, tmp_path: Path) -> None:
    save_file(MODEL, tmp_path / "in.safetensors")
    cert, key = tmp_path / "me.crt", tmp_path / "me.key"
    _OURS.pair("me").put(cert, key)
    report = ("report", str(tmp_path / "in.safetensors"))
    mine = ("--tls-cert", str(cert), "--tls-key", str(key))
    ended = command(mutual.address, *report, "--tls-ca", str(mutual.ca), *mine)
    assert ended.returncode == 0, ended.stderr
    assert "w" in ended.stdout
    ended = command(mutual.address, *report, *mine, SECATEUR_TLS_CA=str(mutual.ca))
    assert ended.returncode == 0, ended.stderr
    for options in ((), ("--tls-ca", str(mutual.ca)), ("--tls", *mine)):
        ended = command(mutual.address, *report, *options)
        assert (ended.returncode, ended.stdout) == (1, ""), options
        (line,) = ended.stderr.splitlines()
        assert line.startswith("secateur: "), line
    ended = command(mutual.address, *report, "--tls-ca", str(tmp_path / "none"))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == f"secateur: {tmp_path / 'none'}: No such file or directory\n"


# Files that change ----------------------------------------------------------------------------


def test_new_certificate_is_used_for_new_connections_only(tls: Served) -> None:
    before, second = tls.reloads("ok"), _OURS.pair("second")

    def messages() -> Iterator[ReportRequest]:
        yield ReportRequest(header=ReportHeader(data_bytes=len(FILE)), data=FILE[:9])
        second.put(tls.cert, tls.key)
        eventually(lambda: serial_at(tls.address), second.serial)
        yield ReportRequest(data=FILE[9:])

    with grpc.secure_channel(tls.address, _OURS.credentials()) as channel:
        answer = PrunerStub(channel).Report(messages(), metadata=bearer(TOKEN), timeout=300)
        assert answer.report.total == 4
        threading.Event().wait(1.1)  # the server checks again, and does not reload the same files
        assert serial_at(tls.address) == second.serial
        assert tls.reloads("ok") == before + 1
        assert refusal(tls.address, _OURS.credentials()) is None


def test_mismatched_pair_keeps_the_old_one_and_is_counted(tls: Served) -> None:
    good = _OURS.pair("good")
    good.put(tls.cert, tls.key)
    eventually(lambda: serial_at(tls.address), good.serial)
    other = _OURS.pair("other")
    for spoil in (
        lambda: tls.key.write_bytes(other.key),
        lambda: tls.cert.write_bytes(b"-----BEGIN CERTIFICATE-----\n"),
        lambda: tls.key.unlink(),
    ):
        failed = tls.reloads("failed")
        spoil()
        eventually(
            lambda: (serial_at(tls.address), tls.reloads("failed")), (good.serial, failed + 1)
        )
        assert refusal(tls.address, _OURS.credentials()) is None
    assert tls.server.log.read_text().count(f"cannot reread the certificate {tls.cert}") == 3
    other.put(tls.cert, tls.key)
    eventually(lambda: serial_at(tls.address), other.serial)


def test_changed_client_ca_is_reloaded(mutual: Served) -> None:
    ours, theirs = _OURS.pair("caller"), _THEIRS.pair("caller")
    with grpc.secure_channel(mutual.address, _OURS.credentials(ours)) as old:
        stub = health_pb2_grpc.HealthStub(old)
        stub.Check(health_pb2.HealthCheckRequest(), timeout=300)
        mutual.ca.write_bytes(_THEIRS.cert)
        eventually(lambda: refusal(mutual.address, _OURS.credentials(theirs)), None)
        refused = grpc.StatusCode.UNAVAILABLE
        assert refusal(mutual.address, _OURS.credentials(ours)) == refused
        stub.Check(health_pb2.HealthCheckRequest(), timeout=300)
    failed = mutual.reloads("failed")
    mutual.ca.write_bytes(b"")  # it must accept neither everybody nor nobody
    eventually(
        lambda: (refusal(mutual.address, _OURS.credentials(theirs)), mutual.reloads("failed")),
        (None, failed + 1),
    )
    assert refusal(mutual.address, _OURS.credentials()) == refused
    mutual.ca.write_bytes(_OURS.cert)
    eventually(lambda: refusal(mutual.address, _OURS.credentials(ours)), None)


# Wrong files at the start ---------------------------------------------------------------------


def config_of(cert: Path, key: Path, *options: str) -> Config:
    files = ("--tls-cert", str(cert), "--tls-key", str(key))
    return read_config(["--address", "127.0.0.1:0", *files, *options], {})


SPOILED: dict[str, tuple[Callable[[Path, Path, Path], object], str]] = {
    "another key": (lambda _, key, __: key.write_bytes(_OURS.pair("x").key), "MISMATCH"),
    "no key": (lambda cert, key, _: shutil.copy(cert, key), "server.key"),
    "no certificate": (lambda cert, key, _: shutil.copy(key, cert), "server.crt"),
    "empty files": (lambda cert, key, _: (cert.write_bytes(b""), key.write_bytes(b"")), "server"),
    "bytes": (lambda cert, _, __: cert.write_bytes(bytes(range(256))), "server.crt"),
    "a password": (
        lambda cert, key, _: _OURS.pair("x", b"password").put(cert, key),
        "has a password",
    ),
    "no authority": (lambda _, __, ca: ca.write_bytes(b"none"), "ca.crt"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_unusable_tls_files_are_reported_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    cert, key, ca = files_of(tmp_path, _OURS.pair("server"))
    config = config_of(cert, key, "--tls-client-ca", str(ca), "--metrics-address", "")
    assert check(config) == 0
    spoil, part = SPOILED[what]
    spoil(cert, key, ca)
    capsys.readouterr()
    assert check(config) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("secateur-server: cannot serve TLS: "), line
    assert part in line, line
    assert "BEGIN" not in line, line


def test_server_without_usable_tls_files_exits_with_one_line(tmp_path: Path) -> None:
    cert, key, _ = files_of(tmp_path, _OURS.pair("server"))
    key.write_bytes(_OURS.pair("other").key)
    options = ["--address", "127.0.0.1:0", "--metrics-address", "", "--tls-cert", str(cert)]
    ended = run_server(*options, "--tls-key", str(key))
    assert ended.returncode == 1
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("{")]
    assert len(lines) == 1, ended.stderr
    assert re.fullmatch("secateur-server: cannot serve TLS: .*MISMATCH", lines[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tls-cert", "{cert}"], "--tls-cert and --tls-key need each other"),
        (["--tls-key", "{key}"], "--tls-cert and --tls-key need each other"),
        (["--tls-client-ca", "{ca}"], "--tls-client-ca needs --tls-cert and --tls-key"),
        (["--tls-cert", "{cert}.none"], "argument --tls-cert: {cert}.none: No such file"),
        (["--tls-cert", "{folder}"], "argument --tls-cert: {folder}: is not a file"),
        (["--tls-key", "{pipe}"], "argument --tls-key: {pipe}: is not a file"),
        (["--tls-key", "/dev/null"], "argument --tls-key: /dev/null: is not a file"),
    ],
)
def test_wrong_tls_options_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    cert, key, ca = files_of(tmp_path, _OURS.pair("server"))
    os.mkfifo(pipe := tmp_path / "pipe")  # opening it would wait for a writer
    names = {"cert": cert, "key": key, "ca": ca, "folder": tmp_path, "pipe": pipe}
    with pytest.raises(SystemExit) as ended:
        read_config([option.format(**names) for option in options], {})
    assert ended.value.code == 2
    assert message.format(**names) in capsys.readouterr().err
