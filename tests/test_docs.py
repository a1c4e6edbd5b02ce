"""The examples of the documentation run against a real server, and its links resolve."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from secateur import Spec
from tests.conftest import RunningServer

PAGES = sorted(map(str, (*Path().glob("*.md"), *Path("docs").rglob("*.md"))))


def blocks(path: str, language: str) -> list[str]:
    found = re.findall(rf"```{language}\n(.*?)```", Path(path).read_text(), re.DOTALL)
    assert found, f"{path} has no {language}"
    return found


def anchors(path: Path) -> set[str]:
    """Returns the fragments of the headings of a page, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


# A page whose example prunes MiniLM, in 20 seconds.
SLOW = ("docs/calibration.md",)
OWN_TEST = ("docs/tutorial.md",)  # test_tutorial.py
WITH_PYTHON = [
    pytest.param(path, marks=[pytest.mark.slow] if path in SLOW else [])
    for path in PAGES
    if "```python\n" in Path(path).read_text() and path not in OWN_TEST
]


@pytest.mark.parametrize("path", WITH_PYTHON)
def test_the_python_of_a_page_runs(
    path: str, server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs in this process, which has imported torch."""
    code = "\n".join(blocks(path, "python")).replace("localhost:50051", server.address)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, path, "exec"), {"__name__": "__main__"})


def test_the_commands_of_the_readme_run(
    server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_SERVER", server.address)
    save_file({"fc.weight": np.ones((4, 4), np.float32)}, tmp_path / "model.safetensors")
    commands = re.findall(r"^\$ (secateur .*)$", "\n".join(blocks("README.md", "console")), re.M)
    assert len(commands) == 3
    _, reported, planned = [run(command, tmp_path) for command in commands]
    assert "50.00%" in reported
    assert "50.00%" in planned


def run(command: str, folder: Path) -> str:
    program, *arguments = shlex.split(command)
    full = [str(Path(sys.executable).with_name(program)), *arguments]
    ended = subprocess.run(full, cwd=folder, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_commands_on_checkpoints_run(
    server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_SERVER", server.address)
    monkeypatch.setenv("SECATEUR_TOKEN", "a reader of the documents")
    save_file({"fc.weight": np.ones((4, 4), np.float32)}, tmp_path / "model.safetensors")
    put, *others = blocks("docs/checkpoints.md", "console")[0].splitlines()
    name = run(put.removeprefix("$ "), tmp_path).strip()
    shown = [run(o.removeprefix("$ ").replace("checkpoints/NAME", name), tmp_path) for o in others]
    assert len(shown) == 4
    assert name in shown[0]
    assert "50.00%" in shown[1]
    assert (load_file(tmp_path / "pruned.safetensors")["fc.weight"] == 1).all()  # by its own name


def test_the_example_of_a_uri_runs(tmp_path: Path) -> None:
    """Uses an embedded server, which may open what its user may open."""
    save_file({"fc.weight": np.ones((4, 4), np.float32)}, tmp_path / "in.safetensors")
    examples = [block.removeprefix("$ ") for block in blocks("docs/checkpoints.md", "console")]
    (command,) = (example for example in examples if example.startswith("secateur prune file://"))
    assert "50.00%" in run(command.replace("/models", str(tmp_path)), tmp_path)
    assert (load_file(tmp_path / "out.safetensors")["fc.weight"] == 0).sum() == 8


def test_the_example_of_a_folder_runs(
    server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_SERVER", server.address)
    (tmp_path / "folder").mkdir()
    save_file({"w": np.ones((4, 4), np.float32)}, tmp_path / "folder/model.safetensors")
    (tmp_path / "folder/config.json").write_text("{}")
    (command,) = blocks("docs/sources.md", "console")
    assert "50.00%" in run(command.removeprefix("$ "), tmp_path)
    assert (tmp_path / "pruned/config.json").read_text() == "{}"


def test_the_commands_on_packed_files_run(tmp_path: Path) -> None:
    weights = np.arange(1000, dtype=np.float32).reshape(10, 100) % 9
    save_file({"fc.weight": weights}, tmp_path / "pruned.safetensors")
    commands = blocks("docs/packed.md", "console")[0].splitlines()
    shown = [run(command.removeprefix("$ "), tmp_path) for command in commands]
    assert "fc.weight" in shown[1]
    assert (tmp_path / "packed.safetensors").stat().st_size < 4000
    assert (load_file(tmp_path / "dense.safetensors")["fc.weight"] == weights).all()


def test_the_page_of_the_command_is_whole(
    server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commands run, and it names each command; those of doctor are in test_doctor.py."""
    from secateur.cli.command import COMMANDS

    monkeypatch.setenv("SECATEUR_SERVER", server.address)
    text = Path("docs/command.md").read_text()
    assert all(f"| `secateur {name}" in text for name in COMMANDS)
    weights = np.arange(10_000, dtype=np.float32).reshape(100, 100)
    save_file({"fc.weight": weights}, tmp_path / "model.safetensors")
    first, piped, _ = blocks("docs/command.md", "console")
    prune, report, pack, _ = first.splitlines()
    shown = [run(command.removeprefix("$ "), tmp_path) for command in (prune, report, pack)]
    assert "50.00%" in shown[1]
    whole = (tmp_path / "pruned.safetensors").stat().st_size
    assert (tmp_path / "small.safetensors").stat().st_size < whole / 2
    shell = ["bash", "-o", "pipefail", "-c", piped.removeprefix("$ ")]
    folder = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    subprocess.run(shell, cwd=tmp_path, env={**os.environ, "PATH": folder}, check=True)
    assert (tmp_path / "small.safetensors").stat().st_size < whole / 3


def test_the_example_of_a_spec_file_is_valid() -> None:
    (text,) = blocks("docs/specs.md", "yaml")
    assert len(Spec.from_dict(yaml.safe_load(text)).rules) == 2


def test_every_method_is_documented() -> None:
    from secateur.spec import METHODS

    documented = set(re.findall(r"^\| `(\w+)\(", Path("docs/specs.md").read_text(), re.M))
    assert documented == set(METHODS)


@pytest.mark.parametrize("path", [path for path in PAGES if path.startswith("docs/")])
def test_a_page_begins_with_an_example(path: str) -> None:
    beginning, *_ = Path(path).read_text().split("\n## ")
    assert "\n```" in beginning


def test_every_folder_of_the_server_is_in_the_architecture() -> None:
    text = Path("docs/architecture.md").read_text()
    listed = re.findall(r"^\| `\.\.\./(\w+)/` \|", text, re.MULTILINE)
    folders = Path("server/secateur_server").glob("*/__init__.py")
    assert sorted(listed) == sorted(path.parent.name for path in folders)


@pytest.mark.parametrize("path", PAGES)
def test_links_resolve(path: str) -> None:
    text = re.sub(r"```.*?```", "", Path(path).read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^):]+)\)", text):
        name, _, fragment = target.partition("#")
        linked = Path(path).parent / name if name else Path(path)
        assert linked.exists(), target
        assert not fragment or fragment in anchors(linked), target


@pytest.mark.parametrize("path", PAGES)
def test_external_links_are_well_formed(path: str) -> None:
    """Nothing is fetched. `make docs` checks the links within the documentation."""
    for target in re.findall(r"\]\((\w+:[^)]*)\)", Path(path).read_text()):
        parts = urlsplit(target)
        assert parts.scheme == "https", target
        assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc), target
        assert not re.search(r"\s", target), target


def test_each_package_is_typed_and_licensed() -> None:
    """The wheel holds every file of these folders, and the license files."""
    project = tomllib.loads(Path("pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert [package for package in packages if not Path(package, "py.typed").exists()] == []
    assert project["project"]["license"] == "Apache-2.0"
    for path in project["project"]["license-files"]:
        assert "Apache License" in Path(path).read_text()
        assert f"!{path}" in Path(".dockerignore").read_text().splitlines()


def test_pages_install_secateur_only_from_a_checkout_or_a_wheel() -> None:
    """It is not on a package index."""
    pages = [*map(Path, PAGES), *Path("deploy/systemd").iterdir()]
    found = {
        wanted
        for page in pages
        for wanted in re.findall(r"pip install[^`\n]*?'?(secateur\b[^`'\n]*)", page.read_text())
    }
    assert found == {"secateur[EXTRA]"} | {w for w in found if w.startswith("secateur-0.1.0-py3")}
