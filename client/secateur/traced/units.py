"""Slices of tensors that are cut together: classes of labels."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NO_UNIT = 0


@dataclass(frozen=True)
class Named:
    """The labels of the slices of a tensor of the state_dict along one dimension."""

    tensor: str
    dim: int
    labels: Tensor


class Units:
    """Labels of slices, and which of them belong to one unit: a disjoint-set forest.

    Label 0 is never cut. A frozen class is not cut either, and has the reason.
    """

    def __init__(self) -> None:
        self.named: list[Named] = []
        self._parent = np.arange(1024)  # longer than what is in use
        self._size = 1
        self._reasons: dict[int, str] = {}
        self._produced: list[Tensor] = []

    def fresh(self, length: int) -> Tensor:
        """Returns new labels, each a class of its own; a single slice has none."""
        if length < 2:
            return torch.zeros(length, dtype=torch.int64)
        start, self._size = self._size, self._size + length
        if self._size > len(self._parent):
            unused = np.arange(len(self._parent), 2 * self._size)
            self._parent = np.concatenate([self._parent, unused])
        return torch.arange(start, self._size)

    def name(self, tensor: str, shape: tuple[int, ...]) -> list[Tensor]:
        """Returns new labels for each dimension of a tensor of the state_dict."""
        labels = [self.fresh(length) for length in shape]
        self.named += [Named(tensor, dim, along) for dim, along in enumerate(labels)]
        return labels

    def find(self, labels: Tensor) -> Tensor:
        """Returns the representative of each label's class."""
        found = self._parent[labels.numpy()]
        while not np.array_equal(found, parents := self._parent[found]):
            found = parents
        return torch.from_numpy(np.asarray(found))

    def union(self, a: Tensor, b: Tensor, reason: str) -> None:
        """Makes the classes of a and b one, element by element; the shapes are broadcast.

        Args:
            a: Labels.
            b: Labels.
            reason: Why a class stays whole that meets NO_UNIT.
        """
        met = np.broadcast_arrays(self.find(a).numpy(), self.find(b).numpy())
        pairs = np.stack(met, -1).reshape(-1, 2)
        for first, second in np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0).tolist():
            self._join(self._root(first), self._root(second), reason)

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Keeps the classes of labels whole; the first reason of a class stands."""
        for root in np.unique(self.find(labels).numpy()).tolist():
            if root != NO_UNIT:
                self._reasons.setdefault(root, reason)

    def produce(self, labels: Tensor) -> None:
        """Notes that a layer makes these slices, so that a caller may want to prune them."""
        self._produced.append(labels.reshape(-1))

    def produced(self) -> Tensor:
        """Returns all labels that a layer makes."""
        return torch.cat([*self._produced, torch.zeros(0, dtype=torch.int64)])

    def units(self, labels: Tensor) -> Tensor:
        """Returns the representative of each label's class, and NO_UNIT for what is not cut."""
        found = self.find(labels)
        frozen = torch.tensor([NO_UNIT, *self._reasons])
        return found.masked_fill(torch.isin(found, frozen), NO_UNIT)

    def reason(self, label: int) -> str:
        """Returns why a label's class is whole."""
        return self._reasons[self._root(label)]

    def _root(self, label: int) -> int:
        while label != self._parent[label]:
            label = int(self._parent[label])
        return label

    def _join(self, a: int, b: int, reason: str) -> None:
        root, child = min(a, b), max(a, b)
        if root == child:
            return
        if root == NO_UNIT:
            self._reasons.setdefault(child, reason)
            return
        self._parent[child] = root
        if child in self._reasons:
            self._reasons.setdefault(root, self._reasons.pop(child))
