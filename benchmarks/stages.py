"""Where the time of a call on 100 M parameters goes: the stages of the server, in their order.

    python benchmarks/stages.py

The server runs in this process with timers around its stages, the client in another. Stages are
walls in the thread of the call; the passes inside of them use all cores.
"""

import functools
import time
from collections import defaultdict
from multiprocessing import get_context
from typing import Any

import torch

import secateur
import secateur_server.pruning.select as select
import secateur_server.service as service
from secateur_server.app import App
from secateur_server.config import read_config
from secateur_server.model import Model

CALLS = 9
STAGES = {
    "read (receive, copy, hash, count)": (Model, "read"),
    "find the threshold": (select, "_sampled_bounds"),
    "write the masks": (select, "_cut_within"),
    "report": (service, "encode_report"),
}


def main() -> None:
    """Measures, and prints the shares."""
    spent: dict[str, float] = defaultdict(float)
    arguments = ["--address", "127.0.0.1:0", "--metrics-address", ""]
    with App(read_config(arguments, {})) as app:
        seconds = call(app.address, 3)  # memory touched, kernels compiled
        for stage, (place, name) in STAGES.items():
            setattr(place, name, timed(getattr(place, name), stage, spent))
        seconds = call(app.address, CALLS)
    print(f"a call: {seconds:.3f} s")
    for stage in STAGES:
        share = spent[stage] / (CALLS + 1)  # each child begins with one call that is not counted
        print(f"{stage:<32}{share:.3f} s {share / seconds:>6.0%}")


def timed(function: Any, stage: str, spent: dict[str, float]) -> Any:
    """A function that adds its seconds to those of its stage."""

    @functools.wraps(function)
    def timer(*arguments: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            spent[stage] += time.perf_counter() - begin

    return timer


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
