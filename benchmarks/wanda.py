"""What pruning by activations costs over the wire, beside magnitude: make bench does not run it.

All prune half of the same fp32 parameters, but 2:4 of all groups. The ways take turns in one run.
`torch` is the formula of locuslab/wanda, with a sort of each row, in this process.

    python benchmarks/wanda.py [MILLIONS]
"""

import statistics
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

import secateur
from common import AMOUNT, Model, make_model, running_server, timed
from secateur import LayerStatistics, Statistics

CALLS = 5


def inputs_of(model: Model) -> Statistics:
    """Statistics of inputs that differ by orders of magnitude, as those of transformers do."""
    numbers = np.random.default_rng(0)
    layers = {
        name: LayerStatistics(1000, np.exp(numbers.normal(size=weight.shape[1])) * 1000)
        for name, weight in model.items()
    }
    return Statistics(layers)


def by_sorting(model: Model, inputs: Statistics) -> Model:
    """The masks of prune_wanda in lib/prune.py of locuslab/wanda."""
    found = {}
    for name, weight in model.items():
        scaler_row = torch.from_numpy(inputs[name].sum_squares / inputs[name].count).float()
        metric = weight.abs() * torch.sqrt(scaler_row.reshape((1, -1)))
        sort_res = torch.sort(metric, dim=-1, stable=True)
        indices = sort_res[1][:, : int(metric.shape[1] * AMOUNT)]
        found[name] = torch.ones_like(metric, dtype=torch.bool).scatter_(1, indices, False)
    return found


def main(millions: int) -> None:
    """Prints the median seconds of each way, and how many times those of global magnitude."""
    model = make_model(millions)
    inputs = inputs_of(model)
    by = secateur.activation(inputs)
    specs = {
        "global magnitude": secateur.global_unstructured("*", AMOUNT),
        "magnitude, each row": secateur.select("*", AMOUNT, scope="row"),
        "Wanda": secateur.wanda("*", AMOUNT, inputs),
        "Wanda, 2:4": secateur.wanda("*", None, inputs, n_m=(2, 4)),
        "2:4 by magnitude": secateur.n_m_structured("*"),
        "RIA": secateur.ria("*", AMOUNT, inputs),
        "Wanda, OWL": secateur.select("*", AMOUNT, by, scope="row", allocation="owl"),
    }
    with running_server() as server, secateur.Client(server.address) as client:

        def pruned(spec: secateur.spec.Spec) -> Model:
            masks: Model = client.prune(model, spec, progress=False).masks
            return masks

        ways: dict[str, Callable[[], Model]] = {
            name: partial(pruned, spec) for name, spec in specs.items()
        }
        if millions <= 100:
            ways["Wanda by torch"] = partial(by_sorting, model, inputs)
        first = {name: way() for name, way in ways.items()}
        rounds = [{name: timed(way)[0] for name, way in ways.items()} for _ in range(CALLS)]
    ours, theirs = first["Wanda"], first.get("Wanda by torch", {})
    differing = sum(int((ours[name] != mask).count_nonzero()) for name, mask in theirs.items())
    medians = {name: statistics.median(of[name] for of in rounds) for name in ways}
    for name, seconds in medians.items():
        print(f"{name:20} {seconds:.3f} s  {seconds / medians['global magnitude']:.2f}")
    print(f"masks of Wanda that differ from torch's: {differing} of {millions * 1_000_000}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 100)
