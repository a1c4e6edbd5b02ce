"""A server is killed and started again under load: its clients continue by themselves."""

import random
import shutil
import socket
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

import secateur
from tests.conftest import RunningServer, eventually, start_server, stop_server
from tests.soak.load import Caller, at_work, check_kept, check_right
from tests.soak.models import Case
from tests.soak.test_chaos import CALLS, cases_of

CALLERS = 4
# Seconds until a server runs again, on slow machines, too.
TIMEOUT = 120.0
# The system does not use these ports for outgoing connections. From another port a client that
# connects while no server runs could be connected to itself.
PORTS = range(20_000, 30_000)


def free_address() -> str:
    for port in random.SystemRandom().sample(PORTS, 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return f"127.0.0.1:{port}"
    raise AssertionError("no port is free")


def served(address: str, folder: Path) -> RunningServer:
    return start_server("--address", address, "--store-dir", str(folder / "store"))


def kill(server: RunningServer) -> None:
    server.process.kill()
    server.process.wait()
    assert "Traceback" not in server.log.read_text()
    shutil.rmtree(server.log.parent)


def callers_of(address: str, cases: list[Case], folder: Path) -> list[Caller]:
    """Makes callers whose calls must all succeed, except that a delete may end as Unavailable."""
    return [
        Caller(
            secateur.Client(address, f"caller {index}", timeout=TIMEOUT),
            cases,
            (),
            (secateur.Unavailable,),
            folder / f"{index}.safetensors",
            random.Random(index),
        )
        for index in range(CALLERS)
    ]


def survive(folder: Path, cases: list[Case], kills: int, seconds: float) -> Counter[str]:
    """Kills a server under load, and starts it again.

    Args:
        folder: Of the models and the store.
        cases: What the callers prune.
        kills: How often.
        seconds: The mean time between kills.

    Returns:
        The outcomes of all calls.
    """
    address, draws = free_address(), random.Random(kills)
    server = served(address, folder)
    try:
        callers = callers_of(address, cases, folder)
        for caller in callers:  # a client retries only after its first connection
            caller.client.report(cases[0].source, progress=False)
        with at_work(callers):
            for _ in range(kills):
                threading.Event().wait(draws.uniform(0.5, 1.5) * seconds)
                kill(server)
                server = served(address, folder)
            before = succeeded(callers)
            threading.Event().wait(seconds)
            eventually(lambda: min((succeeded(callers) - before)[call] for call in CALLS) > 0, True)
        outcomes = check_right(callers)
        check_all_kept(server, callers)
        assert "Traceback" not in stop_server(server)
    finally:
        server.process.kill()
    return outcomes


def check_all_kept(server: RunningServer, callers: list[Caller]) -> None:
    """Checks that every acknowledged checkpoint is complete."""
    for index, caller in enumerate(callers):
        with secateur.Client(server.address, f"caller {index}", timeout=60) as client:
            check_kept(client, caller)


def succeeded(callers: list[Caller]) -> Counter[str]:
    """Counts the successful calls of each kind."""
    outcomes = sum((caller.counts for caller in callers), Counter[str]())
    return Counter({call: outcomes[f"{call}: ok"] for call in CALLS})


@pytest.mark.slow
def test_calls_survive_a_restart_of_the_server(tmp_path: Path) -> None:
    cases = cases_of(tmp_path, "lenet", "1M")
    outcomes = survive(tmp_path, cases, kills=1, seconds=0.5)
    assert min(outcomes[f"{call}: ok"] for call in CALLS) > 0, outcomes


@pytest.mark.slow
def test_calls_survive_many_restarts_of_the_server(tmp_path: Path) -> None:
    cases = cases_of(tmp_path, "lenet", "pruned lenet", "half lenet", "1M", "1M bf16", "5M", "20M")
    outcomes = survive(tmp_path, cases, kills=20, seconds=5)
    print(f"\n{dict(sorted(outcomes.items()))}")
    assert min(outcomes[f"{call}: ok"] for call in CALLS) > 20, outcomes
