"""Predicted outcomes of amounts, which make up a plan."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from secateur_server.cut.choice import Choice, Floats, Ints


@dataclass(frozen=True)
class Removed:
    """What an amount prunes of a tensor.

    Attributes:
        elements: Elements that it prunes and that were unpruned before.
        energy: The sum of their squares.
        whole: The sum of squares of all elements that were unpruned before.
    """

    elements: int
    energy: float
    whole: float


@dataclass(frozen=True, eq=False)
class RemovedTable(Mapping[str, Removed]):
    """What an amount prunes of many tensors.

    Attributes:
        places: The index of each tensor, by its name.
        elements, energy, whole: As in Removed, one for each tensor.
    """

    places: Mapping[str, int]
    elements: Ints
    energy: Floats
    whole: Floats

    def __getitem__(self, name: str) -> Removed:
        index = self.places[name]
        return Removed(
            int(self.elements[index]), float(self.energy[index]), float(self.whole[index])
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


class Outcome(Protocol):
    """The predicted outcome of one amount."""

    @property
    def choices(self) -> Sequence[Choice]:
        """The choices of the rule."""

    @property
    def removed(self) -> Mapping[str, Removed]:
        """What is pruned of each tensor."""


@dataclass(frozen=True)
class ListedOutcome:
    """An outcome with its choices listed."""

    choices: Sequence[Choice]
    removed: Mapping[str, Removed]
