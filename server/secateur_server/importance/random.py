"""Random numbers as scores."""

from dataclasses import dataclass

from torch import Tensor

from secateur_proto import spec_pb2 as pb
from secateur_server.backends.masks import Mask
from secateur_server.backends.randomness import RandomScores, random_scores
from secateur_server.backends.scores import stored_scores
from secateur_server.granularity import Granularity
from secateur_server.importance.protocol import Importance
from secateur_server.runtime.context import RequestContext


@dataclass(frozen=True)
class Random(Importance):
    """Pseudo-random numbers that depend on the seed, in [0, 2^64), and the name of the tensor."""

    seed: int

    is_measured = False

    @classmethod
    def decode(
        cls, selection: pb.Selection, granularity: Granularity | None, path: str
    ) -> "Random":
        """Reads `random`."""
        return cls(selection.random.seed)

    def by_name(self, name: str) -> RandomScores | None:
        return random_scores(self.seed, name)

    def elements(self, context: RequestContext, name: str, values: Tensor) -> Tensor:
        return stored_scores(context, random_scores(self.seed, name), values)

    def scores(
        self,
        context: RequestContext,
        values: Tensor,
        mask: Mask | None,
        granularity: Granularity,
        is_mean: bool,
    ) -> Tensor:
        raise AssertionError("random scores depend on the name alone")
