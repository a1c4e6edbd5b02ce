"""Prunes a checkpoint in shards: a server alone, and a Ray cluster of as many workers, in one run.

    python benchmarks/cluster.py                      # 8 GiB
    python benchmarks/cluster.py --gib 1 --json FILE
    python benchmarks/cluster.py --gib 1 --folder /dev/shm    # where no disk limits it

Half of the weights by global L1, float32, from file:// to file://. All ways take turns. It fails
if their results differ in one bit. A server alone is restricted to as many cores as it has workers
beside it. The folder needs three times the size of the checkpoint.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import torch

import secateur
from cluster_rates import INDEX, WORK_MEMORY, disk, overhead, rates, write_checkpoint
from common import SPEC, Server, environment, in_fresh_process, running_server, timed

COUNTS = ("tasks_total", "sent_bytes_total", "received_bytes_total")
COLUMNS = ("", "start, s", "first call, s", "warm, s", "GB/s", "tasks", "KiB a task")


@dataclass(frozen=True)
class Way:
    """How the checkpoint is pruned.  workers: of Ray, or threads of a server alone."""

    is_ray: bool
    workers: int

    def __str__(self) -> str:
        return f"Ray, {self.workers}" if self.is_ray else f"server alone, {self.workers}"


WAYS = (Way(False, 1), Way(True, 1), Way(False, 2), Way(True, 2))


@dataclass
class Measured:
    """A way that runs.  start: seconds of its start.  calls: seconds of each, the first one first.

    counts: of tasks and bytes, of the last call.
    """

    way: Way
    server: Server
    start: float
    calls: list[float]
    counts: list[float]


def main() -> None:
    """Measures, prints, and writes a file where it is asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gib", type=float, default=8, help="of the checkpoint")
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="where files are")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also writes every figure there")
    options = parser.parse_args()
    found = {"environment": environment(), **compare(options)}
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Measures all ways, the disk before each turn, and the tasks alone."""
    units = int(options.gib * 2**30 / 4 / options.shards) & -4096
    shard_bytes = 4 * units
    with tempfile.TemporaryDirectory(prefix="secateur-bench-", dir=options.folder) as temporary:
        folder = Path(temporary)
        arguments = folder / "source", options.shards, units, torch.float32
        uri = in_fresh_process(write_checkpoint, *arguments)
        disks, per_task = [], {}
        with ExitStack() as running:
            ways = [running.enter_context(_running(way, folder)) for way in WAYS]
            for _ in range(1 + options.turns):
                disks.append(disk(folder, max(shard_bytes, 1 << 28)))
                _turn(ways, uri, folder)
        for workers in (1, 2):
            with _cluster(workers) as address:
                per_task[str(workers)] = overhead(address)
    with tempfile.TemporaryDirectory(prefix="secateur-bench-", dir="/dev/shm") as memory:
        of_tasks = in_fresh_process(rates, Path(memory))
    return {
        "bytes": shard_bytes * options.shards,
        "shards": options.shards,
        "ways": [
            {
                "ray": of.way.is_ray,
                "workers": of.way.workers,
                "start": of.start,
                "calls": of.calls,
                **dict(zip(COUNTS, of.counts, strict=True)),
            }
            for of in ways
        ],
        "disk": {name: statistics.median(of[name] for of in disks) for name in disks[0]},
        "overhead": per_task,
        "rates": of_tasks,
    }


@contextmanager
def _running(way: Way, folder: Path) -> Iterator[Measured]:
    """Starts a server, and its cluster."""
    with ExitStack() as held:
        seconds, server = timed(lambda: held.enter_context(_started(way, folder)))
        yield Measured(way, server, seconds, [], [])


@contextmanager
def _started(way: Way, folder: Path) -> Iterator[Server]:
    options = ["--allow-path", str(folder)]
    if way.is_ray:
        with (
            _cluster(way.workers) as address,
            running_server(*options, "--ray-address", address) as server,
        ):
            yield server
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[: way.workers])
    with running_server(*options) as server:
        os.sched_setaffinity(0, before)
        yield server


@contextmanager
def _cluster(workers: int) -> Iterator[str]:
    """A Ray cluster of one node, whose processes can import the tasks of this folder."""
    from ray.cluster_utils import Cluster

    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)

    node = {"num_cpus": workers, "memory": workers * WORK_MEMORY}
    node |= {"object_store_memory": 100 << 20, "include_dashboard": False}
    cluster: Any = Cluster(initialize_head=True, head_node_args=node)
    try:
        yield cluster.address
    finally:
        cluster.shutdown()


def _turn(ways: Sequence[Measured], uri: str, folder: Path) -> None:
    """A call of each way."""
    digests = set()
    for of in ways:
        target = folder / "target"
        target.mkdir()
        before = _counts(of.server)
        of_call = uri, SPEC, "dense"
        with secateur.Client(of.server.address, timeout=3600) as client:
            to = f"{target.as_uri()}/{INDEX}"
            seconds, result = timed(partial(client.prune, *of_call, destination=to, progress=False))
        of.calls.append(seconds)
        of.counts = [now - then for now, then in zip(_counts(of.server), before, strict=True)]
        digests.add(result.report.output_blake3)
        shutil.rmtree(target)
    assert len(digests) == 1, "all ways write the same bits"


def _counts(server: Server) -> list[float]:
    with urlopen(server.metrics) as page:
        text = page.read().decode()
    return [
        sum(map(float, re.findall(rf"^secateur_ray_{name}(?:{{.*}})? (\S+)$", text, re.M)))
        for name in COUNTS
    ]


def show(found: dict[str, Any]) -> None:
    """Prints everything."""
    print(", ".join(f"{name} {value}" for name, value in found["environment"].items()))
    print(f"{found['bytes'] / 2**30:g} GiB in {found['shards']} shards")
    print(" | ".join(COLUMNS))
    for way in found["ways"]:
        print(" | ".join(_row(way, found["bytes"])))
    pairs = {"overhead of Ray at 1 worker": (1, 0), "at 2 workers": (3, 2)}
    for name, (ray, alone) in pairs.items():
        print(f"{name}: {_ratio(found['ways'], ray, alone) - 1:+.0%}")
    print(f"2 workers of Ray: {_ratio(found['ways'], 1, 3):.2f} times as fast as 1")
    print(f"2 threads of a server alone: {_ratio(found['ways'], 0, 2):.2f} times as fast as 1")
    rates_of_disk = [f"{name} {rate / 1e9:.2f}" for name, rate in found["disk"].items()]
    print("disk, GB/s by its processes:", ", ".join(rates_of_disk))
    print("s a task of Ray, by workers:", found["overhead"])
    for dtype, of in found["rates"].items():
        print(dtype, ", ".join(f"{name} {value:.3f}" for name, value in of.items()))


def _row(way: dict[str, Any], size: int) -> tuple[str, ...]:
    """A line of the table."""
    warm = statistics.median(way["calls"][1:])
    seconds = (
        f"{way['start']:.1f}",
        f"{way['calls'][0]:.2f}",
        f"{warm:.2f}",
        f"{size / warm / 1e9:.2f}",
    )
    crossed = way[COUNTS[1]] + way[COUNTS[2]]
    tasks = way[COUNTS[0]]
    each = f"{crossed / tasks / 1024:.1f}" if tasks else ""
    return str(Way(way["ray"], way["workers"])), *seconds, f"{tasks:.0f}", each


def _ratio(ways: Sequence[dict[str, Any]], one: int, other: int) -> float:
    """The median over the turns of the time of one way beside that of another."""
    pairs = zip(ways[one]["calls"][1:], ways[other]["calls"][1:], strict=True)
    return float(statistics.median(a / b for a, b in pairs))


if __name__ == "__main__":
    main()
