"""On a network that fails at random, calls give right answers or known errors."""

import random
import threading
from collections import Counter
from pathlib import Path

import grpc
import pytest

import secateur
from tests.conftest import PATIENCE, RunningServer, eventually
from tests.contract.raw import check_serves
from tests.soak.chaos import MEAN_BYTES, Chaos, chaos
from tests.soak.load import Caller, at_work, check_kept, check_right
from tests.soak.models import Case, read_cases, write_models
from tests.storage.stored import store_server

CALLERS = 4
# Errors that a network can cause: data does not arrive, or not in time.
EXPECTED = (secateur.Unavailable, secateur.DeadlineExceeded)
# A call may take this longer than its deadline, to read files and compare answers.
MOST_SECONDS_MORE = PATIENCE
CALLS = ("prune", "report", "upload", "prune by handle", "report by handle")
FAULTS = ("cut", "reset", "delay", "throttle")


def cases_of(folder: Path, *kinds: str) -> list[Case]:
    write_models(folder, kinds, None)
    return [case for cases in read_cases(folder, kinds).values() for case in cases]


def callers_of(
    network: Chaos, cases: list[Case], folder: Path, seed: int, timeout: float
) -> list[Caller]:
    return [
        Caller(
            secateur.Client(network.address, f"caller {index}", timeout=timeout),
            cases,
            EXPECTED,
            (),
            folder / f"{index}.safetensors",
            random.Random(f"{seed} {index}"),
        )
        for index in range(CALLERS)
    ]


def check_whole(server: RunningServer, callers: list[Caller]) -> None:
    """Checks that the server holds nothing of broken calls, and every checkpoint exists."""
    with grpc.insecure_channel(server.address) as channel:
        check_serves(server, channel)
    for index, caller in enumerate(callers):
        with secateur.Client(server.address, f"caller {index}", timeout=60) as client:
            check_kept(client, caller)


def survive(
    folder: Path, cases: list[Case], seconds: float, timeout: float, seed: int, mean: int
) -> tuple[Counter[str], Counter[str]]:
    """Runs callers on a failing network. Returns the outcomes of calls, and the kinds of faults."""
    with (
        store_server(folder / "store") as server,
        chaos(server.address, seed, mean) as network,
    ):
        callers = callers_of(network, cases, folder, seed, timeout)
        with at_work(callers):
            threading.Event().wait(seconds)
            eventually(lambda: has_all_kinds(callers, network.done), True)
        outcomes = check_right(callers)
        assert max(caller.longest for caller in callers) < timeout + MOST_SECONDS_MORE
        check_whole(server, callers)
        return outcomes, network.done


def has_all_kinds(callers: list[Caller], faults: Counter[str]) -> bool:
    """Whether every kind of fault happened, and a call of every kind succeeded."""
    outcomes = sum((caller.counts for caller in callers), Counter[str]())
    is_wrong = any(caller.wrong for caller in callers)  # check_right raises it
    are_right = all(outcomes[f"{call}: ok"] for call in CALLS)
    return is_wrong or (are_right and all(faults[kind] for kind in FAULTS))


@pytest.mark.slow
def test_a_failing_network_gives_right_answers_or_known_errors(
    tmp_path: Path,
) -> None:
    cases = cases_of(tmp_path, "lenet", "1M")
    survive(tmp_path, cases, 1, timeout=8, seed=1, mean=MEAN_BYTES)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_network_that_fails_for_a_minute_gives_right_answers_or_known_errors(
    tmp_path: Path, seed: int
) -> None:
    cases = cases_of(tmp_path, "lenet", "pruned lenet", "half lenet", "1M", "1M bf16", "5M")
    outcomes, faults = survive(tmp_path, cases, 60, timeout=20, seed=seed, mean=MEAN_BYTES << seed)
    print(f"\n{dict(sorted(outcomes.items()))}\n{dict(faults)}")
