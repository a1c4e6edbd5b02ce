"""Where the time of a call on 100 M parameters goes: the stages of the server, in their order.

    python benchmarks/stages.py

The server runs in this process, the client in another. Stages are what the server's log says of its
calls: walls in the thread of the call; the passes inside of them use all cores.
"""

import logging
import statistics
import time
from multiprocessing import get_context

import torch

import secateur
from secateur_server.app import App
from secateur_server.config import read_config

CALLS = 9


class Calls(logging.Handler):
    """Keeps the stages of each call that is logged.  Seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: list[dict[str, float]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """As logging.Handler.emit."""
        if found := getattr(record, "call", None):
            self.stages.append(found["stage_seconds"])


def main() -> None:
    """Measures, and prints the medians and their shares of a call."""
    calls = Calls()
    logging.basicConfig(level=logging.INFO, handlers=[calls])
    arguments = ["--address", "127.0.0.1:0", "--metrics-address", ""]
    with App(read_config(arguments, {})) as app:
        seconds = call(app.address, CALLS)
    print(f"a call: {seconds:.3f} s")
    of_calls = calls.stages[-CALLS:]  # without the first, in which kernels are compiled
    for stage in of_calls[0]:
        median = statistics.median(stages[stage] for stages in of_calls)
        print(f"{stage:<10}{median:.3f} s {median / seconds:>6.0%}")


def call(address: str, calls: int) -> float:
    """The mean seconds of calls by a client in a process of its own."""
    context = get_context("spawn")
    with context.Pool(1) as pool:
        return float(pool.apply(prune, (address, calls)))


def prune(address: str, calls: int) -> float:
    """Prunes 100 M parameters several times."""
    model = {f"layer{i}.weight": torch.randn(1000, 12500) for i in range(8)}
    spec = secateur.global_unstructured("*", 0.5)
    with secateur.Client(address) as client:
        client.prune(model, spec)
        begin = time.perf_counter()
        for _ in range(calls):
            _ = client.prune(model, spec).masks
        return (time.perf_counter() - begin) / calls


if __name__ == "__main__":
    main()
