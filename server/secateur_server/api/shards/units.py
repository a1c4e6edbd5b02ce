"""The units of a file that are compared with those of other files, and tasks that score them."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from secateur_server.api.shards.work import FileWork, forget, state_before
from secateur_server.backends.pieces import Piece
from secateur_server.backends.protocol import Backend
from secateur_server.cut.drivers import Cluster, Driver
from secateur_server.cut.drivers.places import ByPlace
from secateur_server.cut.score import Ranking, score_dtype
from secateur_server.cut.scored import ScoredTensor, score_tensors
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.rules import Selection
from secateur_server.uris.references import Reference

# Files whose scores a process of the cluster keeps for the next task.
KEPT_SCORES = 4


@dataclass(frozen=True)
class Units:
    """The units of tensors of a file that are compared. See backends.pieces.Observed.

    Attributes:
        work: The file, with the rules before this one.
        rule: For those tensors of the file whose units are compared.
        token: Differs between all rules of all calls.
        tensor: The name of the only tensor whose units are meant; empty: all.
        units: How many.
        dtype: In which all scores are compared.
        most: The most units of a piece.
    """

    work: FileWork
    rule: Selection
    token: str
    tensor: str = ""
    units: int = 0
    dtype: torch.dtype = torch.float32
    most: int = 0

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.work.size

    @property
    def place(self) -> Reference:
        """The file, so that its next task is on the same node."""
        return self.work.reference

    def read(self, context: RequestContext) -> list[Piece]:
        """Returns the units as pieces, in their order."""
        scored = _scored(context, self)
        some = [scored[self.tensor]] if self.tensor else scored.values()
        return [piece for ranking, _ in some for piece in ranking.pieces(self.dtype, self.most)]


class Summary(NamedTuple):
    """What is known of the units of a tensor before their scores are counted. See ScoredTensor."""

    units: int
    candidates: int
    dtype: torch.dtype
    offset: float
    unit_bytes: int | None
    sparse_share: float


@dataclass(frozen=True)
class FarTensor:
    """A tensor, or all compared tensors of a file, whose scores are where the file is.

    It is a RankedTensor, and its own ranking.
    """

    name: str
    units: int
    candidates: int
    dtype: torch.dtype
    offset: float
    unit_bytes: int | None
    sparse_share: float
    observed: Units
    cluster: Cluster

    @property
    def ranking(self) -> "FarTensor":
        """The scores."""
        return self

    def driver(self, context: RequestContext) -> Driver:
        """Returns the driver of the scores."""
        return ByPlace(self.cluster)

    def pieces(self, dtype: torch.dtype, size: int) -> list[Units]:
        """Returns all units, to be read in pieces of at most `size`, and compared as `dtype`."""
        return [replace(self.observed, units=self.units, dtype=dtype, most=size)]


_kept: OrderedDict[tuple[str, Reference], dict[str, tuple[Ranking, Summary]]] = OrderedDict()


def summarize(context: RequestContext, backend: Backend, units: Units) -> list[Summary]:
    """Scores units, and counts them. Returns a summary of each tensor."""
    return [summary for _, summary in _scored(context, units).values()]


def _scored(context: RequestContext, units: Units) -> dict[str, tuple[Ranking, Summary]]:
    """The scores of all tensors, after the rules before."""
    key = units.token, units.work.reference
    if key not in _kept:
        for other in [of for of in _kept if of[1] == units.work.reference]:
            del _kept[other]  # normalized scores are as large as the file
        state = state_before(context, units.work)
        scored = score_tensors(context, units.rule, units.rule.tensors, state, {})
        _kept[key] = {tensor.name: (tensor.ranking, _summary(tensor)) for tensor in scored}
        forget(_kept, KEPT_SCORES)
    _kept.move_to_end(key)
    return _kept[key]


def _summary(tensor: ScoredTensor) -> Summary:
    ranking = tensor.ranking
    of_ranking = ranking.units, tensor.candidates, ranking.dtype, ranking.offset
    return Summary(*of_ranking, tensor.unit_bytes, tensor.sparse_share)


def far_tensors(
    cluster: Cluster, units: Sequence[Units], summaries: Sequence[Sequence[Summary]]
) -> list[list[FarTensor]]:
    """Returns the tensors of each file.

    Args:
        cluster: Works on the files.
        units: Of each file.
        summaries: Of each tensor of each file.
    """
    return [
        [
            FarTensor(name, *summary, replace(of_file, tensor=name), cluster)
            for name, summary in zip(of_file.rule.tensors, some, strict=True)
        ]
        for of_file, some in zip(units, summaries, strict=True)
    ]


def as_one(tensors: Sequence[FarTensor]) -> FarTensor:
    """Returns tensors of a file as one: fewer histograms, where none has bounds of its own."""
    return replace(
        tensors[0],
        name="",
        units=sum(tensor.units for tensor in tensors),
        candidates=sum(tensor.candidates for tensor in tensors),
        dtype=score_dtype(tensors),
        observed=replace(tensors[0].observed, tensor=""),
    )
