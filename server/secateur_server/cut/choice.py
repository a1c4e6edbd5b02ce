"""Outcomes of a rule's choices among units."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Bound:
    """A guard rail that changed how many units of a tensor, or group, were pruned."""

    tensor: str
    rail: str
    pruned: int


@dataclass(frozen=True)
class Choice:
    """The outcome of one choice among `candidates` units. The fields are those of the report."""

    tensors: tuple[str, ...]
    candidates: int
    requested: int
    pruned: int
    threshold: float | None = None
    ties: int = 0
    ties_pruned: int = 0
    bounds: tuple[Bound, ...] = ()


@dataclass(eq=False)
class ChoiceTable(Sequence[Choice]):
    """The choices of many tensors, each pruned separately and without guard rails.

    Attributes:
        tensors: The tensor of each choice.
        candidates, requested, pruned, ties, ties_pruned: As in Choice, one for each choice.
        thresholds: NaN for a choice without a threshold.
    """

    tensors: Sequence[str]
    candidates: Ints
    requested: Ints
    pruned: Ints
    thresholds: Floats
    ties: Ints
    ties_pruned: Ints

    @classmethod
    def empty(cls, tensors: Sequence[str]) -> "ChoiceTable":
        """Makes a table to be written to, by which nothing is pruned yet."""
        candidates, requested, pruned, ties, ties_pruned = np.zeros((5, len(tensors)), np.int64)
        none = np.full(len(tensors), np.nan)
        return cls(tensors, candidates, requested, pruned, none, ties, ties_pruned)

    @cached_property
    def places(self) -> Mapping[str, int]:
        """The index of each tensor, by its name."""
        return {name: place for place, name in enumerate(self.tensors)}

    def set(self, choice: Choice) -> None:
        """Writes the choice of one of the tensors."""
        index = self.places[choice.tensors[0]]
        self.candidates[index], self.requested[index] = choice.candidates, choice.requested
        self.pruned[index] = choice.pruned
        self.ties[index], self.ties_pruned[index] = choice.ties, choice.ties_pruned
        self.thresholds[index] = np.nan if choice.threshold is None else choice.threshold

    def __len__(self) -> int:
        return len(self.tensors)

    @overload
    def __getitem__(self, index: int) -> Choice: ...

    @overload
    def __getitem__(self, index: slice) -> list[Choice]: ...

    def __getitem__(self, index: int | slice) -> Choice | list[Choice]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        value = float(self.thresholds[index])
        return Choice(
            (self.tensors[index],),
            int(self.candidates[index]),
            int(self.requested[index]),
            int(self.pruned[index]),
            None if np.isnan(value) else value,
            int(self.ties[index]),
            int(self.ties_pruned[index]),
        )

    def __iter__(self) -> Iterator[Choice]:
        return (self[index] for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]
