"""Single calls on a LeNet, beside torch's own and beside an echo of as many bytes."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import secateur
from bounds import raw_echo
from common import (
    LENET,
    Server,
    digest,
    in_fresh_process,
    make_lenet,
    prune_by_torch,
    prune_over_the_wire,
    running_server,
)

ROUNDS, CALLS = 10, 30  # calls in each round


def compare() -> dict[str, Any]:
    """Measures all three in one process, in turn."""
    with running_server() as server:
        torch, wire, echo = in_fresh_process(sides, server)
    return {
        "parameters": sum(map(math.prod, LENET.values())),
        "calls": ROUNDS * CALLS,
        "torch": percentiles(torch),
        "secateur": percentiles(wire),
        "echo": percentiles(echo),
    }


def sides(server: Server) -> tuple[list[float], list[float], list[float]]:
    """The seconds of each call by torch, over the wire, and of each echo."""
    model = make_lenet()
    wire, local, echoes = [], [], []
    as_bytes = bytes(4 * sum(map(math.prod, LENET.values())))
    with secateur.Client(server.address) as client, raw_echo() as echo:
        for _ in range(ROUNDS + 1):
            # In turn, so that all meet the same neighbours; not call by call, as the threads of
            # torch spin for a while after a call and take the server's time.
            wire += [prune_over_the_wire(client, model) for _ in range(CALLS)]
            echoes += [echo(as_bytes) for _ in range(CALLS)]
            local += [prune_by_torch(model) for _ in range(CALLS)]
    assert len({digest(masks) for _, masks in wire + local}) == 1, "the masks of the LeNet differ"
    # The first round is not counted.
    return (
        [seconds for seconds, _ in local[CALLS:]],
        [seconds for seconds, _ in wire[CALLS:]],
        echoes[CALLS:],
    )


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """The 50th and the 95th percentile."""
    cuts = statistics.quantiles(seconds, n=100)
    return {"p50": cuts[49], "p95": cuts[94]}


COLUMNS = ("LeNet, ms", "torch", "secateur", "echo", "secateur to echo")


def rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """The lines of the table."""
    lines = []
    for name in ("p50", "p95"):
        values = [found[side][name] for side in ("torch", "secateur", "echo")]
        ratio = f"{values[1] / values[2]:.1f}"
        lines.append((name, *(f"{value * 1e3:.2f}" for value in values), ratio))
    return lines
