"""How the cost grows: with parameters, with tensors, and from method to method."""

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

import secateur
from bounds import raw_upload
from common import AMOUNT, SPEC, Model, Server, in_fresh_process, running_server, timed

CALLS = 5
Case = tuple[str, Model, secateur.Spec, str]
Upload = Callable[[memoryview], float]


def layers(count: int, *shape: int, dtype: torch.dtype = torch.float32) -> Model:
    """Normal weights."""
    return {f"layer{n}.weight": torch.randn(shape).div_(100).to(dtype) for n in range(count)}


def growing(largest: int) -> Iterator[Case]:
    """More parameters, and more tensors.  largest: millions."""
    yield "10 M in 8 tensors", layers(8, 1000, 1250), SPEC, "masks"
    local = secateur.l1_unstructured("*", AMOUNT)
    if largest >= 100:
        yield "100 M in 8 tensors", layers(8, 1000, 12_500), SPEC, "masks"
        for count, columns in ((10, 100_000), (1000, 1000)):
            model = layers(count, 100, columns)
            yield f"100 M in {count} tensors", model, SPEC, "masks"
            yield f"100 M in {count} tensors, each by itself", model, local, "masks"
    if largest >= 500:
        yield "500 M in 8 tensors", layers(8, 1000, 62_500), SPEC, "masks"


def methods(largest: int) -> Iterator[Case]:
    """Every kind of method on as many parameters."""
    model = layers(8, 1000, min(largest, 100) * 125)
    yield "l1_unstructured", model, secateur.l1_unstructured("*", AMOUNT), "masks"
    yield "random_unstructured", model, secateur.random_unstructured("*", AMOUNT), "masks"
    for n, dim in ((2, 0), (2, 1), (1, 1), (3, 0), (float("inf"), 0)):
        spec = secateur.ln_structured("*", AMOUNT, n=n, dim=dim)
        yield f"ln_structured n={n} dim={dim}", model, spec, "masks"
    yield "random_structured dim=1", model, secateur.random_structured("*", AMOUNT, dim=1), "masks"
    for output in ("none", "dense", "reparametrized"):
        yield f"global, output={output}", model, SPEC, output
    for dtype in (torch.bfloat16, torch.float16):
        half = {name: weight.to(dtype) for name, weight in model.items()}
        yield f"global, {str(dtype).removeprefix('torch.')}", half, SPEC, "masks"


def measure_cases(server: Server, kind: str, largest: int) -> list[dict[str, Any]]:
    """The median seconds of each case, and of raw uploads of as many bytes between its calls."""
    cases = {"growing": growing, "methods": methods}[kind](largest)
    with secateur.Client(server.address) as client, raw_upload() as upload:
        return [measure(client, upload, *case) for case in cases]


def measure(
    client: secateur.Client,
    upload: Upload,
    name: str,
    model: Model,
    spec: secateur.Spec,
    output: Any,
) -> dict[str, Any]:
    """The medians of one case."""

    def call() -> None:
        result = client.prune(model, spec, output=output, progress=False)
        if output == "masks":
            _ = result.masks

    return {"case": name, **medians(call, upload, model)}


def whole_calls(server: Server, largest: int) -> list[dict[str, Any]]:
    """Report and Finalize, of a model pruned by half as torch.nn.utils.prune leaves it."""
    dense = layers(8, 1000, min(largest, 100) * 125)
    pairs = {f"{name}_orig": weight for name, weight in dense.items()}
    pairs |= {f"{name}_mask": (weight.abs() > 0.005).float() for name, weight in dense.items()}
    with secateur.Client(server.address) as client, raw_upload() as upload:
        calls = (
            ("report", partial(client.report, dense, progress=False), dense),
            ("report of pairs", partial(client.report, pairs, progress=False), pairs),
            ("finalize of pairs", partial(client.finalize, pairs, progress=False), pairs),
        )
        return [{"case": name, **medians(call, upload, model)} for name, call, model in calls]


def medians(call: Callable[[], object], upload: Upload, model: Model) -> dict[str, Any]:
    """The median seconds of a call, and of raw uploads of as many bytes as the model has."""
    as_bytes = np.ones(sum(weight.nbytes for weight in model.values()), np.uint8).data
    both = [(timed(call)[0], upload(as_bytes)) for _ in range(CALLS + 1)][1:]
    seconds, raw = (statistics.median(values) for values in zip(*both, strict=True))
    parameters = sum(weight.numel() for weight in model.values())
    return {"parameters": parameters, "seconds": seconds, "raw_upload": raw}


def compare(largest: int) -> dict[str, list[dict[str, Any]]]:
    """Measures all.  largest: millions of parameters."""
    with running_server() as server:
        return {
            "methods": [
                *in_fresh_process(measure_cases, server, "methods", largest),
                *in_fresh_process(whole_calls, server, largest),
            ],
            "growth": in_fresh_process(measure_cases, server, "growing", largest),
        }


COLUMNS = ("case", "seconds", "ns an element", "raw upload", "to raw")


def rows(found: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The lines of a table."""
    return [
        (
            case["case"],
            f"{case['seconds']:.3f} s",
            f"{case['seconds'] / case['parameters'] * 1e9:.2f}",
            f"{case['raw_upload']:.3f} s",
            f"{case['seconds'] / case['raw_upload']:.1f}",
        )
        for case in found
    ]
