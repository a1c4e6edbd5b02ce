"""The command imports torch and numba only when it needs them: they take most of its time."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from secateur import cli
from secateur.cli.places import SMALL_BYTES
from tests.conftest import RunningServer

IMPORTED = """
import os, sys, secateur_command

end, os._exit = os._exit, sys.exit
try:
    secateur_command.run()
finally:
    found = {"torch", "numba", "grpc._server"} & sys.modules.keys()
    print(*sorted(found), file=sys.stderr, flush=True)
    end(0)
"""
PRUNE = ["prune", "model.safetensors", "-o", "out.safetensors"]
HALF = ["--method", "l1_unstructured", "--amount", "0.5", "--quiet"]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small model in the current folder; commands start a server of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SECATEUR_SERVER", raising=False)
    return saved(tmp_path / "model.safetensors", 1 << 10)


def saved(path: Path, columns: int) -> Path:
    weights = np.random.default_rng(0).standard_normal((8, columns), np.float32)
    save_file({"fc.weight": weights}, path)
    return path


def imported(*arguments: str) -> list[str]:
    """The packages that a command has imported at its end."""
    command = [sys.executable, "-c", IMPORTED, *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_DISABLE_JIT"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    return ended.stderr.splitlines()[-1].split()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["prune", "--help"],
        PRUNE,
        [*PRUNE, "--method", "none"],
        [*PRUNE, "--spec", "none.yaml"],
        ["prune", "model.safetensors", "-o", "none/out.safetensors", *HALF],
        ["prune", "none.safetensors", "-o", "out.safetensors", *HALF],
        ["report", "checkpoints/none"],
        ["checkpoints", "ls"],
    ],
    ids=" ".join,
)
def test_help_and_wrong_usage_import_neither_torch_nor_a_server(
    model: Path, arguments: list[str]
) -> None:
    assert imported(*arguments) == []


@pytest.mark.parametrize(
    "arguments",
    [
        *([*PRUNE, *HALF, "--output", output] for output in ("dense", "reparametrized", "masks")),
        ["report", "model.safetensors"],
        ["plan", "model.safetensors"],
    ],
    ids=" ".join,
)
def test_a_command_with_a_server_imports_no_torch(
    model: Path, server: RunningServer, arguments: list[str]
) -> None:
    assert imported(*arguments, "--server", server.address) == []
    assert Path("out.safetensors").exists() == (arguments[0] == "prune")


@pytest.mark.parametrize("package", ["click", "rich"])
def test_without_the_extra_the_command_says_what_to_install(package: str) -> None:
    code = f"import sys, secateur_command as c; sys.modules['{package}'] = None; c.run()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = "secateur: the command needs more packages: pip install 'secateur[cli]'\n"
    assert (ended.returncode, ended.stderr, ended.stdout) == (1, said, "")


def test_a_small_file_is_pruned_without_numba_to_the_same_bits(model: Path) -> None:
    assert imported(*PRUNE, *HALF) == ["grpc._server", "torch"]
    pruned = Path("out.safetensors").read_bytes()
    assert cli.main([*PRUNE, *HALF]) == 0  # in this process, with numba
    assert Path("out.safetensors").read_bytes() == pruned


def test_a_large_file_is_pruned_with_numba(model: Path) -> None:
    saved(model, SMALL_BYTES // 32 + 1)
    assert imported("report", model.name) == ["grpc._server", "numba", "torch"]
