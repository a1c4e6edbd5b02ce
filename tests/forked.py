"""Servers in their own processes that start fast.

Each is forked from a process that has imported the server and runs no threads of Python. It is the
command secateur-server without the warm-up.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from threading import Lock
from typing import Any, NoReturn

# Variables that only a new process reads. Each combination of values has its own parent.
READ_AT_START = ("LD_PRELOAD", "PYTHONPATH")


class Parent:
    """The process that forks servers, and collects their exit statuses."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self._process.communicate)

    def ask(self, **question: Any) -> Any:
        """Sends a question to `_main`, and returns its answer."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with self._lock:
            print(json.dumps(question), file=stdin, flush=True)
            answer = stdout.readline()
        assert answer, "the process that forks servers has ended"
        return json.loads(answer)


@cache
def _parent(*read_at_start: str | None) -> Parent:
    """Starts the parent when a test first needs a server."""
    return Parent()


class ForkedProcess:
    """A forked server with the methods of subprocess.Popen that tests use."""

    def __init__(self, options: list[str], log: Path) -> None:
        self.returncode: int | None = None
        self._parent = _parent(*map(os.environ.get, READ_AT_START))
        self.pid: int = self._parent.ask(
            options=options, log=str(log), folder=os.getcwd(), environment=dict(os.environ)
        )

    def poll(self) -> int | None:
        """Returns the exit status, or None while the process runs."""
        if self.returncode is None:
            self.returncode = self._parent.ask(ended=self.pid)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kills the process."""
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Waits until the process ends, and returns the exit status."""
        from tests.conftest import PATIENCE, eventually

        eventually(lambda: self.poll() is None, False, timeout or PATIENCE)
        assert self.returncode is not None
        return self.returncode


def _serve(
    run: Callable[[], NoReturn],
    options: list[str],
    log: str,
    folder: str,
    environment: Mapping[str, str],
) -> NoReturn:
    with open(log, "wb") as stderr:
        os.dup2(stderr.fileno(), sys.stderr.fileno())
    nothing = os.open(os.devnull, os.O_RDWR)
    for pipe in (sys.stdin, sys.stdout):  # they belong to the parent
        os.dup2(nothing, pipe.fileno())
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv[1:] = options
    run()


def _main() -> None:
    """Answers each line of stdin: forks a server, or returns the exit status of one."""
    from secateur_server import __main__ as command  # its import configures the process

    cold = partial(command.App, is_warm=False)  # type: ignore[attr-defined]
    command.App = cold  # type: ignore[attr-defined, assignment]
    for line in sys.stdin:
        question = json.loads(line)
        if "ended" in question:
            pid, status = os.waitpid(question["ended"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                _serve(command.run, **question)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _main()
