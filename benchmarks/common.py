"""What the benchmarks share: models, both ways to prune them, a server, its memory."""

import hashlib
import os
import platform
import re
import statistics
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import secateur
from bounds import memory_copy

AMOUNT = 0.5
TURNS = 40
SPEC = secateur.global_unstructured("*", AMOUNT)
SHARES = (5, 5, 10, 10, 15, 15, 20, 20)  # per cent of the parameters in each tensor
LENET = {
    **{"conv1.weight": (6, 1, 3, 3), "conv1.bias": (6,)},
    **{"conv2.weight": (16, 6, 3, 3), "conv2.bias": (16,)},
    **{"fc1.weight": (120, 400), "fc1.bias": (120,)},
    **{"fc2.weight": (84, 120), "fc2.bias": (84,)},
    **{"fc3.weight": (10, 84), "fc3.bias": (10,)},
}

Model = dict[str, Tensor]


@dataclass(frozen=True)
class Server:
    """A server that runs.  pid: of its process.  metrics: the address of its metrics."""

    address: str
    pid: int
    metrics: str


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    models = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    packages = ("secateur", "torch", "grpcio", "protobuf", "numpy", "numba")
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "cores": len(os.sched_getaffinity(0)),
        "threads of torch": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "memcpy of 400 MB": f"{memory_copy(400_000_000):.3f} s",
        "cpu": models[0] if models else platform.machine(),
    }


def prune_over_the_wire(client: secateur.Client, model: Model) -> tuple[float, Model]:
    """The seconds of a whole call, masks unpacked, and the masks."""
    return timed(lambda: client.prune(model, SPEC, progress=False).masks)


def prune_by_torch(model: Model) -> tuple[float, Model]:
    """The seconds of torch's call alone, and its masks. The model stays as it is."""
    modules = {name: nn.Module() for name in model}
    for name, weight in model.items():
        modules[name].register_parameter("weight", nn.Parameter(weight))
    parameters = [(module, "weight") for module in modules.values()]
    seconds, _ = timed(
        lambda: prune.global_unstructured(parameters, prune.L1Unstructured, amount=AMOUNT)
    )
    return seconds, {name: module.get_buffer("weight_mask") for name, module in modules.items()}


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """The seconds of a call, and what it returned."""
    begin = time.perf_counter()
    returned = call()
    return time.perf_counter() - begin, returned


def medians(runs: Sequence[Callable[[], Any]]) -> list[float]:
    """The median seconds of each of some calls, which run in turn."""
    found: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    for _ in range(TURNS):
        for run, seconds in zip(runs, found, strict=True):
            begin = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begin)
    return [statistics.median(seconds) for seconds in found]


def make_model(millions: int, device: str = "cpu") -> Model:
    """Normal weights, scaled as layers of a network are; the same in each process."""
    torch.manual_seed(millions)
    columns = [millions * 10 * share for share in SHARES]
    return without_ties_at_the_cut(
        {
            f"layer{number}.weight": torch.randn(1000, width, device=device) / width**0.5
            for number, width in enumerate(columns)
        }
    )


def make_lenet() -> Model:
    """Normal weights in a LeNet's shapes."""
    torch.manual_seed(0)
    return without_ties_at_the_cut({name: torch.randn(shape) for name, shape in LENET.items()})


def without_ties_at_the_cut(model: Model) -> Model:
    """Makes the right answer a single one: torch promises no order of equal magnitudes.

    Changes the weights in place where some of those at the threshold would go and others stay.
    """
    magnitudes = torch.cat([weight.flatten() for weight in model.values()]).abs_()
    count = round(AMOUNT * len(magnitudes))
    threshold = torch.kthvalue(magnitudes, count).values
    going = count - int((magnitudes < threshold).sum())
    for weight in model.values():
        at_threshold = (weight.abs() == threshold).flatten().nonzero().view(-1)[:going]
        weight.view(-1)[at_threshold] *= 0.99
        going -= len(at_threshold)
    return model


def digest(masks: Mapping[str, Tensor]) -> str:
    """A hash of every bit of the masks, in the order of their names."""
    hashed = hashlib.blake2b()
    for name in sorted(masks):
        hashed.update(np.packbits(masks[name].numpy() != 0).data)
    return hashed.hexdigest()


class Memory:
    """How far the memory of a process grows above what it has now."""

    def __init__(self, pid: int) -> None:
        self._folder = Path("/proc", str(pid))
        (self._folder / "clear_refs").write_text("5")  # the peak begins anew
        self._before = self._status("VmRSS")

    def growth(self) -> int:
        """Bytes from then to the peak."""
        return self._status("VmHWM") - self._before

    def _status(self, field: str) -> int:
        match = re.search(rf"{field}:\s+(\d+) kB", (self._folder / "status").read_text())
        assert match is not None, field
        return int(match[1]) * 1024


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function of this file in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


@contextmanager
def running_server(*more: str) -> Iterator[Server]:
    """A secateur-server on a free port.  more: options."""
    program = Path(sysconfig.get_path("scripts"), "secateur-server")
    options = ["--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0", "--device", "cpu"]
    process = subprocess.Popen([program, *options, *more], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        found: dict[str, str] = {}
        for line in process.stderr:
            found |= re.findall(r'serving (gRPC|metrics) at ([^\s"]+)', line)
            if len(found) == 2:
                # A log that nobody reads would in the end stop who writes it.
                Thread(target=process.stderr.read, daemon=True).start()
                yield Server(found["gRPC"], process.pid, found["metrics"])
                return
        raise RuntimeError(f"secateur-server ended with status {process.wait()}")
    finally:
        process.terminate()
        process.wait()
