"""How much smaller and faster shrunk models are, beside Torch-Pruning's, in one run.

    make gains                                        # 3 minutes
    python benchmarks/gains.py --json FILE

secateur prunes a fraction of the channels of each layer with `align=16`, and Torch-Pruning with
`round_to=16` the fraction that makes the number of parameters most alike. Times are of onnxruntime
with one thread: the exported models run in turn. So do both ways of pruning, TURNS times: their
times are medians.
Needs torch-pruning, onnx, onnxruntime, onnxscript and transformers.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import torch_pruning
from torch import Tensor, nn

import nets
import secateur
import zeros
from common import environment, medians, timed

ALIGN = 16
TURNS = 7


@dataclass(frozen=True)
class Made:
    """A network as a pruner made it.

    Attributes:
        module: The network.
        seconds: To trace, to prune and cut, and to check the result; Torch-Pruning does not check,
            and all else is one figure.
    """

    module: nn.Module
    seconds: list[float]


def by_secateur(client: secateur.Client, module: nn.Module, inputs: Any, fraction: float) -> Made:
    """Traces the groups, prunes the lowest L1 norms of each, and cuts."""
    traced, groups = timed(lambda: secateur.groups(module, inputs))
    begin = time.perf_counter()
    spec = secateur.grouped(list(groups), fraction, scope="tensor", align=ALIGN)
    result = client.prune(module, spec, output="shrunk", progress=False)
    smaller = result.shrink(module)
    cut = time.perf_counter() - begin
    checked, _ = timed(lambda: result.shrink(module, inputs))
    return Made(smaller, [traced, cut, checked])


def by_torch_pruning(module: nn.Module, inputs: Any, fraction: float) -> Made:
    """Does the same with Torch-Pruning's MagnitudePruner."""
    module = copy.deepcopy(module)
    begin = time.perf_counter()
    heads = [part for part in module.modules() if isinstance(part, nn.Linear)][-1:]
    pruner = torch_pruning.pruner.MagnitudePruner(
        module,
        inputs,
        importance=torch_pruning.importance.MagnitudeImportance(p=1),
        pruning_ratio=fraction,
        round_to=ALIGN,
        ignored_layers=heads,
    )
    pruner.step()
    return Made(module, [time.perf_counter() - begin])


def ratio_like(module: nn.Module, inputs: Any, smaller: nn.Module, fraction: float) -> float:
    """The ratio at which Torch-Pruning's network has most nearly as many parameters."""
    wanted = parameters(smaller)

    def distance(ratio: float) -> int:
        return abs(parameters(by_torch_pruning(module, inputs, ratio).module) - wanted)

    return min((fraction + step / 100 for step in range(-12, 13)), key=distance)


def parameters(module: nn.Module) -> int:
    """Counts them."""
    return sum(parameter.numel() for parameter in module.parameters())


def half_of_minilm(client: secateur.Client, module: nn.Module, fraction: float) -> Made:
    """Prunes heads and hidden channels of the feed-forward layers, from the config alone."""
    begin = time.perf_counter()
    parts = ("intermediate", "heads")
    groups = secateur.transformer_groups(nets.minilm_config(), parts)
    spec = secateur.grouped(groups, fraction, scope="tensor", align=1)
    result = client.prune(module, spec, output="shrunk", progress=False)
    return Made(result.shrink(module), [time.perf_counter() - begin])


def session_of(module: nn.Module, inputs: Sequence[Tensor], folder: Path) -> Callable[[], Any]:
    """Exports a module, and returns what runs it once."""
    path = folder / f"{id(module)}.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(module.eval(), tuple(inputs), dynamo=True, verbose=False)
    assert program is not None
    program.save(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    feeds = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    return lambda: session.run(None, feeds)


@dataclass(frozen=True)
class Compared:
    """A network before, as secateur shrinks it, and as Torch-Pruning does, if it can."""

    name: str
    parameters: list[int]
    macs: list[int]
    seconds: list[float]
    pruning: list[list[float]]


CASES: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "MobileNetV2, 30 %": (nets.mobilenet_v2, 0.3),
    "ResNet-18, 50 %": (nets.resnet18, 0.5),
    "ResNet-18, 70 %": (nets.resnet18, 0.7),
    "MiniLM, half of heads and FFN": (nets.minilm, 0.5),
}


def compare(names: Sequence[str] = tuple(CASES)) -> list[Compared]:
    """Measures each case."""
    with secateur.embedded() as client, tempfile.TemporaryDirectory() as folder:
        client.prune({"w": torch.randn(8, 8)}, secateur.l1_unstructured("w", 0.5))  # warm
        return [_compared(client, name, Path(folder)) for name in names]


def _compared(client: secateur.Client, name: str, folder: Path) -> Compared:
    make, fraction = CASES[name]
    torch.manual_seed(0)
    module = make().eval()
    is_text = make is nets.minilm
    inputs = nets.tokens() if is_text else nets.images()
    made = list(_made(client, module, inputs, fraction, is_text))
    modules = [module, *(one.module for one in made)]
    with torch.no_grad():
        for one in modules:
            one(*inputs)
    sessions = [session_of(one, inputs, folder) for one in modules]
    return Compared(
        name=name,
        parameters=[parameters(one) for one in modules],
        macs=[_macs(one, inputs) for one in modules],
        seconds=medians(sessions),
        pruning=[one.seconds for one in made],
    )


def _made(
    client: secateur.Client, module: nn.Module, inputs: Any, fraction: float, is_text: bool
) -> Iterator[Made]:
    if is_text:  # Torch-Pruning cannot prune its heads without code of one's own
        yield half_of_minilm(client, module, fraction)
        return
    by_secateur(client, module, inputs, fraction)  # the first call imports
    ours = by_secateur(client, module, inputs, fraction)
    ratio = ratio_like(module, inputs, ours.module, fraction)
    turns = [
        (by_secateur(client, module, inputs, fraction), by_torch_pruning(module, inputs, ratio))
        for _ in range(TURNS)
    ]
    for made in zip(*turns, strict=True):
        seconds = zip(*(one.seconds for one in made), strict=True)
        yield Made(made[0].module, [statistics.median(each) for each in seconds])


def _macs(module: nn.Module, inputs: Any) -> int:
    macs: int = secateur.gain(module, module, tuple(inputs)).before.macs
    return macs


COLUMNS = (
    "",
    "parameters",
    "MACs",
    "dense",
    "shrunk",
    "times as fast",
    "Torch-Pruning's",
    "its parameters",
    "our time to its",
    "trace, prune and cut, check",
    "Torch-Pruning in all",
)


def rows(compared: Sequence[Compared]) -> Iterator[tuple[str, ...]]:
    """The lines of the table."""
    for one in compared:
        dense, ours, *theirs = one.seconds
        line = [
            one.name,
            f"{one.parameters[1] / one.parameters[0]:.1%}",
            f"{one.macs[1] / one.macs[0]:.1%}",
            f"{dense * 1e3:.2f} ms",
            f"{ours * 1e3:.2f} ms",
            f"{dense / ours:.2f}",
        ]
        if theirs:
            line += [
                f"{theirs[0] * 1e3:.2f} ms",
                f"{one.parameters[2] / one.parameters[0]:.1%}",
                f"{ours / theirs[0]:.2f}",
            ]
        else:
            line += ["", "", ""]
        line += [" + ".join(f"{each:.2f}" for each in seconds) + " s" for seconds in one.pruning]
        yield (*line, *[""] * (len(COLUMNS) - len(line)))


def main() -> None:
    """Measures, prints, and writes a file where it is asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also writes every figure there")
    options = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in environment().items()), flush=True)
    found, of_zeros = compare(), zeros.compare()
    for table in ([COLUMNS, *rows(found)], [zeros.COLUMNS, *zeros.rows(of_zeros)]):
        print()
        for line in table:
            print(" | ".join(line), flush=True)
    if options.json:
        figures = {"gains": [asdict(one) for one in found], "zeros": of_zeros}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
