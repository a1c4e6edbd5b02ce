"""Single elements: unstructured pruning."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from secateur_proto import spec_pb2 as pb
from secateur_server.backends.masks import Mask
from secateur_server.runtime.context import RequestContext


@dataclass(frozen=True)
class Element:
    """A unit is one element."""

    is_element, is_normed, is_part = True, False, False

    @classmethod
    def decode(cls, selection: pb.Selection, path: str) -> "Element":
        """Reads GRANULARITY_ELEMENT, which has no fields."""
        return cls()

    def check(self, path: str, name: str, shape: Sequence[int]) -> None:
        pass

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape)

    def candidates(self, context: RequestContext, values: Tensor, mask: Mask | None) -> Mask | None:
        return mask

    def scores(
        self, context: RequestContext, values: Tensor, mask: Mask | None, p: float, is_mean: bool
    ) -> Tensor:
        return values.reshape(-1)

    def expand(
        self, context: RequestContext, kept: Mask, values: Tensor, mask: Mask | None
    ) -> Mask:
        return kept

    def unit_elements(self, shape: Sequence[int]) -> int | None:
        return 1

    def costs(
        self, context: RequestContext, weight: Tensor, values: Tensor, mask: Mask | None
    ) -> tuple[Tensor, Tensor]:
        raise AssertionError("an element costs one element")
