"""How fast one core does each task of a Prune that is divided, and how fast the disk is.

Tasks run one after another in this process, as a Ray worker runs them, so that nothing else is in
their time.
"""

import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file

import secateur
from common import SPEC
from secateur_server.app import App
from secateur_server.backends import backend_for
from secateur_server.backends.protocol import Backend
from secateur_server.config import read_config
from secateur_server.cut.drivers import Task
from secateur_server.cut.drivers.packets import pickled, work
from secateur_server.cut.drivers.ray import Ray
from secateur_server.runtime.context import Found, Item, RequestContext

INDEX = "model.safetensors.index.json"
WORK_MEMORY = 1 << 30
TENSORS = 4  # of each shard
SHARDS, UNITS = 3, 1 << 26  # of the checkpoint whose tasks are timed
DTYPES = (torch.float32, torch.bfloat16)


def write_checkpoint(folder: Path, shards: int, units: int, dtype: torch.dtype) -> str:
    """Writes normal weights in shards of `units`.  Returns: the URI of the index."""
    folder.mkdir(parents=True)
    places: dict[str, str] = {}
    for number in range(shards):
        torch.manual_seed(number)
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        tensors = {
            f"layer{number}.{part}.weight": torch.randn(units // TENSORS // 1024, 1024).to(dtype)
            for part in range(TENSORS)
        }
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return f"{folder.as_uri()}/{INDEX}"


class Timed:
    """A cluster in this process. It does tasks one by one.

    Attributes:
        found: The seconds and the bytes, sent and received, of each task, by its name.
        passes: How often all shards were counted.
    """

    threads = 1

    def __init__(self) -> None:
        self.backend: Backend = backend_for(torch.device("cpu"))
        self.found: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)
        self.passes = 0

    def close(self) -> None:
        """Does nothing."""

    def map(
        self, context: RequestContext, task: Task[Item, Found], pieces: Iterable[Item]
    ) -> list[Found]:
        """As Driver.map."""
        return [found for _, found in self.as_finished(context, task, list(pieces))]

    def as_finished(
        self, context: RequestContext, task: Task[Item, Found], pieces: list[Item]
    ) -> Iterator[tuple[int, Found]]:
        """As Cluster.as_finished."""
        import pickle

        name = getattr(task, "func", task).__name__
        self.passes += name == "_each"
        for index, piece in enumerate(pieces):
            sent = pickled((task, piece, None, WORK_MEMORY))
            begin = time.perf_counter()
            received = work(sent)
            self.found[name].append((time.perf_counter() - begin, len(sent) + len(received)))
            yield index, pickle.loads(received)


def rates(folder: Path) -> dict[str, Any]:
    """Seconds of each task for 1 G parameters, by dtype. Files are in memory: no disk counts."""
    return {str(dtype).removeprefix("torch."): _rates(folder, dtype) for dtype in DTYPES}


def _rates(folder: Path, dtype: torch.dtype) -> dict[str, float]:
    source, target = folder / f"source-{dtype}", folder / f"target-{dtype}"
    uri = write_checkpoint(source, SHARDS, UNITS, dtype)
    target.mkdir()
    arguments = ["--address", "127.0.0.1:0", "--metrics-address", "", "--device", "cpu"]
    arguments += ["--allow-path", str(folder), "--ray-address", "in this process"]
    cluster = Timed()
    with (
        patch.object(Ray, "at", lambda *_: cluster),
        App(read_config(arguments, {})) as app,
        secateur.Client(app.address, timeout=600) as client,
    ):
        to = f"{target.as_uri()}/{INDEX}"
        client.prune(uri, SPEC, "dense", destination=to, progress=False)  # reads and compiles
        cluster.found.clear()
        cluster.passes = 0
        client.prune(uri, SPEC, "none", progress=False)
        alone = cluster.found.pop("prune_file")
        client.prune(uri, SPEC, "dense", destination=to, progress=False)
    tasks = cluster.found
    pruned = statistics.median(seconds for seconds, _ in alone)
    in_units = {name: _median(tasks[name]) * 1e9 / UNITS for name in ("summarize", "_each")}
    written = _median(tasks["prune_file"]) - pruned
    return {
        "score": in_units["summarize"],
        "count": in_units["_each"],
        "passes": cluster.passes / 2,
        "prune": pruned * 1e9 / UNITS,
        "encode": written * 1e9 / UNITS,
        "pass_bytes": statistics.mean(size for _, size in tasks["_each"]),
    }


def _median(tasks: list[tuple[float, int]]) -> float:
    return statistics.median(seconds for seconds, _ in tasks)


def nothing(context: RequestContext, backend: Backend, piece: int) -> bytes:
    """A task that takes no time."""
    return b""


def overhead(address: str, tasks: int = 512) -> float:
    """Seconds that a cluster takes for a task that does nothing."""
    cluster = Ray.at(
        address,
        WORK_MEMORY,
        dict.fromkeys(
            ("sent", "received", "finished", "failed", "cancelled", "repeated"), lambda _: None
        ),
    )
    try:
        cluster.map(RequestContext(), nothing, range(8))
        begin = time.perf_counter()
        cluster.map(RequestContext(), nothing, range(tasks))
        return (time.perf_counter() - begin) / tasks
    finally:
        cluster.close()


def disk(folder: Path, file_bytes: int) -> dict[str, float]:
    """Bytes a second of 1 and 2 processes that write files, sync them, and read them cold."""
    found = {}
    for writers in (1, 2):
        paths = [folder / f"disk-{number}" for number in range(writers)]
        with ProcessPoolExecutor(writers, mp_context=get_context("spawn")) as pool:
            list(pool.map(abs, range(writers)))  # starts the processes
            for name, work_of in (("write", _write), ("read", _read)):
                begin = time.perf_counter()
                list(pool.map(work_of, paths, [file_bytes] * writers))
                found[f"{name} {writers}"] = writers * file_bytes / (time.perf_counter() - begin)
        for path in paths:
            path.unlink()
    return found


def _write(path: Path, size: int) -> None:
    part = os.urandom(16 << 20)
    with path.open("wb", buffering=0) as file:
        for _ in range(size // len(part)):
            file.write(part)
        os.fsync(file)


def _read(path: Path, size: int) -> None:
    part = bytearray(16 << 20)
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while file.readinto(part):
            pass
