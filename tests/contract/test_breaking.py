"""The .proto files are compatible with the last release: buf compares them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROTOS = Path("protos")
REPORT = "secateur/v1/report.proto"


@pytest.fixture
def protos_copy(tmp_path: Path) -> Path:
    """A copy of the .proto files, for a test to change."""
    shutil.copy(PROTOS / "buf.yaml", tmp_path)
    shutil.copytree(PROTOS / "secateur", tmp_path / "secateur")
    return tmp_path


def breaking(protos: Path) -> subprocess.CompletedProcess[str]:
    """Runs buf, which compares .proto files with the last release."""
    buf = Path(sys.executable).with_name("buf")
    command = [str(buf), "breaking", str(protos), "--against", "protos/released.binpb"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def replace(protos: Path, old: str, new: str) -> None:
    text = (protos / REPORT).read_text()
    assert old in text
    (protos / REPORT).write_text(text.replace(old, new, 1))


def test_the_contract_is_compatible_with_the_last_release() -> None:
    ended = breaking(PROTOS)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("new", "says"),
    [
        ("float sparsity = 4;", "changed type"),
        ("double sparseness = 4;", "changed name"),
        ("double sparsity = 11;", "deleted"),
        ("", "deleted"),
    ],
)
def test_a_changed_field_is_reported(protos_copy: Path, new: str, says: str) -> None:
    replace(protos_copy, "double sparsity = 4;", new)
    ended = breaking(protos_copy)
    assert ended.returncode != 0
    assert says in ended.stdout
    assert '"sparsity"' in ended.stdout
    assert '"SparsityReport"' in ended.stdout


def test_a_message_in_another_file_is_reported(protos_copy: Path) -> None:
    """Includes of C++ and imports of Python would break."""
    before, message, behind = (protos_copy / REPORT).read_text().partition("message Choice {")
    package = "package secateur.v1;"
    plan, report = protos_copy / "secateur/v1/plan.proto", 'import "secateur/v1/report.proto";'
    plan.write_text(plan.read_text().replace(report, f'{report} import "choice.proto";'))
    (protos_copy / REPORT).write_text(before.replace(package, f'{package} import "choice.proto";'))
    (protos_copy / "choice.proto").write_text(f'syntax = "proto3"; {package} {message}{behind}')
    ended = breaking(protos_copy)
    assert ended.returncode != 0
    assert 'message "Choice" was deleted from file' in ended.stdout


def test_a_new_field_is_compatible(protos_copy: Path) -> None:
    replace(protos_copy, "double sparsity = 4;", "double sparsity = 4; bool is_new = 1000;")
    assert breaking(protos_copy).returncode == 0
