"""Measures the tensors of a report: small ones many at once, the others one by one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from secateur_server.backends.batches import are_many, batched
from secateur_server.report.measure import Sparsity, measure
from secateur_server.report.measure_small import Measured, measure_small
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.parameter import Parameter


@dataclass(frozen=True)
class MeasuredTensors:
    """The counts of some parameters.

    Attributes:
        parameters: The parameters, in the order of the report.
        batches: Names of small tensors, with the counts of all of them.
        others: The counts of each other tensor, by its name.
    """

    parameters: Mapping[str, Parameter]
    batches: Sequence[tuple[Sequence[str], Measured]]
    others: Mapping[str, Sparsity]


def measure_tensors(
    context: RequestContext, parameters: Mapping[str, Parameter]
) -> MeasuredTensors:
    """Measures parameters."""
    small = [n for n, p in parameters.items() if p.is_small and p.weight.dim()]
    small = small if are_many(small) else []
    batches = []
    for part in batched([parameters[name].weight.numel() for name in small]):
        context.check()
        names = small[part]
        batches.append((names, measure_small(context, [parameters[name] for name in names])))
    known = set(small)
    others = {n: measure(context, p) for n, p in parameters.items() if n not in known}
    return MeasuredTensors(parameters, batches, others)
