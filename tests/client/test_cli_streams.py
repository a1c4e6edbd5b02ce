"""`-`: models on standard input and output, and nothing else there."""

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, load_file, save

from secateur import cli
from tests.client.test_cli import WEIGHTS
from tests.conftest import PATIENCE, RunningServer

HALF = ["--method", "l1_unstructured", "--amount", "0.5"]
MODEL = save(WEIGHTS, metadata={"format": "pt"})
Capture = pytest.CaptureFixture[bytes]


@pytest.fixture(autouse=True)
def at_server(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_SERVER", server.address)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(MODEL)))
    return monkeypatch


def command(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).with_name("secateur")), *arguments]


def test_prune_between_pipes(tmp_path: Path) -> None:
    """As a shell runs it, with an embedded server, which writes local files itself."""
    environment = {k: v for k, v in os.environ.items() if k != "SECATEUR_SERVER"}
    ended = subprocess.run(
        command("prune", "-", "-o", "-", *HALF), env=environment, input=MODEL, capture_output=True
    )
    (tmp_path / "in.safetensors").write_bytes(MODEL)
    out = tmp_path / "out.safetensors"
    assert cli.main(["prune", str(tmp_path / "in.safetensors"), "-o", str(out), *HALF]) == 0
    assert (ended.returncode, ended.stdout) == (0, out.read_bytes())
    assert ended.stderr.startswith(b"tensor ")  # the report
    assert b"\ntotal " in ended.stderr


def test_every_command_reads_standard_input(
    given: pytest.MonkeyPatch, capsysbinary: Capture, tmp_path: Path
) -> None:
    for name in ("report", "plan", "sensitivity"):
        given.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(MODEL)))
        assert cli.main([name, "-", "--json"]) == 0
        assert json.loads(capsysbinary.readouterr().out)
    given.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(MODEL)))
    assert cli.main(["checkpoints", "put", "-"]) == 0
    name = capsysbinary.readouterr().out.decode().strip()
    for output in ("dense", "packed"):
        assert cli.main(["checkpoints", "get", name, "-o", "-", "--output", output]) == 0
        (tmp_path / "got.safetensors").write_bytes(capsysbinary.readouterr().out)
        found = load_file(tmp_path / "got.safetensors")
        assert output == "packed" or all(np.array_equal(found[n], WEIGHTS[n]) for n in WEIGHTS)
    assert cli.main(["checkpoints", "rm", name]) == 0


@pytest.mark.parametrize("name", ["finalize", "pack"])
@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_other_commands_write_standard_output(
    given: pytest.MonkeyPatch, capsysbinary: Capture, name: str, quiet: list[str]
) -> None:
    assert cli.main([name, "-", "-o", "-", *quiet]) == 0
    shown = capsysbinary.readouterr()
    assert {"fc.weight", "steps"} <= load(shown.out).keys()
    lines = shown.err.splitlines()
    assert bool(quiet) == all(line.startswith(b"secateur: warning: -") for line in lines)


def test_masks_are_written_too(given: pytest.MonkeyPatch, capsysbinary: Capture) -> None:
    assert cli.main(["prune", "-", "-o", "-", "--output", "masks", "--quiet", *HALF]) == 0
    assert load(capsysbinary.readouterr().out)["fc.weight"].dtype == np.uint8


@pytest.mark.parametrize("content", [b"", b"text", MODEL[:-1], MODEL[:9]])
def test_an_error_leaves_standard_output_empty(
    monkeypatch: pytest.MonkeyPatch, capsysbinary: Capture, content: bytes
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert cli.main(["prune", "-", "-o", "-", *HALF]) == 1
    shown = capsysbinary.readouterr()
    assert shown.out == b""
    (line,) = shown.err.splitlines()
    assert line.startswith(b"secateur: standard input: ")


def test_json_is_not_beside_a_model(given: pytest.MonkeyPatch, capsysbinary: Capture) -> None:
    for arguments in (["prune", "-", "-o", "-", *HALF], ["pack", "-", "-o", "-"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main([*arguments, "--json"])
        shown = capsysbinary.readouterr()
        assert shown.out == b""
        assert b"--json: not allowed with -o -" in shown.err


def test_a_full_disk_and_a_closed_pipe(tmp_path: Path) -> None:
    prune = command("prune", "-", "-o", "-", "--quiet", *HALF)
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(prune, input=MODEL, stdout=full, stderr=subprocess.PIPE)
    reason = b"secateur: standard output: No space left on device\n"
    assert (ended.returncode, ended.stderr) == (1, reason)
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(prune, input=MODEL, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (1, b"")


def test_a_terminal_has_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    shell, terminal = pty.openpty()
    with os.fdopen(terminal, "r+b", buffering=0) as stream:
        on = subprocess.run(command("report", "-"), stdin=stream, capture_output=True)
        to = subprocess.run(
            command("prune", "-", "-o", "-", *HALF),
            input=MODEL,
            stdout=stream,
            stderr=subprocess.PIPE,
        )
    os.close(shell)
    said = b"secateur: -: standard input is a terminal; redirect it: < IN.safetensors\n"
    assert (on.returncode, on.stdout, on.stderr) == (1, b"", said)
    assert to.returncode == 1
    assert to.stderr.startswith(b"secateur: -o -: standard output is a terminal; redirect it")


def test_closed_streams_are_one_error(tmp_path: Path) -> None:
    """Of a command that writes there: as another command, `cat >&-`, says it."""
    model, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    model.write_bytes(MODEL)

    def ended(close: str, *arguments: str) -> tuple[int, str, str]:
        shell = ["sh", "-c", f'exec "$@" {close}', "sh", *command(*arguments)]
        found = subprocess.run(shell, input="", capture_output=True, text=True, timeout=PATIENCE)
        return found.returncode, found.stdout, found.stderr

    no_output = (1, "", "secateur: standard output: Bad file descriptor\n")
    assert ended(">&-", "report", str(model)) == no_output
    assert ended(">&-", "report", str(model), "--json") == no_output
    code, _, said = ended(">&-", "prune", str(model), "-o", "-", *HALF)
    assert (code, said.splitlines()[-1:]) == (1, no_output[2].splitlines())
    assert ended("<&- >&-", "prune", str(model), "-o", str(out), "--quiet", *HALF) == (0, "", "")
    assert out.exists()
    code, _, said = ended("<&-", "report", "-")
    assert (code, said.startswith("secateur: standard input: is empty")) == (1, True)
    assert ended("2>&-", "report", "absent.safetensors") == (1, "", "")


def test_names_that_the_encoding_of_the_output_lacks(tmp_path: Path) -> None:
    model = tmp_path / "in.safetensors"
    model.write_bytes(save({"é\u2028.weight": np.ones((2, 2))}))
    ended = subprocess.run(
        command("report", str(model)),
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert b"\\xe9\\u2028.weight" in ended.stdout


def test_json_has_numbers_that_are_not_finite_as_strings(
    tmp_path: Path, capsysbinary: Capture
) -> None:
    model = tmp_path / "in.safetensors"
    model.write_bytes(save({"w": np.array([[1, np.inf], [np.inf, -np.inf]], np.float32)}))

    def fail(constant: str) -> None:
        raise AssertionError(constant)

    assert cli.main(["plan", str(model), "--amounts", "0.5", "--json"]) == 0
    plan = json.loads(capsysbinary.readouterr().out, parse_constant=fail)
    assert plan["amounts"][0]["choices"][0]["threshold"] == "Infinity"
