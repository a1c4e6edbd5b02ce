"""Many clients at once, each with a model of its own, beside one client alone."""

import statistics
import threading
import time
from typing import Any

import secateur
from common import Memory, Server, in_fresh_process, make_model, prune_over_the_wire, running_server

CLIENTS, MILLIONS, SECONDS = 16, 5, 20


def compare() -> dict[str, Any]:
    """Measures one client, then all, against one server."""
    with running_server() as server:
        return {
            "clients": CLIENTS,
            "parameters": MILLIONS * 1_000_000,
            "alone": in_fresh_process(load, server, 1),
            "together": in_fresh_process(load, server, CLIENTS),
        }


def load(server: Server, clients: int) -> dict[str, float]:
    """Has `clients` threads of one process prune for SECONDS, call after call."""
    model = make_model(MILLIONS)
    took: list[float] = []
    with secateur.Client(server.address) as client:
        prune_over_the_wire(client, model)
    memory, begin = Memory(server.pid), time.perf_counter()

    def calls() -> None:
        with secateur.Client(server.address) as client:
            while time.perf_counter() - begin < SECONDS:
                took.append(prune_over_the_wire(client, model)[0])

    threads = [threading.Thread(target=calls) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cuts = statistics.quantiles(took, n=100)
    return {
        "calls_per_second": len(took) / (time.perf_counter() - begin),
        "p50": cuts[49],
        "p99": cuts[98],
        "server_peak_bytes": memory.growth(),
        "model_bytes": clients * MILLIONS * 4_000_000,
    }


COLUMNS = ("clients", "calls/s", "p50", "p99", "p99 to p50", "server MB", "to models")


def rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """The lines of the table."""
    return [
        (
            str(clients),
            f"{side['calls_per_second']:.1f}",
            f"{side['p50']:.3f} s",
            f"{side['p99']:.3f} s",
            f"{side['p99'] / side['p50']:.1f}",
            f"{side['server_peak_bytes'] / 1e6:,.0f}",
            f"{side['server_peak_bytes'] / side['model_bytes']:.2f}",
        )
        for clients, side in ((1, found["alone"]), (found["clients"], found["together"]))
    ]
