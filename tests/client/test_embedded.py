"""The embedded server: its errors if it cannot start."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import secateur
from tests.conftest import PATIENCE


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:999", r"'cuda:999': torch \S+ sees \d+ CUDA devices"),
        ("gpu", "'gpu' is not one of auto, cpu, cuda, cuda:N"),
        ("", "'' is not one of"),
        ("--help", "'--help' is not one of"),
        (5, "'5' is not one of"),
    ],
)
def test_a_missing_device_is_one_error_and_nothing_is_printed(
    capfd: pytest.CaptureFixture[str], device: str, message: str
) -> None:
    with (
        pytest.raises(secateur.SecateurError, match=f"does not start: .*{message}") as raised,
        secateur.embedded(device=device),
    ):
        pass
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_a_socket_that_cannot_be_made_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of a Unix socket has 107 bytes at most."""
    deep = tmp_path / ("d" * 107)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(secateur.SecateurError, match="cannot listen at unix:"), secateur.embedded():
        pass
    assert not list(deep.iterdir())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(secateur.SecateurError, match=r"absent.*No such file"), secateur.embedded():
        pass


def test_a_wrong_timeout_is_refused() -> None:
    with pytest.raises(secateur.SecateurError, match="timeout="), secateur.embedded(timeout=-1):
        pass


def test_a_process_that_never_ends_the_block_exits_and_leaves_no_files(tmp_path: Path) -> None:
    never_ended = """
import numpy, secateur
server = secateur.embedded()
print(server.__enter__().report({"a": numpy.ones(3)}).total)
"""
    ended = subprocess.run(
        [sys.executable, "-c", never_ended],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "3\n", "")
    assert not list(tmp_path.iterdir())
