"""What a smaller module gains: parameters, bytes, operations and time."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from secateur.display.notebook import Displayed
from secateur.errors import InvalidSpec
from secateur.evaluation import arguments_of, brief, in_evaluation
from secateur.tables import Table
from secateur.tensors import torch_for

# How often each module runs, in turn with the other one.
RUNS = 11


@dataclass(frozen=True)
class Cost:
    """What a module needs.

    Attributes:
        parameters: Elements of its state_dict, as `report.shrinkage` counts them: a tied tensor
            counts once, and a mask of torch.nn.utils.prune does not.
        bytes: Of these.
        macs: Multiply-accumulate operations of one forward pass, as far as
            torch.utils.flop_counter counts them: of convolutions, matrix products and attention.
        seconds: The median time of one forward pass.
        fastest: The shortest time.
        slowest: The longest time.
    """

    parameters: int
    bytes: int
    macs: int
    seconds: float
    fastest: float
    slowest: float

    @property
    def times(self) -> str:
        """The median time with the shortest and the longest one."""
        low, high = f"{1e3 * self.fastest:,.2f}", f"{1e3 * self.slowest:,.2f}"
        return f"{1e3 * self.seconds:,.2f} ms ({low}-{high})"


@dataclass(frozen=True)
class Gain(Displayed):
    """A module before and after.

    Attributes:
        before: What it needed.
        after: What it needs now.
    """

    before: Cost
    after: Cost

    @property
    def speedup(self) -> float:
        """How many times as fast it is."""
        return self.before.seconds / self.after.seconds

    def table(self) -> Table:
        """Returns a row for each measure."""
        before, after = self.before, self.after
        counts = [
            ("parameters", before.parameters, after.parameters),
            ("bytes", before.bytes, after.bytes),
            ("multiply-accumulates", before.macs, after.macs),
        ]
        rows = [("", "before", "after", "ratio")]
        rows += [(what, f"{a:,}", f"{b:,}", f"{a / max(1, b):.2f}") for what, a, b in counts]
        rows.append(("one forward pass", before.times, after.times, f"{self.speedup:.2f}"))
        return Table(rows)


def gain(before: Any, after: Any, inputs: Any) -> Gain:
    """Measures what a module and a smaller one need, in turn in one run.

    Args:
        before: A torch.nn.Module.
        after: The smaller one, such as PruneResult.shrink returns.
        inputs: What forward takes: a tensor, a tuple of arguments, or a mapping of keywords.

    Returns:
        Both costs, of forward passes in evaluation without gradients. Print it for a table.

    Raises:
        InvalidStateDict: `before` or `after` is not a torch.nn.Module.
        InvalidSpec: A module cannot run on the inputs.
    """
    torch = torch_for("gain")
    from secateur.in_place import check_module

    for module in (before, after):
        check_module(module)
    args, keywords = arguments_of(inputs)
    named = (("before", before), ("after", after))
    seconds: list[list[float]] = [[], []]
    with in_evaluation(before, after), torch.inference_mode():
        macs = [_macs(what, module, args, keywords) for what, module in named]
        for _ in range(RUNS):
            for module, found in zip((before, after), seconds, strict=True):
                begin = time.perf_counter()
                module(*args, **keywords)
                found.append(time.perf_counter() - begin)
    costs = [
        Cost(*_sizes(module), count, float(np.median(found)), min(found), max(found))
        for module, count, found in zip((before, after), macs, seconds, strict=True)
    ]
    return Gain(*costs)


def _macs(what: str, module: Any, args: Any, keywords: Any) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        try:
            module(*args, **keywords)
        except Exception as error:
            raise InvalidSpec(f"inputs: `{what}` cannot run on them: {brief(error)}") from error
    return int(counter.get_total_flops()) // 2


def _sizes(module: Any) -> tuple[int, int]:
    from secateur.resizing.modules import saved_tensors

    tensors = {id(tensor): tensor for _, tensor in saved_tensors(module)}.values()
    return sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors)
