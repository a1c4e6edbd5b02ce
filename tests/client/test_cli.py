"""The command, as a user types it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file, save_file

from secateur import cli
from tests.conftest import RunningServer

WEIGHTS: dict[str, npt.NDArray[Any]] = {
    "conv.weight": np.arange(1, 25, dtype=np.float32).reshape(4, 1, 3, 2),
    "fc.weight": -np.arange(25, 37, dtype=np.float32).reshape(3, 4),
    "fc.bias": np.arange(1, 4, dtype=np.float32),
    "steps": np.array([7], np.int64),
}


@pytest.fixture
def model(tmp_path: Path, server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's file; commands without --server go to the tests' server."""
    monkeypatch.setenv("SECATEUR_SERVER", server.address)
    path = tmp_path / "model.safetensors"
    save_file(WEIGHTS, path, metadata={"format": "pt"})
    return path


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command that fails says: one line, with exit status 1, and no half-written file."""
    out = Path(str(arguments[arguments.index("-o") + 1])) if "-o" in arguments else None
    before = set(out.parent.iterdir()) if out and out.parent.is_dir() else None
    assert run(*arguments) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("secateur: ")
    assert shown.err.count("\n") == 1
    if out and before is not None:
        assert set(out.parent.iterdir()) == before
    return shown.err


def test_prune_writes_zeros_and_prints_the_report(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = model.with_name("out.safetensors")
    assert run("prune", model, "-o", out, "--method", "l1_unstructured", "--amount", "0.5") == 0
    pruned = load_file(out)
    assert list(pruned) == list(load_file(model))
    large = WEIGHTS["conv.weight"] > 12
    assert (pruned["conv.weight"] == WEIGHTS["conv.weight"] * large).all()
    assert (pruned["fc.bias"] == WEIGHTS["fc.bias"]).all()  # one dimension: not pruned by default
    assert (pruned["steps"] == WEIGHTS["steps"]).all()
    assert "total" in capsys.readouterr().out
    assert b'"format":"pt"' in out.read_bytes()[:200]  # other libraries ask for it


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_torch_files_are_read_and_written(model: Path, suffix: str) -> None:
    source, out = model.with_name("in.pth"), model.with_name(f"out{suffix}")
    torch.save({name: torch.from_numpy(array) for name, array in WEIGHTS.items()}, source)
    assert run(*("prune", source, "-o", out, "--method", "identity", "--tensors", "fc.*")) == 0
    if suffix == ".safetensors":
        found = {name: torch.from_numpy(array) for name, array in load_file(out).items()}
    else:
        found = torch.load(out, weights_only=True)
    assert all(torch.equal(found[name], torch.from_numpy(WEIGHTS[name])) for name in WEIGHTS)


def test_reparametrize_then_finalize(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs, final = model.with_name("pairs.safetensors"), model.with_name("final.safetensors")
    arguments = ["--method", "ln_structured", "--amount", "1", "--n", "2", "--dim", "-1"]
    arguments += ["--tensors", "fc.weight", "--output", "reparametrized"]
    assert run("prune", model, "-o", pairs, *arguments) == 0
    assert "fc.weight_mask" in load_file(pairs)
    assert run("finalize", pairs, "-o", final) == 0
    assert load_file(final)["fc.weight"].tolist() == [
        [0, -26, -27, -28],
        [0, -30, -31, -32],
        [0, -34, -35, -36],
    ]
    capsys.readouterr()
    assert run("report", final, "--json", "--tensors", "fc.weight") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["zeros"], report["total"]) == (3, 12)
    assert report["tensors"]["fc.weight"]["zero_slices"] == [0, 1]


SPEC = {
    "rules": [
        {"method": "l1_unstructured", "tensors": "conv.*", "amount": 0.5},
        {"method": "ln_structured", "tensors": ["fc.weight"], "amount": 2, "n": "fro", "dim": 0},
    ]
}
SPEC_YAML = """
rules:
  - {method: l1_unstructured, tensors: "conv.*", amount: 0.5}
  - method: ln_structured
    tensors: [fc.weight]
    amount: 2
    n: fro
    dim: 0
"""


@pytest.mark.parametrize(
    ("name", "text"), [("s.json", json.dumps(SPEC)), ("s.yaml", SPEC_YAML), ("s.yml", SPEC_YAML)]
)
def test_a_spec_comes_from_a_file(model: Path, name: str, text: str) -> None:
    model.with_name(name).write_text(text)
    out = model.with_name("out.safetensors")
    assert run("prune", model, "-o", out, "--spec", model.with_name(name)) == 0
    found = load_file(out)
    assert (found["conv.weight"] == 0).sum() == 12
    assert (found["fc.weight"] == 0).all(1).tolist() == [True, True, False]


def test_errors_are_one_line(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = model.with_name("out.safetensors")
    half = ["--method", "l1_unstructured", "--amount", "0.5"]

    def fails(*arguments: object) -> str:
        return failure(capsys, "prune", *arguments)

    assert "no such file" in fails(model.with_name("x.safetensors"), "-o", out, *half).lower()
    assert "nearest: 'fc.weight'" in fails(model, "-o", out, *half, "--tensors", "fc.wight")
    assert "neither .safetensors" in fails(model, "-o", model.with_name("o.bin"), *half)
    assert "no such folder" in fails(model, "-o", model.parent / "x/o.pt", *half)
    assert "amount: 1.5" in fails(model, "-o", out, "--method=l1_unstructured", "--amount=1.5")
    assert "missing" in fails(model, "-o", out, "--method", "l1_unstructured")
    assert "unexpected" in fails(model, "-o", out, *half, "--dim", "0")
    assert "s.json" in fails(model, "-o", out, "--spec", model.with_name("s.json"))
    broken = model.with_name("broken.safetensors")
    broken.write_bytes(model.read_bytes()[:-1])
    assert "broken.safetensors" in fails(broken, "-o", out, *half)
    assert "127.0.0.1:1" in fails(model, "-o", out, *half, "--server", "127.0.0.1:1")


@pytest.mark.parametrize("text", ["{", "rules: [", "[]", "rules: []", "rules: [{method: x}]", "7"])
@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_broken_spec_is_one_line(
    model: Path, text: str, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = model.with_name(f"spec.{suffix}")
    spec.write_text(text)
    said = failure(capsys, "prune", model, "-o", model.with_name("out.pt"), "--spec", spec)
    assert str(spec) in said


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["prune", "m.pt"],
        ["prune", "m.pt", "-o", "o.pt"],
        ["prune", "m.pt", "--method", "identity"],
        ["prune", "m.pt", "-o", "o.pt", "--method", "magic"],
        ["prune", "m.pt", "-o", "o.pt", "--method", "identity", "--spec", "s.json"],
        ["prune", "m.pt", "-o", "o.pt", "--method", "identity", "--amount", "half"],
        ["report"],
        ["finalize", "m.pt"],
    ],
)
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2


def test_a_failed_command_leaves_the_old_file(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = model.with_name("out.safetensors")
    out.write_bytes(b"before")
    failure(capsys, *("finalize", model, "-o", out, "--tensors", "nothing"))
    assert out.read_bytes() == b"before"


def test_without_a_server_one_is_embedded(model: Path) -> None:
    """The installed command, in a process of its own."""
    command = [str(Path(sys.executable).with_name("secateur")), "report", str(model)]
    environment = {k: v for k, v in os.environ.items() if k != "SECATEUR_SERVER"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "0.00%" in ended.stdout.splitlines()[-1]
