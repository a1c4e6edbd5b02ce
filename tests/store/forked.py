"""Servers in processes of their own that start in a moment: tests that kill many need that.

Each is forked from a process that has imported the server and does nothing else. It does not warm
up; beside that it is the command `secateur-server`.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from secateur_server import __main__ as command
from secateur_server.app import App
from tests.conftest import SERVER_OPTIONS, RunningServer, eventually, started

StartServer = Callable[..., RunningServer]


class Process:
    """A forked server, with the methods of subprocess.Popen that tests use."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def poll(self) -> int | None:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return -signal.SIGKILL
        return None

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> None:
        eventually(lambda: self.poll() is None, False)


@contextmanager
def forked_servers() -> Iterator[StartServer]:
    """Yields: what starts a server, as start_server does. Kills those that run at the end."""
    processes: list[Process] = []
    with subprocess.Popen(
        [sys.executable, "-m", "tests.store.forked"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:

        def start(*options: str) -> RunningServer:
            assert parent.stdin is not None
            assert parent.stdout is not None
            log = Path(tempfile.mkdtemp(prefix="secateur-test-")) / "log"
            log.touch()
            print(json.dumps([str(log), *SERVER_OPTIONS, *options]), file=parent.stdin, flush=True)
            process: Any = Process(int(parent.stdout.readline()))
            processes.append(process)
            return started(process, log)

        try:
            yield start
        finally:
            for process in processes:
                process.kill()


def _serve(log: str, options: list[str]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(os.open(log, os.O_WRONLY), sys.stderr.fileno())
    sys.argv[1:] = options
    command.run()


def _main() -> None:
    """Forks a server for each line of stdin, and answers with the process's id."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that end
    command.App = partial(App, is_warm=False)  # type: ignore[assignment, attr-defined]
    for line in sys.stdin:
        log, *options = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _serve(log, options)
        print(pid, flush=True)


if __name__ == "__main__":
    _main()
