"""Many small tensors, as a mixture of experts has them: what each tensor costs a call."""

from collections.abc import Callable
from typing import Any

import torch

import secateur
from common import AMOUNT, Model, Server, in_fresh_process, running_server, timed

TENSORS, SHAPE = 12_000, (8, 8)
AMOUNTS = [number / 20 for number in range(1, 21)]


def compare() -> dict[str, Any]:
    """Measures all calls against one server."""
    with running_server() as server:
        return {"tensors": TENSORS, "seconds": in_fresh_process(measure, server)}


def measure(server: Server) -> dict[str, float]:
    """The seconds of each call, after a first one that is not counted."""
    torch.manual_seed(0)
    model = {
        f"layers.{i // 96}.experts.{i % 96}.weight": torch.randn(SHAPE) for i in range(TENSORS)
    }
    with secateur.Client(server.address) as client:
        found = {}
        for name, call in calls(client, model).items():
            found[name] = [timed(call)[0] for _ in range(2)][1]
        return found


def calls(client: secateur.Client, model: Model) -> dict[str, Callable[[], Any]]:
    """What is measured, by its name in the table."""
    each = secateur.l1_unstructured("*", AMOUNT)
    together = secateur.global_unstructured("*", AMOUNT)
    lamp = secateur.lamp("*", AMOUNT)
    specs = {"each tensor": each, "global": together, "LAMP": lamp}
    prunes = {
        f"prune, {name}": lambda spec=spec: client.prune(model, spec, progress=False).masks
        for name, spec in specs.items()
    }
    plans = {
        f"plan of {len(AMOUNTS)}, {name}": lambda spec=spec: client.plan(
            model, spec, AMOUNTS, progress=False
        )
        for name, spec in specs.items()
    }
    return {**prunes, **plans, "report": lambda: client.report(model, progress=False)}


COLUMNS = ("many small tensors", "seconds", "a tensor")


def rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """The lines of the table."""
    return [
        (name, f"{seconds:.2f} s", f"{seconds / found['tensors'] * 1e6:.0f} us")
        for name, seconds in found["seconds"].items()
    ]
