"""The command on checkpoints and URIs."""

import json
import os
import pty
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

import secateur
from tests.client.test_cli import WEIGHTS, failure, run
from tests.conftest import RunningServer, inner_server

Tensors = dict[str, npt.NDArray[Any]]

HALF = ("--method", "l1_unstructured", "--amount", "0.5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("allowed")


@pytest.fixture(scope="module")
def own_server(folder: Path) -> Iterator[RunningServer]:
    with inner_server("--allow-path", str(folder)) as running:
        yield running


@pytest.fixture
def model(folder: Path, own_server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's file, which the server may open too; commands go to that server."""
    monkeypatch.setenv("SECATEUR_SERVER", own_server.address)
    path = folder / "model.safetensors"
    save_file(WEIGHTS, path, metadata={"format": "pt"})
    return path


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run(*arguments) == 0
    return capsys.readouterr().out


def pruned_here(model: Path, out: Path) -> Tensors:
    assert run("prune", model, "-o", out, *HALF) == 0
    return load_file(out)


def same(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(
        np.array_equal(tensor, right[name]) for name, tensor in left.items()
    )


def test_put_keep_get_and_rm(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = pruned_here(model, tmp_path / "expected.safetensors")
    capsys.readouterr()
    name = shown(capsys, "checkpoints", "put", model).strip()
    *_, last = shown(capsys, "prune", name, "--keep", *HALF).splitlines()
    kept = last.removeprefix("kept as ")
    names = [c["name"] for c in json.loads(shown(capsys, "checkpoints", "ls", "--json"))]
    assert names[:2] == [kept, name]
    assert shown(capsys, "checkpoints", "get", kept, "-o", tmp_path / "o.safetensors") == ""
    assert same(load_file(tmp_path / "o.safetensors"), expected)
    run("checkpoints", "get", name, "-o", tmp_path / "same.safetensors")
    assert (tmp_path / "same.safetensors").read_bytes() == model.read_bytes()
    assert shown(capsys, "checkpoints", "rm", name, kept) == ""
    assert not {name, kept} & set(shown(capsys, "checkpoints", "ls").split())
    assert name in failure(capsys, "checkpoints", "rm", name)


def test_the_error_for_a_missing_checkpoint_has_possible_reasons(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, out = "checkpoints/nope", tmp_path / "o.safetensors"
    for command in (
        ("checkpoints", "get", name, "-o", out),
        ("checkpoints", "rm", name),
        ("prune", name, "-o", out, *HALF),
        ("report", name),
    ):
        said = failure(capsys, *command)
        assert "may have been deleted, evicted or expired, or belong to another token" in said


def test_a_quiet_prune_prints_the_name_of_its_checkpoint(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (kept,) = shown(capsys, "prune", model, "--keep", "--quiet", *HALF).splitlines()
    masks = ("-o", tmp_path / "masks.safetensors", "--output", "masks")
    assert shown(capsys, "checkpoints", "get", kept, *masks) == ""
    assert "fc.weight" in load_file(tmp_path / "masks.safetensors")


def test_masks_of_an_unpruned_checkpoint_are_an_error(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = shown(capsys, "checkpoints", "put", model).strip()
    masks = ("-o", tmp_path / "masks.safetensors", "--output", "masks")
    assert f"{name} has no masks" in failure(capsys, "checkpoints", "get", name, *masks)


@pytest.mark.parametrize("output", ["dense", "reparametrized", "masks"])
def test_a_checkpoint_is_pruned_to_a_file(
    output: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = shown(capsys, "checkpoints", "put", model).strip()
    here, there = tmp_path / "here.safetensors", tmp_path / "there.safetensors"
    report = shown(capsys, "prune", model, "-o", here, "--output", output, *HALF)
    expected = report.replace(str(here)[: -len(here.suffix)], str(there)[: -len(there.suffix)])
    assert shown(capsys, "prune", name, "-o", there, "--output", output, *HALF) == expected
    assert same(load_file(there), load_file(here))


def test_a_table_of_checkpoints(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = shown(capsys, "checkpoints", "put", model).strip()
    head, first, *_ = shown(capsys, "checkpoints", "ls").splitlines()
    assert head.split() == ["name", "model", "created", "size", "masks", "expires"]
    assert first.split()[:2] == [name, model.name]
    assert first.split()[-2:] == ["-", "never"]
    assert f"{model.stat().st_size} B" in first


def test_uris_in_and_out(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = pruned_here(model, tmp_path / "expected.safetensors")
    source, target = f"file://{model}", f"file://{folder}/out.safetensors"
    assert run("prune", source, "-o", target, *HALF) == 0
    assert same(load_file(folder / "out.safetensors"), expected)
    assert run("prune", source, "-o", tmp_path / "down.safetensors", *HALF) == 0
    assert same(load_file(tmp_path / "down.safetensors"), expected)
    assert b'"format":"pt"' in (tmp_path / "down.safetensors").read_bytes()[:200]
    assert run("prune", model, "-o", target, "--output", "reparametrized", *HALF) == 0
    assert run("finalize", target, "-o", f"file://{folder}/final.safetensors") == 0
    assert same(load_file(folder / "final.safetensors"), expected)
    capsys.readouterr()
    assert "50.00%" not in shown(capsys, "report", source)
    assert "--allow-path" in failure(capsys, "report", f"file://{tmp_path}/down.safetensors")


def test_a_token_has_checkpoints_of_its_own(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = shown(capsys, "checkpoints", "put", model, "--token", "mine").strip()
    assert name in shown(capsys, "checkpoints", "ls", "--token", "mine")
    assert name not in shown(capsys, "checkpoints", "ls")
    assert name in failure(capsys, "report", name)
    monkeypatch.setenv("SECATEUR_TOKEN", "mine")
    assert "conv.weight" in shown(capsys, "report", name)


def test_commands_that_need_a_server_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SECATEUR_SERVER", raising=False)
    save_file(WEIGHTS, tmp_path / "m.safetensors")
    for arguments in (["checkpoints", "ls"], ["prune", tmp_path / "m.safetensors", "--keep"]):
        more = HALF if "prune" in arguments else ()
        assert "SECATEUR_SERVER" in failure(capsys, *arguments, *more)
    for command in ("report", "finalize", "prune"):
        more = HALF if command == "prune" else ()
        out = () if command == "report" else ("-o", tmp_path / "o.safetensors")
        assert "SECATEUR_SERVER" in failure(capsys, command, "checkpoints/x", *out, *more)


def test_a_file_in_a_folder_of_that_name_is_a_file(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = shown(capsys, "checkpoints", "put", model).strip()
    monkeypatch.chdir(tmp_path)
    Path("checkpoints").mkdir()
    save_file({"mine": WEIGHTS["fc.weight"]}, "checkpoints/model.safetensors")
    assert "mine" in shown(capsys, "report", "checkpoints/model.safetensors")
    assert "fc.weight" in shown(capsys, "report", name)


def test_a_wrong_name_deletes_nothing(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = shown(capsys, "checkpoints", "put", model).strip()
    for names in ((name, "checkpoints/wrong"), ("checkpoints/wrong", name)):
        assert "checkpoints/wrong" in failure(capsys, "checkpoints", "rm", *names)
        assert name in shown(capsys, "checkpoints", "ls")
    assert shown(capsys, "checkpoints", "rm", name, name) == ""
    assert name not in shown(capsys, "checkpoints", "ls")


def test_a_checkpoint_is_not_put_again(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = shown(capsys, "checkpoints", "put", model).strip()
    assert "on the server already" in failure(capsys, "checkpoints", "put", name)


def test_a_terminal_shows_how_far_the_server_is(folder: Path, own_server: RunningServer) -> None:
    """A file that takes longer than the server waits before it tells of progress."""
    model = {f"{number}.weight": np.ones((1000, 5000), np.float32) for number in range(10)}
    save_file(model, folder / "large.safetensors")
    source, target = (f"file://{folder}/{name}.safetensors" for name in ("large", "larger"))
    text = on_a_terminal(own_server, "prune", source, "-o", target, *HALF)
    assert "server" in text
    assert "%" in text
    assert "upload" not in text


def test_a_report_of_a_uri_shows_no_upload(model: Path, own_server: RunningServer) -> None:
    assert on_a_terminal(own_server, "report", f"file://{model}") == ""
    assert "upload" in on_a_terminal(own_server, "report", str(model))


def on_a_terminal(server: RunningServer, *arguments: str) -> str:
    """The output of a successful command on stderr, which is a terminal."""
    shell, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    command = [str(Path(sys.executable).with_name("secateur")), *arguments]
    command += ["--server", server.address]
    ended = subprocess.run(command, stderr=terminal, stdout=subprocess.PIPE, timeout=300)
    os.write(terminal, b".")  # the read below must not block
    text = os.read(shell, 1 << 16).decode()
    os.close(terminal)
    os.close(shell)
    assert ended.returncode == 0
    return text.removesuffix(".")


def test_an_embedded_server_opens_what_its_user_can(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "m.safetensors")
    with secateur.embedded() as client:
        report = client.report(f"file://{tmp_path}/m.safetensors")
    assert report.total == sum(w.size for n, w in WEIGHTS.items() if n != "steps")
