"""The unit of systemd, checked by systemd itself."""

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.conftest import RunningServer
from tests.deploy.options import variables
from tests.processes import thread_ids

FOLDER = Path("deploy/systemd")
UNIT = (FOLDER / "secateur.service").read_text()

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="no systemd-analyze: make system"
)


def settings() -> Mapping[str, str]:
    return dict(re.findall(r"^(\w+)=(.*)$", UNIT, re.MULTILINE))


@pytest.fixture
def unit(tmp_path: Path) -> str:
    """The unit with the path of the server that is installed here."""
    program = str(Path(sys.executable).with_name("secateur-server"))
    text = UNIT.replace("/opt/secateur/bin/secateur-server", program)
    (tmp_path / "secateur.service").write_text(text)
    return str(tmp_path / "secateur.service")


@needs_systemd
def test_systemd_accepts_the_unit(unit: str) -> None:
    ended = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout + ended.stderr) == (0, "")


@needs_systemd
def test_systemd_rates_the_unit_as_secure(unit: str) -> None:
    """The exposure is 2.5 of 10; a unit without restrictions has 9.6."""
    command = ["systemd-analyze", "security", "--offline=yes", "--threshold=25", unit]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@needs_systemd
def test_systemd_accepts_the_user() -> None:
    path = str((FOLDER / "secateur.sysusers.conf").resolve())
    ended = subprocess.run(["systemd-sysusers", "--dry-run", path], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_the_unit_stops_the_server_gracefully() -> None:
    found = settings()
    assert found["KillSignal"] == "SIGTERM"
    assert int(found["TimeoutStopSec"]) >= 30 + 10  # --drain-timeout's default
    assert found["Restart"] == "on-failure"


def test_the_unit_allows_twice_the_threads_that_a_server_starts(server: RunningServer) -> None:
    threads = len(thread_ids(server.process.pid))
    assert threads > 400  # the server starts all threads in advance
    assert int(settings()["TasksMax"]) >= 2 * threads


def test_the_variables_of_the_unit_are_options() -> None:
    text = (FOLDER / "secateur.env").read_text()
    assert set(re.findall(r"SECATEUR_\w+(?==)", text)) <= variables()
    assert f"SECATEUR_STORE_DIR=/var/lib/{settings()['StateDirectory']}\n" in text
    assert "SECATEUR_INSECURE" not in text
