"""The solvers on one layer of 1024 x 4096 weights, beside llm-compressor's SparseGPT.

    python benchmarks/solvers.py                                    # secateur alone
    python benchmarks/solvers.py --llmcompressor OTHER/bin/python   # with llmcompressor installed
    python benchmarks/solvers.py --alps                             # minutes longer

A correlated layer at 50 % sparsity, float32. The calls run in turn, and the times are those of one
run: the least and the median. An error is that of the layer's outputs, relative to theirs.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common import timed
from secateur_server.backends.cores import CORES
from secateur_server.runtime.context import RequestContext
from secateur_server.solvers import refit as refits
from secateur_server.solvers.alps import alps
from secateur_server.solvers.amounts import Layer
from secateur_server.solvers.refit import refit
from secateur_server.solvers.sparsegpt import sparsegpt

ROWS, COLUMNS, TURNS = 1024, 4096, 3
COLUMNS_OF_TABLE = ("solver", "least, s", "median, s", "error", "of SparseGPT's")
CONVERGED = 100

# llm-compressor's function, in a process of its own: once for each line that it reads.
LLM_COMPRESSOR = """
import sys, time, torch
from safetensors.torch import load_file, save_file
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight
torch.set_num_threads(int(sys.argv[2]))
layer = load_file(sys.argv[1])
module = torch.nn.Linear(*reversed(layer["weight"].shape), bias=False)
print("ready", flush=True)
for line in sys.stdin:
    module.weight.data = layer["weight"].clone()
    hessians = {module: layer["gram"].clone()}
    begin = time.perf_counter()
    with torch.no_grad():
        _, found = sparsify_weight(module, hessians, 0.5, 0, 0, 128, 0.01, False)
    seconds = time.perf_counter() - begin
    save_file({"weight": found.contiguous()}, line.strip())
    print(seconds, flush=True)
"""

Run = Callable[[], tuple[float, Tensor]]


def compare(python: Path | None, has_alps: bool) -> list[dict[str, Any]]:
    """Measures each solver, in turn.

    Args:
        python: An interpreter that has llmcompressor; None leaves it out.
        has_alps: Whether to measure ALPS.
    """
    weight, gram = make_layer(ROWS, COLUMNS)
    context = RequestContext()
    pruned, kept = sparsegpt(context, weight, gram, None, Layer(0.5))
    wanda = ~Layer(0.5).prune(weight.abs() * gram.diagonal().sqrt(), torch.ones_like(kept))
    cut = weight * wanda

    def refit_of(start: Tensor, mask: Tensor, steps: int) -> Run:
        return lambda: timed(lambda: refit(context, weight, start, mask, gram, steps=steps))

    runs: dict[str, Run] = {
        "SparseGPT": lambda: timed(lambda: sparsegpt(context, weight, gram, None, Layer(0.5))[0]),
        "refit of SparseGPT": refit_of(pruned, kept, 10),
        "refit of Wanda": refit_of(cut, wanda, 10),
    }
    with other_sparsegpt(python, weight, gram) as others:
        found = _in_turn(runs | others)
    if has_alps:
        found |= _in_turn(
            {"ALPS": lambda: timed(lambda: alps(context, weight, gram, None, Layer(0.5))[0])}, 1
        )
    refits.TOLERANCE = 0.0  # to the end, which rounding decides
    converged = refit_of(pruned, kept, CONVERGED)()
    found |= {"refit until convergence": ([converged[0]], converged[1]), "Wanda": ([0.0], cut)}
    return [
        {"solver": name, "seconds": seconds, "error": error(weight, result, gram)}
        for name, (seconds, result) in found.items()
    ]


def make_layer(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A weight, and X^T X of correlated inputs whose spectrum decays; the same each time."""
    numbers = torch.Generator().manual_seed(0)
    turned = torch.linalg.qr(torch.randn(columns, columns, generator=numbers))[0]
    spectrum = torch.arange(1, columns + 1).float() ** -0.5
    inputs = torch.randn(2 * columns, columns, generator=numbers) * spectrum @ turned
    return torch.randn(rows, columns, generator=numbers) / columns**0.5, inputs.T @ inputs


def error(weight: Tensor, found: Tensor, gram: Tensor) -> float:
    """The squared error of the layer's outputs, relative to the squares of the outputs."""
    lost, gram = (weight - found).double(), gram.double()
    return float((lost @ gram * lost).sum() / (weight.double() @ gram * weight).sum())


@contextmanager
def other_sparsegpt(python: Path | None, weight: Tensor, gram: Tensor) -> Iterator[dict[str, Run]]:
    """llm-compressor's SparseGPT in another interpreter; empty without one that has it."""
    if python is None:
        print("without --llmcompressor PYTHON, llm-compressor is not measured")
        yield {}
        return
    with tempfile.TemporaryDirectory() as folder:
        layer, result = Path(folder, "layer.safetensors"), Path(folder, "result.safetensors")
        save_file({"weight": weight, "gram": gram}, layer)
        command = [str(python), "-c", LLM_COMPRESSOR, str(layer), str(CORES)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            stdin, stdout = process.stdin, process.stdout
            if not any(line.strip() == "ready" for line in stdout):
                raise SystemExit(f"{python} has no llmcompressor: pip install llmcompressor")

            def run() -> tuple[float, Tensor]:
                print(result, file=stdin, flush=True)
                return float(next(stdout)), load_file(result)["weight"]

            yield {"llm-compressor's SparseGPT": run}
            stdin.close()


def _in_turn(runs: dict[str, Run], turns: int = TURNS) -> dict[str, tuple[list[float], Tensor]]:
    found: dict[str, tuple[list[float], Tensor]] = {}
    for _ in range(turns):
        for name, run in runs.items():
            seconds, result = run()
            found[name] = ([*found.get(name, ([], result))[0], seconds], result)
    return found


def rows(found: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """The lines of the table."""
    base = next(one["error"] for one in found if one["solver"] == "SparseGPT")
    for one in found:
        seconds = (min(one["seconds"]), statistics.median(one["seconds"]))
        times = (f"{value:.2f}" for value in seconds)
        yield one["solver"], *times, f"{one['error']:.6f}", f"{one['error'] / base:.4f}"


def main() -> None:
    """Measures, prints, and writes a file where it is asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--llmcompressor", type=Path, metavar="PYTHON")
    parser.add_argument("--alps", action="store_true", help="also measures ALPS")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also writes every figure there")
    options = parser.parse_args()
    found = compare(options.llmcompressor, options.alps)
    show(COLUMNS_OF_TABLE, rows(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    from run import show

    main()
