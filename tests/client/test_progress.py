"""A bar for uploads: on a terminal, and nowhere else."""

import os
import pty
import subprocess
import sys
import termios

import numpy as np
import pytest

import secateur
from tests.client.both import both
from tests.conftest import RunningServer

UPLOAD = """
import sys, numpy, secateur
secateur.Client(sys.argv[1]).report({"w": numpy.zeros(1_000_000)})
"""


@both
def test_a_function_gets_the_bytes_sent_and_their_total(
    server: RunningServer, kind: type[secateur.Client]
) -> None:
    seen: list[tuple[int, int]] = []
    with kind(server.address, timeout=300) as client:
        client.report({"w": np.zeros(1_000_000)}, progress=lambda *shown: seen.append(shown))
    total = seen[0][1]
    assert total > 8_000_000
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert {of for _, of in seen} == {total}
    assert seen[-1] == (total, total)


@pytest.mark.parametrize("mine", [KeyError("mine"), SystemExit("mine"), KeyboardInterrupt("mine")])
def test_every_error_of_a_function_ends_the_call(
    client: secateur.Client, mine: BaseException
) -> None:
    """gRPC makes messages in a thread, which a SystemExit ends silently."""

    def fail(done: int, total: int) -> None:
        raise mine

    for method in (client.report, client.finalize, client.upload):
        with pytest.raises(type(mine), match="mine"):
            method({"w": np.zeros(1_000_000)}, progress=fail)


def test_a_terminal_shows_a_bar(server: RunningServer) -> None:
    shell, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    command = [sys.executable, "-c", UPLOAD, server.address]
    ended = subprocess.run(command, stderr=terminal, timeout=300)
    shown = os.read(shell, 1 << 16).decode()
    os.close(terminal)
    os.close(shell)
    assert ended.returncode == 0
    assert "upload" in shown
    assert "8.00M" in shown


def test_a_pipe_shows_nothing(server: RunningServer) -> None:
    command = [sys.executable, "-c", UPLOAD, server.address]
    ended = subprocess.run(command, capture_output=True, timeout=300)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"", b"")


def test_false_shows_nothing_and_true_shows_a_bar_anywhere(server: RunningServer) -> None:
    for progress in ("False", "True"):
        code = UPLOAD.replace("1_000_000)}", f"1_000_000)}}, progress={progress}")
        command = [sys.executable, "-c", code, server.address]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, ended.stderr
        assert ("upload" in ended.stderr) == (progress == "True")
