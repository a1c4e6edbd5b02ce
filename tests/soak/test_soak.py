"""Half an hour of all kinds of calls by many callers, some of them wrong or cancelled."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from pathlib import Path

import pytest

import secateur
from tests.conftest import RunningServer, eventually, start_server, stop_server
from tests.contract.raw import series
from tests.soak.callers import SHARES, Plan, as_json
from tests.soak.gauges import Sample, mean, sampled, table, write
from tests.soak.models import write_models

SECONDS = float(os.environ.get("SOAK_SECONDS", "1800"))
PROCESSES, CALLERS_EACH = 4, 8
ROOT = Path(__file__).parents[2]

# The end of the run divided by the middle. In a short run single calls have more weight.
MOST_GROWTH = 1.05 if SECONDS >= 600 else 1.25

TOKENS = [f"the token of caller {index}" for index in range(PROCESSES)]
# The last tenant reaches its quotas, so that its calls wait.
QUOTAS = ["", "", 'store = "2GiB"', 'memory = "200MiB"\nrequests = 4']


@contextmanager
def soaked_server(folder: Path) -> Iterator[RunningServer]:
    """Runs a server whose limits are reached, and checks that it logs no traceback."""
    tokens = folder / "tokens.toml"
    tables = zip(TOKENS, QUOTAS, strict=True)
    tokens.write_text(
        "\n".join(
            f'[tenants.t{index}]\ntokens = ["{name}"]\n{quota}\n'
            for index, (name, quota) in enumerate(tables)
        )
    )
    running = start_server(
        *("--store-dir", str(folder / "store"), "--store-max-bytes", "6GiB"),
        *("--store-ttl", "600", "--tokens-file", str(tokens)),
        *("--max-model-bytes", "256MiB", "--memory-limit", "512MiB"),
    )
    try:
        yield running
    finally:
        logged = stop_server(running)
    assert "Traceback" not in logged, logged[logged.index("Traceback") - 3000 :][:6000]


def start_callers(server: RunningServer, folder: Path) -> list[subprocess.Popen[bytes]]:
    started = []
    for index, token in enumerate(TOKENS):
        plan = Plan(server.address, token, str(folder), SECONDS, index, CALLERS_EACH)
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.soak.callers"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdin is not None
        process.stdin.write(as_json(plan))
        process.stdin.close()
        process.stdin = None  # `communicate` would close it again
        started.append(process)
    return started


def soak(server: RunningServer, folder: Path) -> tuple[Counter[str], list[str], list[Sample]]:
    """Runs all callers.

    Returns:
        The outcomes of calls, unexpected errors, and samples of the server under load.
    """
    with sampled(server.process.pid, max(0.5, SECONDS / 900)) as samples:
        processes = start_callers(server, folder)
        try:
            answers = [process.communicate(timeout=SECONDS + 600)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert [process.returncode for process in processes] == [0] * PROCESSES
    counts: Counter[str] = Counter()
    errors: list[str] = []
    for answer in map(json.loads, answers):
        counts.update(answer["counts"])
        errors += answer["errors"]
    # There is no load after the last calls have begun.
    loaded = [each for each in samples if each.seconds < SECONDS]
    return counts, errors, loaded


def check_empty(server: RunningServer) -> None:
    """Checks that the server holds nothing but checkpoints, and deletes them."""
    for name in ("requests_in_flight", "requests_waiting", "model_bytes"):
        eventually(partial(series, server, f"secateur_{name}"), 0.0)
    for token in TOKENS:
        with secateur.Client(server.address, token, timeout=60) as client:
            for checkpoint in client.checkpoints():
                client.delete(checkpoint)
    assert series(server, "secateur_checkpoints") == 0
    defects = {
        code: series(server, "grpc_server_handled_total", grpc_code=code)
        for code in ("Internal", "Unknown", "DataLoss", "Unimplemented")
    }
    assert not any(defects.values()), defects


def check_no_growth(samples: list[Sample]) -> None:
    """Compares the last tenth of the time with the one in the middle."""
    for name, slack in (("rss", 0), ("threads", 10), ("files", 10)):
        middle, end = (mean(samples, attrgetter(name), begin) for begin in (0.45, 0.9))
        assert end <= MOST_GROWTH * middle + slack, (name, middle, end)


@pytest.mark.slow
def test_a_server_under_load_neither_grows_nor_fails(tmp_path: Path) -> None:
    with soaked_server(tmp_path) as server:
        with secateur.Client(server.address, TOKENS[0], timeout=120) as client:
            write_models(tmp_path, SHARES, client)
        counts, errors, samples = soak(server, tmp_path)
        write(samples, tmp_path / "samples.jsonl")
        print(table(samples))
        print("\n".join(f"{count:8} {what}" for what, count in sorted(counts.items())))
        assert errors == [], "\n".join(errors[:5])
        check_empty(server)
        check_no_growth(samples)
    assert min(counts[f"{what}: ok"] for what in ("prune", "report", "finalize", "checkpoint")) > 0
