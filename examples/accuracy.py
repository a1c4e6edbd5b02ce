"""Compares the accuracy of a LeNet that reads digits after each pruning method.

    make accuracy                                             # 3 minutes on two cores

It prints a table in Markdown. Each network is pruned in three ways: at once without training, at
once with training afterwards, and in rounds with an epoch of training after each. The last two
train for the same number of epochs.
"""

import copy
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass
from multiprocessing import get_context

import torch

import secateur
from examples.demo import WEIGHTS, Digits, LeNet, accuracy, pruned_copy, read_digits, train

LEVELS = (0.5, 0.8, 0.9, 0.95)  # pruned fractions
SEEDS = (0, 1, 2)
EPOCHS = 10  # before pruning
ROUNDS = 10  # of iterative pruning, with an epoch each

# A pattern has a fixed sparsity: for each level, the nearest pattern of sparse hardware.
PATTERNS = {0.5: (2, 4), 0.8: (1, 4), 0.9: (1, 8), 0.95: (1, 16)}


def global_magnitude(level: float) -> secateur.Spec:
    """Prunes the smallest weights of all layers together."""
    return secateur.select(WEIGHTS, level, scope="global")


def uniform(level: float) -> secateur.Spec:
    """Prunes the smallest weights of each layer, the same fraction of each."""
    return secateur.select(WEIGHTS, level, scope="global", allocation="uniform")


def erk(level: float) -> secateur.Spec:
    """Prunes the smallest weights of each layer, more of large layers."""
    return secateur.select(WEIGHTS, level, scope="global", allocation="erk")


def lamp(level: float) -> secateur.Spec:
    """Prunes the weights that are small relative to the larger ones of their layer."""
    return secateur.select(WEIGHTS, level, scope="global", allocation="lamp")


def blocks(level: float) -> secateur.Spec:
    """Prunes blocks of 4x4, the smallest that the report counts."""
    return secateur.select(WEIGHTS, level, granularity=secateur.blocks(4, 4), scope="global")


def pattern(level: float) -> secateur.Spec:
    """Keeps n of each m inputs in a row. conv1 has one input, and is not pruned."""
    return secateur.select(WEIGHTS, 1.0, granularity=secateur.n_m(*PATTERNS[level]))


METHODS: dict[str, Callable[[float], secateur.Spec]] = {
    "uniform": uniform,
    "global": global_magnitude,
    "LAMP": lamp,
    "ERK": erk,
    "blocks of 4x4, global": blocks,
    ", ".join(f"{n}:{m}" for n, m in PATTERNS.values()): pattern,
}


@dataclass(frozen=True)
class Outcome:
    """The sparsity of a pruned network and its accuracy in each way, in [0, 1]."""

    sparsity: float
    untrained: float
    at_once: float
    in_rounds: float


WAYS = ("one-shot", "one-shot, then trained", "in rounds, each trained")


def main() -> None:
    """Measures every method at every level, for every seed, and prints the means."""
    digits = read_digits()
    names = [name for name in METHODS for _ in SEEDS]
    # One process for each core: threads only slow down a network this small.
    with ProcessPoolExecutor(None, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        models = list(pool.map(trained, SEEDS))
        whole = statistics.mean(accuracy(model, digits) for model in models)
        found = list(pool.map(measure_levels, names, models * len(METHODS)))
    print(f"Accuracy in per cent, {whole:.1%} unpruned; means of {len(SEEDS)} seeds.\n")
    of_seeds = {
        name: [levels for other, levels in zip(names, found, strict=True) if other == name]
        for name in METHODS
    }
    print(table({name: mean_levels(levels) for name, levels in of_seeds.items()}))


def trained(seed: int) -> LeNet:
    """Trains a network that reads digits."""
    torch.manual_seed(seed)
    model = LeNet()
    train(model, read_digits(), EPOCHS)
    return model


def measure_levels(name: str, model: LeNet) -> list[Outcome]:
    """Measures a method at each of LEVELS."""
    digits = read_digits()
    with secateur.embedded(device="cpu") as client:
        return [measure(client, model, digits, METHODS[name](level)) for level in LEVELS]


def measure(client: secateur.Client, model: LeNet, digits: Digits, spec: secateur.Spec) -> Outcome:
    """Prunes copies of a network in each way."""
    torch.manual_seed(0)  # for the order of the images
    result = client.prune(model, spec, progress=False)
    pruned = pruned_copy(model, result)
    untrained = accuracy(pruned, digits)
    train(pruned, digits, ROUNDS)
    at_once = accuracy(pruned, digits)
    gradually = copy.deepcopy(model)
    for step in range(1, ROUNDS + 1):
        due = spec.at(step, ROUNDS, "cubic")
        client.prune(gradually, due, progress=False).apply_to(gradually)
        train(gradually, digits, 1)
    return Outcome(result.report.sparsity, untrained, at_once, accuracy(gradually, digits))


def mean_levels(of_seeds: Iterable[list[Outcome]]) -> list[Outcome]:
    """Returns the mean outcome at each level."""
    return [
        Outcome(*map(statistics.mean, zip(*map(astuple, level), strict=True)))
        for level in zip(*of_seeds, strict=True)
    ]


def table(found: dict[str, list[Outcome]]) -> str:
    """Formats the Markdown table, with the sparsity of methods that miss the levels."""
    lines = [["method", "", *(f"{level:.0%}" for level in LEVELS)]]
    lines.append(["---", "---", *("---:" for _ in LEVELS)])
    for name, outcomes in found.items():
        sparsity, *ways = zip(*map(astuple, outcomes), strict=True)
        rows = list(zip(WAYS, ways, strict=True))
        if any(abs(own - level) > 0.005 for own, level in zip(sparsity, LEVELS, strict=True)):
            rows.insert(0, ("its sparsity", sparsity))
        for first, (way, values) in enumerate(rows):
            lines.append(["" if first else name, way, *(f"{100 * v:.1f}" for v in values)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
