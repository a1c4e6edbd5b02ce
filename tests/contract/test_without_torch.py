"""The client without torch, in a process that can import every package except torch."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.conftest import RunningServer


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with links to all installed packages except torch."""
    folder = tmp_path_factory.mktemp("site")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(("torch", "functorch")):
            (folder / entry.name).symlink_to(entry)
    return folder


def run(site: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = ":".join(
        [str(site), *(str(Path(part).resolve()) for part in ("client", "server", "protos"))]
    )
    return subprocess.run(
        [sys.executable, "-S", "-W", "error", "-c", code, *arguments],
        env={"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_import_secateur_imports_no_torch() -> None:
    code = "import sys, secateur; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code]).returncode == 0


def test_files_and_arrays_are_pruned_without_torch(
    without_torch: Path, server: RunningServer, tmp_path: Path
) -> None:
    weights = np.array([[3, -1], [2, -4]], np.float32)
    save_file({"w": weights}, tmp_path / "in.safetensors")
    code = """
import sys, numpy, secateur
address, folder = sys.argv[1:]
half = secateur.l1_unstructured("w", 0.5)
with secateur.Client(address, timeout=300) as client:
    result = client.prune(f"{folder}/in.safetensors", half)
    assert type(result.masks["w"]) is numpy.ndarray
    result.save(f"{folder}/out.safetensors")
    pairs = client.prune({"w": result.state_dict()["w"]}, half).state_dict("reparametrized")
    assert client.finalize(pairs).report.zeros == 2
try:
    secateur.Client(address).report(f"{folder}/model.pt")
except secateur.InvalidStateDict as error:
    assert "install torch" in str(error), error
else:
    raise SystemExit("a .pt file was read")
assert "torch" not in sys.modules
"""
    ended = run(without_torch, code, server.address, str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    assert load_file(tmp_path / "out.safetensors")["w"].tolist() == [[3, 0], [0, -4]]


def test_packed_files_are_read_and_written_without_torch(
    without_torch: Path, server: RunningServer, tmp_path: Path
) -> None:
    save_file({"w": np.arange(1000, dtype=np.float32)}, tmp_path / "in.safetensors")
    code = """
import sys, numpy, secateur
address, folder = sys.argv[1:]
with secateur.Client(address, timeout=300) as client:
    half = secateur.l1_unstructured("w", 0.5)
    result = client.prune(f"{folder}/in.safetensors", half, "packed")
    result.save(f"{folder}/out.safetensors", "packed")
loaded = secateur.load(f"{folder}/out.safetensors")["w"]
assert type(loaded) is numpy.ndarray
assert loaded.tolist() == [i if i >= 500 else 0 for i in range(1000)]
assert "torch" not in sys.modules
"""
    ended = run(without_torch, code, server.address, str(tmp_path))
    assert ended.returncode == 0, ended.stderr


def test_the_error_of_an_embedded_server_names_the_extra(without_torch: Path) -> None:
    code = """
import secateur
try:
    with secateur.embedded():
        pass
except secateur.SecateurError as error:
    print(error)
"""
    ended = run(without_torch, code)
    assert "needs the server's packages, and torch is missing" in ended.stdout, ended.stderr
    assert "pip install 'secateur[server]', or use a server: --server" in ended.stdout


def test_the_error_of_the_server_names_the_extra(without_torch: Path) -> None:
    """As the installed command starts it, and as `python -m` does."""
    for code in (
        "from secateur_server.__main__ import run; run()",
        "import runpy; runpy.run_module('secateur_server', run_name='__main__')",
    ):
        ended = run(without_torch, code)
        assert (ended.returncode, ended.stdout) == (1, "")
        (line,) = ended.stderr.splitlines()
        assert line.startswith("secateur-server: ")
        assert "torch" in line
        assert "pip install 'secateur[server]'" in line


def test_a_torch_file_is_refused_before_the_call(without_torch: Path, tmp_path: Path) -> None:
    """There is no server at the address, so the client does not call it."""
    save_file({"w": np.ones((2, 2), np.float32)}, tmp_path / "in.safetensors")
    code = "import sys; from secateur.cli import main; sys.exit(main(sys.argv[1:]))"
    given = [str(tmp_path / "in.safetensors"), "-o", str(tmp_path / "o.pt")]
    given += ["--server", "127.0.0.1:1"]
    half = ["--method", "l1_unstructured", "--amount", "0.5"]
    for command in (["prune", *given, *half], ["finalize", *given]):
        ended = run(without_torch, code, *command)
        assert (ended.returncode, ended.stdout) == (1, "")
        said = f"secateur: {tmp_path}/o.pt: to write .pt install torch\n"
        assert ended.stderr == said
