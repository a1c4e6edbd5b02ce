"""What the details of a report cost, beside the same call without them."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import secateur
from common import SPEC, Model, Server, in_fresh_process, make_model, running_server, timed

CALLS = 5


def compare(largest: int) -> dict[str, Any]:
    """Measures each call.  largest: millions of parameters."""
    millions = min(largest, 100)
    with running_server() as server:
        return {"millions": millions, "seconds": in_fresh_process(measure, server, millions)}


def measure(server: Server, millions: int) -> dict[str, tuple[float, float]]:
    """The median seconds of each call without and with details, which take turns."""
    with secateur.Client(server.address) as client:
        found = {}
        for name, call in calls(client, make_model(millions)).items():
            rounds = [
                [timed(partial(call, details))[0] for details in (False, True)]
                for _ in range(CALLS + 1)
            ]
            # The first round is not counted.
            plain, detailed = map(statistics.median, zip(*rounds[1:], strict=True))
            found[name] = plain, detailed
        return found


def calls(client: secateur.Client, model: Model) -> dict[str, Callable[[bool], Any]]:
    """What is measured, by its name in the table. The argument is whether to ask for details."""
    checkpoint = client.prune(model, SPEC, "none", progress=False, keep=True).checkpoint
    return {
        "report": lambda details: client.report(model, progress=False, details=details),
        "report of a pruned checkpoint": lambda details: client.report(
            checkpoint, progress=False, details=details
        ),
        "prune": lambda details: client.prune(model, SPEC, progress=False, details=details),
    }


COLUMNS = ("details of reports", "plain", "with details", "to plain")


def rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """The lines of the table."""
    return [
        (f"{found['millions']} M, {name}", f"{plain:.3f} s", f"{more:.3f} s", f"{more / plain:.2f}")
        for name, (plain, more) in found["seconds"].items()
    ]
