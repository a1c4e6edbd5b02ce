"""The magnitude of weights, times factors of the layer's activations: Wanda, and RIA.

Sun et al. 2023, A Simple and Effective Pruning Approach for Large Language Models. Zhang et al.
2024, Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from secateur_proto import spec_pb2 as pb
from secateur_server.backends.keys import INFINITY
from secateur_server.backends.masks import Mask
from secateur_server.errors import InvalidScores, InvalidSpec, quote
from secateur_server.granularity import Granularity
from secateur_server.importance.products import Products, sums_of
from secateur_server.importance.protocol import Importance, Uploads
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.parameter import Parameter


@dataclass(frozen=True)
class Activation(Importance):
    """|w|^p times factors of the inputs and outputs of a layer; larger units have the mean.

    Attributes:
        path: In the request.
        p: Above 0.
        inputs: From the name of a tensor to the uploaded tensor with its factors.
        outputs: As `inputs`; each tensor is in one of them, or in both.
        is_relative: Whether |w| is its share of its row plus that of its column.
    """

    path: str
    p: float
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    is_relative: bool

    order = 1.0

    @classmethod
    def decode(
        cls, selection: pb.Selection, granularity: Granularity | None, path: str
    ) -> "Activation":
        """Reads `activation`.

        Raises:
            InvalidSpec: The exponent is not above 0 and finite.
        """
        activation, path = selection.activation, f"{path}.activation"
        p = activation.p or 1.0
        if not 0 < p < math.inf:
            raise InvalidSpec(f"{path}.p", f"{p} is not above 0 and finite")
        inputs, outputs = dict(activation.inputs), dict(activation.outputs)
        return cls(path, p, inputs, outputs, activation.is_relative)

    @property
    def uploads(self) -> Uploads:
        return {"activation.inputs": self.inputs, "activation.outputs": self.outputs}

    def with_uploads(self, uploads: Uploads) -> "Activation":
        inputs, outputs = uploads.values()
        return replace(self, inputs=inputs, outputs=outputs)

    def check(self, path: str, name: str, shape: Sequence[int]) -> None:
        if name not in self.inputs and name not in self.outputs:
            raise InvalidSpec(
                f"{self.path}.inputs",
                f"{quote(name)} is missing; send its factors, or leave it out of the rule",
            )

    def check_upload(
        self, field: str, path: str, shape: Sequence[int], uploaded: Sequence[int]
    ) -> None:
        is_of_inputs = field == "activation.inputs"
        if not (_is_broadcast(shape, uploaded) or _is_vector(shape, uploaded, is_of_inputs)):
            what = "input" if is_of_inputs else "output"
            length = shape[min(is_of_inputs, len(shape) - 1)] if shape else 1
            raise InvalidScores(
                path,
                f"has shape {list(uploaded)}; send {length} factors, one for each {what}, or "
                f"{len(shape)} dimensions, each 1 or as in {list(shape)}",
            )

    def products(
        self,
        context: RequestContext,
        name: str,
        parameter: Parameter,
        extras: Mapping[str, Tensor],
    ) -> Products:
        weight, mask, seen = parameter
        shape, canonical = weight.shape, _canonical(weight.shape)
        factors = [
            _factors(extras[of_field[name]], shape, canonical, field == "activation.inputs")
            for field, of_field in self.uploads.items()
            if name in of_field
        ]
        sums = sums_of(context, weight, mask, canonical) if self.is_relative else None
        is_finite = seen is not None and seen.largest < INFINITY.get(weight.dtype, 0)
        return Products(weight.reshape(canonical), self.p, tuple(factors), sums, is_finite)

    def check_values(self, context: RequestContext, extras: Mapping[str, Tensor]) -> None:
        for field, of_field in self.uploads.items():
            for name, holder in context.each(of_field.items()):
                path = f"{self.path}.{field.rpartition('.')[2]}[{quote(name)}]"
                _check_factors(path, holder, extras[holder])

    def scores(
        self,
        context: RequestContext,
        values: Tensor,
        mask: Mask | None,
        granularity: Granularity,
        is_mean: bool,
    ) -> Tensor:
        return granularity.scores(context, values, mask, 1.0, is_mean=True)


def _canonical(shape: Sequence[int]) -> tuple[int, int, int]:
    """The sizes of the rows, the inputs, and all other dimensions."""
    rows, inputs, *rest = (*shape, 1, 1)[: max(2, len(shape))]
    return rows, inputs, math.prod(rest)


def _is_broadcast(shape: Sequence[int], uploaded: Sequence[int]) -> bool:
    """Whether factors have the dimensions of a tensor, each 1 or as long."""
    sizes = zip(shape, uploaded, strict=False)
    return len(shape) == len(uploaded) and all(found in (1, size) for size, found in sizes)


def _is_vector(shape: Sequence[int], uploaded: Sequence[int], is_of_inputs: bool) -> bool:
    """Whether there is a factor for each input, or output, of a layer."""
    if len(uploaded) != 1 or len(shape) < 2:
        return False
    if not is_of_inputs or 0 in shape:
        return uploaded[0] == shape[int(is_of_inputs)]
    groups, left = divmod(uploaded[0], shape[1])
    if len(shape) == 2 and groups > 1:  # only convolutions have groups
        return False
    return groups > 0 and left == 0 and shape[0] % groups == 0


def _factors(
    factors: Tensor, shape: Sequence[int], canonical: tuple[int, int, int], is_of_inputs: bool
) -> Tensor:
    """Factors as Products has them, of a tensor that check_upload accepts."""
    rows, inputs, _ = canonical
    if len(factors.shape) == len(shape):
        first, second, *others = (*factors.shape, 1, 1)[: max(2, len(shape))]
        if math.prod(others) > 1:  # the other dimensions are one
            factors = factors.expand(first, second, *shape[2:])
        return factors.reshape(first, second, -1)
    if not is_of_inputs:
        return factors.view(rows, 1, 1)
    groups = len(factors) // inputs
    by_group = factors.view(groups, inputs, 1)
    # Each group of outputs has inputs of its own.
    return by_group if groups == 1 else by_group.repeat_interleave(rows // groups, 0)


def _check_factors(path: str, holder: str, factors: Tensor) -> None:
    """Raises InvalidScores for a factor that is NaN, infinite or negative."""
    wrong = ~(factors.isfinite() & (factors >= 0))
    if not wrong.any():
        return
    first = wrong.nonzero()[0].tolist()
    raise InvalidScores(
        path,
        f"{quote(holder)} is {factors[tuple(first)].item()} at {first}, and wrong in "
        f"{int(wrong.count_nonzero())} of {wrong.numel()} elements; factors are finite and not "
        "negative",
    )
