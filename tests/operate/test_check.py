"""secateur-server --check."""

import socket
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest

from secateur_server.check import check
from secateur_server.config import read_config
from tests.conftest import RunningServer, inner_server, run_command, run_server

# Ports that no other program uses.
FREE = ("--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0")


class Said(NamedTuple):
    status: int
    out: list[str]
    errors: list[str]


Check = Callable[..., Said]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Check:
    """Checks a configuration in this process."""

    def run(*options: str) -> Said:
        status = check(read_config([*FREE, *options], {}))
        shown = capsys.readouterr()
        return Said(status, shown.out.splitlines(), shown.err.splitlines())

    return run


def test_check_prints_what_the_server_would_do(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text('[tenants.vision]\ntokens = ["sixteen letters or more"]\n')
    ended = run_command(
        *("--check", "--address", "127.0.0.1:0", "--metrics-address", "", "--device", "cpu"),
        *("--memory-limit", "3GiB", "--max-model-bytes", "2GiB", "--queue-size", "5"),
        *("--store-dir", str(tmp_path / "new" / "store"), "--store-max-bytes", "1GiB"),
        *("--allow-path", str(tmp_path), "--allow-uri", "s3://bucket/models"),
        *("--tokens-file", str(tokens)),
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    said = ended.stdout.splitlines()
    assert said[0] == "serves gRPC at 127.0.0.1:0, without TLS, to the tenants vision"
    assert said[1] == "serves no metrics"
    assert said[2].startswith("prunes on cpu, ")
    assert said[3] == "accepts models of up to 2.0 GiB, at once up to 3.0 GiB; 5 requests may wait"
    assert said[4] == f"stores checkpoints in {tmp_path}/new/store, up to 1.0 GiB"
    assert said[5] == f"opens URIs under {tmp_path}, s3://bucket/models"
    assert not (tmp_path / "new").exists()  # it prints, and changes nothing


def test_check_reports_resources_of_a_running_server_undisturbed(
    said: Check, tmp_path: Path
) -> None:
    with inner_server("--store-dir", str(tmp_path)) as running:
        assert said("--store-dir", str(tmp_path / "other")).status == 0
        found = said(
            *("--address", running.address, "--metrics-address", running.metrics_address),
            *("--store-dir", str(tmp_path)),
        )
        assert found.status == 1
        assert len(found.errors) == 3
        listen = f"cannot listen at {running.address}: Address already in use"
        assert found.errors[0] == f"secateur-server: {listen}"
        metrics = f"cannot serve metrics at {running.metrics_address}: Address already in use"
        assert found.errors[1] == f"secateur-server: {metrics}"
        store = f"cannot store checkpoints in {tmp_path}: another server uses it"
        assert found.errors[2] == f"secateur-server: {store}"
        with socket.create_connection(running.address.split(":")):  # type: ignore[arg-type]
            pass
    assert said("--store-dir", str(tmp_path)).status == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens-file", "{bad}"], "cannot read the tokens: {bad} is not TOML"),
        (
            ["--tls-cert", "{bad}", "--tls-key", "{bad}"],
            "cannot serve TLS: {bad}: does not contain a certificate",
        ),
        (
            ["--store-dir", "{bad}/store"],
            "cannot store checkpoints in {bad}/store: {bad} is not a folder",
        ),
        *(
            (
                ["--metrics-address", address],
                f"cannot serve metrics at '{address}': it is not HOST:PORT, as 127.0.0.1:9464",
            )
            for address in ("nowhere", "51064", "127.0.0.1", "127.0.0.1:65536", "127.0.0.1:-1")
        ),
        *(
            (
                ["--address", address],
                f"cannot listen at '{address}': it is not HOST:PORT, as 127.0.0.1:50051",
            )
            for address in ("127.0.0.1", "127.0.0.1:", "127.0.0.1:65536", "127.0.0.1:-1", "[::1]")
        ),
        (["--memory-limit", "900TiB"], "--memory-limit is 921600.0 GiB: this machine has "),
        (["--max-model-bytes", "900TiB"], "--max-model-bytes is 921600.0 GiB: this machine has "),
        (
            ["--store-dir", "{folder}", "--store-max-bytes", "90000TiB"],
            "cannot store checkpoints in {folder}: --store-max-bytes is 92160000.0 GiB, the disk",
        ),
        (
            ["--allow-uri", "teapot://bucket/models"],
            "URIs under teapot://bucket/models cannot be opened: Protocol not known: teapot",
        ),
    ],
)
def test_each_problem_is_one_line(
    said: Check, tmp_path: Path, options: list[str], message: str
) -> None:
    bad = tmp_path / "bad"
    bad.write_text("neither this nor that")
    found = said(*(option.format(bad=bad, folder=tmp_path) for option in options))
    assert found.status == 1
    (line,) = found.errors
    assert line.startswith(f"secateur-server: {message.format(bad=bad, folder=tmp_path)}")


def test_no_model_above_the_memory_limit_is_accepted(said: Check) -> None:
    found = said("--memory-limit", "1GiB", "--max-model-bytes", "2GiB")
    (line,) = (line for line in found.out if line.startswith("accepts"))
    assert line.startswith("accepts models of up to 1.0 GiB, at once up to 1.0 GiB;")


def test_every_problem_is_reported(said: Check) -> None:
    found = said("--memory-limit", "900TiB", "--metrics-address", "nowhere")
    assert found.status == 1
    assert len(found.errors) == 2
    assert len(found.out) > 4


@pytest.mark.parametrize("package", ["fsspec", "s3fs"])
def test_missing_package_is_reported(
    said: Check, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    opened_before = import_module("fsspec.registry")._registry
    monkeypatch.delitem(opened_before, "s3", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    found = said("--allow-uri", "s3://bucket/models")
    assert found.status == 1
    (line,) = found.errors
    assert "URIs under s3://bucket/models cannot be opened: " in line
    assert "pip install 'secateur[remote]'" in line


def test_package_without_an_extra_is_named(said: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    (line,) = said("--allow-uri", "gs://bucket/models").errors
    assert line.endswith("; on the server: pip install gcsfs")


VARIABLES = {
    "SECATEUR_TOKEN_FILE": "SECATEUR_TOKENS_FILE",
    "SECATEUR_MEMORY_LIMITS": "SECATEUR_MEMORY_LIMIT",
    "SECATEUR_ADRESS": "SECATEUR_ADDRESS",
}


@pytest.mark.parametrize(("variable", "nearest"), VARIABLES.items())
def test_unknown_variable_is_named_with_the_nearest_option(
    said: Check, monkeypatch: pytest.MonkeyPatch, variable: str, nearest: str
) -> None:
    monkeypatch.setenv(variable, "x")
    found = said()
    assert found.status == 1
    (line,) = found.errors
    assert variable in line
    assert line.endswith(f"the nearest is {nearest}")


@pytest.mark.parametrize(
    "variable",
    [
        *("SECATEUR_SERVER", "SECATEUR_TOKEN", "SECATEUR_TLS_CA", "SECATEUR_FUZZ_SECONDS"),
        *("SECATEUR_MEMORY", "SECATEUR_DEVICE", "SECATEUR_SERVICE_HOST", "SECATEUR_SERVICE_PORT"),
        *("SECATEUR_PORT", "SECATEUR_PORT_50051_TCP_ADDR", "SECATEUR_SERVICE_PORT_GRPC"),
    ],
)
def test_variables_of_other_programs_are_ignored(
    said: Check, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "x")
    assert said().errors == []


def test_server_logs_unknown_variables_at_its_start(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its port is in use, so that it ends after the check."""
    monkeypatch.setenv("SECATEUR_TOKEN_FILE", "tokens.toml")
    ended = run_server("--address", server.address, "--metrics-address", "")
    warning, *_ = ended.stderr.splitlines()
    assert '"level": "WARNING"' in warning
    assert "SECATEUR_TOKEN_FILE is set" in warning
    assert "SECATEUR_TOKENS_FILE" in warning
