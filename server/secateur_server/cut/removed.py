"""What amounts would do: the outcomes of a plan."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from secateur_server.cut.choice import Choice, Floats, Ints


@dataclass(frozen=True)
class Removed:
    """What would go of a tensor.

    elements: unpruned ones that go.  energy: the sum of their squares.
    whole: the sum of squares of all that are unpruned before.
    """

    elements: int
    energy: float
    whole: float


@dataclass(frozen=True, eq=False)
class RemovedTable(Mapping[str, Removed]):
    """What would go of many tensors.

    Attributes:
        places: Of each tensor, by its name, where it is in the others.
        elements, energy, whole: As of Removed.
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
    """What one amount would do."""

    @property
    def choices(self) -> Sequence[Choice]:
        """The rule's choices."""

    @property
    def removed(self) -> Mapping[str, Removed]:
        """What would go of each tensor."""


@dataclass(frozen=True)
class ListedOutcome:
    """An outcome."""

    choices: Sequence[Choice]
    removed: Mapping[str, Removed]
