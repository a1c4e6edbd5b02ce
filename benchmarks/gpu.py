"""Half of a model that lies on a GPU, by global L1, beside torch's own pruning there.

The bound is what it takes to read the weights once for each pass, at the speed of a copy within the
GPU's memory. By itself: python benchmarks/gpu.py 1000
"""

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

import secateur
from common import (
    AMOUNT,
    Model,
    in_fresh_process,
    make_model,
    prune_by_torch,
    prune_over_the_wire,
    running_server,
    timed,
)
from secateur_server import backends
from secateur_server.backends.torch_backend import TorchBackend
from secateur_server.cut.prune import prune
from secateur_server.granularity.element import Element
from secateur_server.importance.magnitude import Magnitude
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.amounts import Fraction
from secateur_server.spec.rules import Selection
from secateur_server.state_dict.parameter import Parameter

ROUNDS = 9
# Bytes that torch takes for a weight.
BYTES_BY_TORCH = 60
# One looks for NaN, and one marks.
PASSES = 2

COLUMNS = (
    "on a GPU",
    "torch",
    "secateur",
    "ratio",
    "to the bound",
    "without Triton",
    "torch's peak",
    "secateur's",
)


def most() -> int:
    """Millions of weights that torch has room to prune here."""
    return torch.cuda.get_device_properties().total_memory // BYTES_BY_TORCH // 1_000_000


def compare(millions: int) -> dict[str, Any]:
    """Measures in processes of their own.  Fails where a bit of a mask differs."""
    found: dict[str, Any] = in_fresh_process(_sides, millions)
    with running_server("--device", "cuda") as server:
        found["wire"] = in_fresh_process(_over_the_wire, server.address)
    return found


def rows(found: dict[str, Any]) -> list[Sequence[str]]:
    """The lines of a table under COLUMNS."""
    torchs, ours, operations = (found[side] for side in ("torch", "secateur", "operations"))
    return [
        (
            f"{found['parameters'] / 1e6:,.0f} M in its memory",
            f"{1e3 * torchs['seconds']:,.1f} ms",
            f"{1e3 * ours['seconds']:.2f} ms",
            f"{torchs['seconds'] / ours['seconds']:,.0f}",
            f"{ours['seconds'] / found['bound']:.2f}",
            f"{1e3 * operations['seconds']:.1f} ms",
            f"{torchs['peak'] / 1e6:,.0f} MB",
            f"{ours['peak'] / 1e6:,.0f} MB",
        ),
        ("100 M over the wire", "", f"{1e3 * found['wire']:,.0f} ms", *[""] * 5),
    ]


def _sides(millions: int) -> dict[str, Any]:
    model = make_model(millions, "cuda")
    size = sum(weight.nbytes for weight in model.values())
    found = {
        "parameters": sum(weight.numel() for weight in model.values()),
        "gpu": torch.cuda.get_device_name(),
        "backend": type(backends.backend_for(torch.device("cuda"))).__name__,
        "bound": PASSES * size / _bandwidth(),
        "secateur": _measured(lambda: _prune(model)),
        "torch": _measured(lambda: prune_by_torch(model)[1], rounds=3),
    }
    ours = _prune(model)
    for name, mask in prune_by_torch(model)[1].items():
        kept = ours[name].mask
        assert kept is not None
        assert torch.equal(mask != 0, kept.whole(RequestContext(), mask.shape)), name
    backends._kind_of = cache(lambda device: TorchBackend)
    return found | {"operations": _measured(lambda: _prune(model))}


def _prune(model: Model) -> dict[str, Parameter]:
    parameters = {name: Parameter(weight) for name, weight in model.items()}
    rule = Selection("rule", tuple(model), Magnitude(), Element(), "global", Fraction(AMOUNT), {})
    return prune(RequestContext(), parameters, [rule], {})[0]


def _measured(call: Callable[[], Any], rounds: int = ROUNDS) -> dict[str, float]:
    """The median of the seconds of a call, and how far the GPU's memory grew in it, in bytes."""
    call()  # compiles, and takes memory from the driver
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(_seconds(call) for _ in range(rounds))
    return {"seconds": seconds, "peak": torch.cuda.max_memory_allocated() - before}


def _seconds(call: Callable[[], Any]) -> float:
    def to_the_end() -> None:
        call()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return timed(to_the_end)[0]


def _bandwidth(size: int = 1 << 31) -> float:
    """Bytes that a copy within the GPU's memory reads and writes in a second."""
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    source.random_()
    return 2 * size / statistics.median(_seconds(lambda: target.copy_(source)) for _ in range(9))


def _over_the_wire(address: str) -> float:
    model = make_model(100)
    with secateur.Client(address) as client:
        return statistics.median(prune_over_the_wire(client, model)[0] for _ in range(ROUNDS))


if __name__ == "__main__":
    print(json.dumps(compare(int(sys.argv[1])), indent=2))
