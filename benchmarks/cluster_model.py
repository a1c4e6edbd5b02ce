"""Where the time of a large cluster goes, by the rates that cluster.py has measured.

    python benchmarks/cluster.py --gib 8 --json FILE
    python benchmarks/cluster_model.py FILE

A global Prune of a model in shards, from an object store to it. First the model predicts the
measured calls themselves, then a cluster that nobody here has. It assumes that all workers are
alike, that each has its own line to the store, and that a worker fetches, counts, prunes and writes
its shards one after another on each core, without overlap.

It is a lower bound: scores that are computed again, the requests that begin and complete uploads,
and the disks of the nodes are not in it.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

PARAMETERS, SHARDS, WORKERS, CORES = 1e12, 512, 64, 8
GIGABITS = (1, 10, 25)
BYTES = {"float32": 4, "bfloat16": 2}


class Seconds(NamedTuple):
    """The time of each phase on the slowest worker, and of what the server does meanwhile."""

    fetch: float
    score: float
    observe: float
    prune: float
    encode: float
    write: float
    tasks: float

    @property
    def total(self) -> float:
        """Of the call."""
        return sum(self)


def predict(
    rates: dict[str, float],
    overhead: float,
    parameters: float,
    shards: int,
    slots: int,
    fetch_rate: float,
    write_rate: float,
    size: int,
) -> Seconds:
    """Predicts the time of a call.

    Args:
        rates: Seconds of one core for 1 G parameters, by phase, and the number of passes.
        overhead: Seconds of Ray for each task, one after another.
        parameters: Of the model.
        shards: Of equal size.
        slots: Tasks that run at once.
        fetch_rate: Bytes a second of all workers together.
        write_rate: The same.
        size: Bytes of a parameter.
    """
    share = math.ceil(shards / slots) * parameters / shards / 1e9  # G parameters of a slot
    phases = 3 + rates["passes"]  # headers, scores, each pass, and the prune
    return Seconds(
        fetch=parameters * size / fetch_rate,
        score=share * rates["score"],
        observe=share * rates["count"] * rates["passes"],
        prune=share * rates["prune"],
        encode=share * rates["encode"],
        write=parameters * size / write_rate,
        tasks=phases * shards * overhead,
    )


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path, help="what cluster.py has written")
    found = json.loads(parser.parse_args().file.read_text())
    check(found)
    print(
        f"\n{PARAMETERS / 1e12:g} T parameters in {SHARDS} shards, {WORKERS} workers of {CORES} "
        "cores, seconds of each phase"
    )
    print(" | ".join(("dtype", "Gbit/s a worker", *Seconds._fields, "total")))
    for dtype, size in BYTES.items():
        for gigabits in GIGABITS:
            line = WORKERS * gigabits * 1e9 / 8
            overhead = min(found["overhead"].values())
            seconds = predict(
                found["rates"][dtype],
                overhead,
                PARAMETERS,
                SHARDS,
                WORKERS * CORES,
                line,
                line,
                size,
            )
            figures = (f"{value:.1f}" for value in (*seconds, seconds.total))
            print(" | ".join((dtype, str(gigabits), *figures)))


def check(found: dict[str, Any]) -> None:
    """Prints what the model predicts for the measured calls, whose files are on the disk."""
    print("workers | measured, s | predicted, s")
    parameters = found["bytes"] / 4
    for way in found["ways"]:
        if not way["ray"]:
            continue
        workers = way["workers"]
        seconds = predict(
            found["rates"]["float32"],
            found["overhead"][str(workers)],
            parameters,
            found["shards"],
            workers,
            math.inf,  # in the page cache
            found["disk"][f"write {workers}"],
            4,
        )
        print(f"{workers} | {statistics.median(way['calls'][1:]):.1f} | {seconds.total:.1f}")


if __name__ == "__main__":
    main()
