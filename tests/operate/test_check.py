"""secateur-server --check."""

from pathlib import Path

import pytest

from tests.conftest import RunningServer
from tests.operate.test_lifecycle import run_server


def test_it_says_what_the_server_would_do(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text('[tenants.vision]\ntokens = ["sixteen letters or more"]\n')
    ended = run_server(
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
    assert said[3] == "takes models of up to 2.0 GiB, at once up to 3.0 GiB; 5 requests may wait"
    assert said[4] == f"keeps checkpoints in {tmp_path}/new/store, up to 1.0 GiB"
    assert said[5] == f"opens URIs under {tmp_path}, s3://bucket/models"
    assert not (tmp_path / "new").exists()  # it says, and does nothing


def test_it_may_be_asked_beside_a_server_that_runs(server: RunningServer) -> None:
    ended = run_server(
        *("--check", "--address", server.address, "--metrics-address", server.metrics_address)
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens-file", "{bad}"], "cannot read the tokens: {bad} is no TOML"),
        (["--tls-cert", "{bad}", "--tls-key", "{bad}"], "cannot serve TLS: {bad} and {bad}:"),
        (["--store-dir", "{bad}/store"], "cannot keep checkpoints in {bad}/store: {bad} is closed"),
        (["--metrics-address", "nowhere"], "cannot serve metrics at 'nowhere': it is no HOST:PORT"),
    ],
)
def test_what_would_fail_is_said_in_one_line(
    tmp_path: Path, options: list[str], message: str
) -> None:
    bad = tmp_path / "bad"
    bad.write_text("neither this nor that")
    ended = run_server("--check", *(option.format(bad=bad) for option in options))
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"secateur-server: {message.format(bad=bad)}")
