"""Programs made for the last release of the .proto files go on working: buf compares."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROTOS = Path("protos")
REPORT = "secateur/v1/report.proto"


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """A copy of the .proto files, to be changed."""
    shutil.copy(PROTOS / "buf.yaml", tmp_path)
    shutil.copytree(PROTOS / "secateur", tmp_path / "secateur")
    return tmp_path


def breaking(protos: Path) -> subprocess.CompletedProcess[str]:
    """What buf says of .proto files, measured on the last release."""
    buf = Path(sys.executable).with_name("buf")
    command = [str(buf), "breaking", str(protos), "--against", "protos/released.binpb"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def replace(protos: Path, old: str, new: str) -> None:
    text = (protos / REPORT).read_text()
    assert old in text
    (protos / REPORT).write_text(text.replace(old, new, 1))


def test_the_contract_breaks_no_program_of_the_last_release() -> None:
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
def test_a_field_that_changed_is_named(changed: Path, new: str, says: str) -> None:
    replace(changed, "double sparsity = 4;", new)
    ended = breaking(changed)
    assert ended.returncode != 0
    assert says in ended.stdout
    assert '"sparsity"' in ended.stdout
    assert '"SparsityReport"' in ended.stdout


def test_no_message_moves_to_another_file(changed: Path) -> None:
    """Its generated code would be elsewhere: an include of C++, an import of Python."""
    before, message, behind = (changed / REPORT).read_text().partition("message Choice {")
    package = "package secateur.v1;"
    plan, report = changed / "secateur/v1/plan.proto", 'import "secateur/v1/report.proto";'
    plan.write_text(plan.read_text().replace(report, f'{report} import "choice.proto";'))
    (changed / REPORT).write_text(before.replace(package, f'{package} import "choice.proto";'))
    (changed / "choice.proto").write_text(f'syntax = "proto3"; {package} {message}{behind}')
    ended = breaking(changed)
    assert ended.returncode != 0
    assert 'message "Choice" was deleted from file' in ended.stdout


def test_a_new_field_breaks_nothing(changed: Path) -> None:
    replace(changed, "double sparsity = 4;", "double sparsity = 4; bool is_new = 1000;")
    assert breaking(changed).returncode == 0
