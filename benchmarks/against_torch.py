"""Pruning over the wire beside torch.nn.utils.prune.global_unstructured, in one run.

    make bench                                                  # 1, 10 and 100 M parameters
    python benchmarks/against_torch.py --sizes 1 10 --json FILE

Both sides prune half of the same fp32 parameters by L1, ranked over all tensors, on the CPU. What
is timed is what a caller waits for: client.prune(...).masks against a secateur-server in a process
of its own (upload, selection, masks back, unpacked), and torch's call in the caller's process.
Each side and each size has fresh processes, so that a peak of memory is its own: it is what RSS
grew to above what it was before the first timed call, with the model there and the libraries warm.
The run fails where the masks differ in a single bit; it asserts no time. Needs Linux.
"""

import argparse
import hashlib
import json
import math
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
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import secateur
from bounds import raw_upload

AMOUNT = 0.5
SPEC = secateur.global_unstructured("*", AMOUNT)
SHARES = (5, 5, 10, 10, 15, 15, 20, 20)  # per cent of the parameters in each tensor
LENET = {
    **{"conv1.weight": (6, 1, 3, 3), "conv1.bias": (6,)},
    **{"conv2.weight": (16, 6, 3, 3), "conv2.bias": (16,)},
    **{"fc1.weight": (120, 400), "fc1.bias": (120,)},
    **{"fc2.weight": (84, 120), "fc2.bias": (84,)},
    **{"fc3.weight": (10, 84), "fc3.bias": (10,)},
}
LENET_ROUNDS, LENET_CALLS = 10, 30  # calls in each round

Model = dict[str, Tensor]


@dataclass(frozen=True)
class Server:
    """A server that runs.  pid: of its process."""

    address: str
    pid: int


@dataclass(frozen=True)
class Side:
    """What one side took: seconds of each call, peaks in bytes; BLAKE2b of the masks.

    raw_seconds: of raw uploads of as many bytes, each behind one of the calls.
    """

    seconds: list[float]
    peak_bytes: int
    masks: str
    server_peak_bytes: int | None = None
    raw_seconds: list[float] | None = None

    @property
    def median(self) -> float:
        """The median call, in seconds."""
        return statistics.median(self.seconds)


def main() -> None:
    """Measures, prints, and writes JSON where it is asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--sizes", nargs="*", type=int, default=[1, 10, 100], metavar="M", help="M parameters"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also writes every figure there")
    options = parser.parse_args()
    found: dict[str, Any] = {"environment": environment()}
    print(", ".join(f"{name} {value}" for name, value in found["environment"].items()), flush=True)
    found["global_unstructured"] = [compare(millions) for millions in options.sizes]
    if options.sizes:
        print_sizes(found["global_unstructured"])
    found["lenet"] = compare_lenet()
    print_lenet(found["lenet"])
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    models = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    packages = ("secateur", "torch", "grpcio", "protobuf", "numpy")
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "cores": len(os.sched_getaffinity(0)),
        "threads of torch": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "cpu": models[0] if models else platform.machine(),
    }


def compare(millions: int) -> dict[str, Any]:
    """Measures both sides at one size."""
    with running_server() as server:
        wire = in_fresh_process(wire_side, millions, server)
    local = in_fresh_process(torch_side, millions)
    assert wire.masks == local.masks, f"the masks of {millions} M parameters differ"
    return {
        "parameters": millions * 1_000_000,
        "model_bytes": millions * 4_000_000,
        "torch": asdict(local),
        "secateur": asdict(wire),
        "raw_upload_median": statistics.median(wire.raw_seconds or []),
        "torch_median": local.median,
        "secateur_median": wire.median,
        "ratio": local.median / wire.median,
    }


def wire_side(millions: int, server: Server) -> Side:
    """Prunes over the wire."""
    model = make_model(millions)
    raw: list[float] = []
    as_bytes = np.ones(millions * 4_000_000, np.uint8).data
    with secateur.Client(server.address) as client, raw_upload() as upload:
        warm_up(client, model)
        ours, theirs = Memory(os.getpid()), Memory(server.pid)

        def both() -> tuple[float, Model]:
            raw.append(upload(as_bytes))
            return prune_over_the_wire(client, model)

        seconds, masks = repeat(both, millions)
        return Side(seconds, ours.growth(), digest(masks), theirs.growth(), raw)


def warm_up(client: secateur.Client, model: Model) -> None:
    """Has the server load, and compile, what it needs: by a small part of the model."""
    prune_over_the_wire(client, make_lenet())
    prune_over_the_wire(client, {n: w[: 1 + 200_000 // w[0].numel()] for n, w in model.items()})


def torch_side(millions: int) -> Side:
    """Prunes by torch alone."""
    model = make_model(millions)
    prune_by_torch(make_lenet())
    memory = Memory(os.getpid())
    seconds, masks = repeat(lambda: prune_by_torch(model), millions)
    return Side(seconds, memory.growth(), digest(masks))


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


def repeat(call: Callable[[], tuple[float, Model]], millions: int) -> tuple[list[float], Model]:
    """The seconds of several calls behind one that is not counted, and the masks of the last.

    A virtual machine is slow where it touches memory that it has never touched before.
    """
    call()
    seconds = []
    for _ in range(15 if millions <= 1 else 7 if millions <= 10 else 5):
        masks: Model = {}  # those before are freed: one call's memory counts
        took, masks = call()
        seconds.append(took)
    return seconds, masks


def compare_lenet() -> dict[str, Any]:
    """Measures single calls on a LeNet."""
    with running_server() as server:
        wire, local = in_fresh_process(lenet_sides, server)
    return {
        "parameters": sum(map(math.prod, LENET.values())),
        "calls": LENET_ROUNDS * LENET_CALLS,
        "torch": percentiles(local),
        "secateur": percentiles(wire),
    }


def lenet_sides(server: Server) -> tuple[list[float], list[float]]:
    """The seconds of each call over the wire, and of each by torch."""
    model, wire, local = make_lenet(), [], []
    with secateur.Client(server.address) as client:
        for _ in range(LENET_ROUNDS + 1):
            # In turn, so that both meet the same neighbours; not call by call, as the threads of
            # torch spin for a while after a call and take the server's time.
            wire += [prune_over_the_wire(client, model) for _ in range(LENET_CALLS)]
            local += [prune_by_torch(model) for _ in range(LENET_CALLS)]
    assert len({digest(masks) for _, masks in wire + local}) == 1, "the masks of the LeNet differ"
    return warm_seconds(wire), warm_seconds(local)


def warm_seconds(calls: Sequence[tuple[float, Model]]) -> list[float]:
    """The seconds of the calls after the first round."""
    return [seconds for seconds, _ in calls[LENET_CALLS:]]


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """The 50th and the 95th percentile."""
    cuts = statistics.quantiles(seconds, n=100)
    return {"p50": cuts[49], "p95": cuts[94]}


def make_model(millions: int) -> Model:
    """Normal weights, scaled as layers of a network are; the same in each process."""
    torch.manual_seed(millions)
    columns = [millions * 10 * share for share in SHARES]
    return without_ties_at_the_cut(
        {
            f"layer{number}.weight": torch.randn(1000, width) / width**0.5
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
def running_server() -> Iterator[Server]:
    """A secateur-server on a free port."""
    program = Path(sysconfig.get_path("scripts"), "secateur-server")
    options = ["--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0", "--device", "cpu"]
    process = subprocess.Popen([program, *options], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if match := re.search(r"serving gRPC at (\S+)", line):
                yield Server(match[1], process.pid)
                return
        raise RuntimeError(f"secateur-server ended with status {process.wait()}")
    finally:
        process.terminate()
        process.communicate()


def print_sizes(sizes: Sequence[Mapping[str, Any]]) -> None:
    """The table of walls and peaks."""
    print("\nglobal_unstructured, L1, half of the weights")
    print("median wall; peak RSS above the idle process, in MB (and in models)")
    times = ("torch", "secateur", "ratio", "raw upload", "to raw")
    columns = ("parameters", *times, "torch RSS", "server RSS", "client RSS")
    print("".join(f"{column:>15}" for column in columns))
    for size in sizes:
        peaks = (
            size["torch"]["peak_bytes"],
            size["secateur"]["server_peak_bytes"],
            size["secateur"]["peak_bytes"],
        )
        cells = (
            f"{size['parameters']:,}",
            f"{size['torch_median']:.3f} s",
            f"{size['secateur_median']:.3f} s",
            f"{size['ratio']:.1f}x",
            f"{size['raw_upload_median']:.3f} s",
            f"{size['secateur_median'] / size['raw_upload_median']:.1f}x",
            *(f"{peak / 1e6:,.0f} ({peak / size['model_bytes']:.1f}x)" for peak in peaks),
        )
        print("".join(f"{cell:>15}" for cell in cells), flush=True)


def print_lenet(lenet: Mapping[str, Any]) -> None:
    """The table of single calls."""
    print(f"\nLeNet, {lenet['parameters']:,} parameters, of {lenet['calls']} whole calls, in ms")
    print(f"{'':>16}{'torch':>16}{'secateur':>16}{'ratio':>16}")
    for name in ("p50", "p95"):
        local, wire = lenet["torch"][name], lenet["secateur"][name]
        print(f"{name:>16}{local * 1e3:>16.2f}{wire * 1e3:>16.2f}{local / wire:>15.1f}x")


if __name__ == "__main__":
    main()
