"""A plan over 20 amounts, beside one prune of the same model: over the wire, and in the core."""

import statistics
from typing import Any

import secateur
from common import AMOUNT, Model, Server, in_fresh_process, make_model, running_server, timed
from methods import Core
from secateur_server.cut.plan import plan
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.amounts import Fraction

CALLS = 5
AMOUNTS = [number / 20 for number in range(1, 21)]


def specs() -> dict[str, secateur.Spec]:
    """What is planned."""
    patterns = secateur.n_m(2, 4)
    return {
        "each tensor": secateur.select("*", AMOUNT),
        "global": secateur.select("*", AMOUNT, scope="global"),
        "uniform": secateur.select("*", AMOUNT, scope="global", allocation="uniform"),
        "LAMP": secateur.lamp("*", AMOUNT),
        "2:4, some of the groups, global": secateur.select(
            "*", AMOUNT, granularity=patterns, scope="global"
        ),
        "blocks of 4x4": secateur.block_structured("*", AMOUNT, 4, 4, 2),
        "rows, global": secateur.global_structured("*", AMOUNT, 2, 0),
    }


def compare(largest: int) -> list[dict[str, Any]]:
    """Measures all.  largest: millions of parameters."""
    found = []
    with running_server() as server:
        for millions in (10, 100):
            if millions <= largest:
                found += in_fresh_process(measure_all, server, millions)
    return found


def measure_all(server: Server, millions: int) -> list[dict[str, Any]]:
    """The figures of each method at one size."""
    model = make_model(millions)
    core = Core(model)
    with secateur.Client(server.address) as client:
        return [
            {"case": name, "parameters": millions * 1_000_000} | measure(client, core, model, spec)
            for name, spec in specs().items()
        ]


def measure(
    client: secateur.Client, core: Core, model: Model, spec: secateur.Spec
) -> dict[str, float]:
    """The median seconds of a plan and of a prune, which take turns."""
    [rule] = core.rules(spec)
    rounds = []
    for _ in range(CALLS + 1):
        wire_plan, planned = timed(lambda: client.plan(model, spec, AMOUNTS, progress=False))
        wire_prune, pruned = timed(lambda: client.prune(model, spec, progress=False))
        core_plan, core_prune = (
            core.seconds(plan, RequestContext(), rule, [Fraction(amount) for amount in AMOUNTS]),
            core.prune(spec),
        )
        rounds.append((wire_plan, wire_prune, core_plan, core_prune))
    foretold = planned.amounts[AMOUNTS.index(AMOUNT)].pruned
    done = sum(tensor.pruned for tensor in pruned.report.tensors.values())
    assert foretold == done, f"{foretold} foretold, {done} pruned"
    names = ("plan", "prune", "core of plan", "core of prune")
    # The first round is not counted.
    medians = [statistics.median(seconds) for seconds in zip(*rounds[1:], strict=True)]
    return dict(zip(names, medians, strict=True))


COLUMNS = (
    *("parameters", "20 amounts of", "plan", "prune", "plan to prune"),
    *("core of plan", "core of prune", "plan to prune"),
)


def rows(found: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The lines of the table."""
    lines = []
    for case in found:
        cells = []
        for plans, prunes in (("plan", "prune"), ("core of plan", "core of prune")):
            cells += [f"{case[plans]:.3f} s", f"{case[prunes]:.3f} s"]
            cells.append(f"{case[plans] / case[prunes]:.2f}")
        lines.append((f"{case['parameters'] // 1_000_000} M", case["case"], *cells))
    return lines
