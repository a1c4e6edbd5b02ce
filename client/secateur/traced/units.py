"""Slices of tensors that are cut together: classes of labels."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

NO_UNIT = 0
Labels = npt.NDArray[np.int64]


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
        self._size = 1
        self._parent = np.zeros(1, np.int64)  # by label, as the two below; longer than `_size`
        self._text = np.zeros(1, np.int64)  # why a class is whole: an index of `_texts`, or -1
        self._is_made = np.zeros(1, np.bool_)
        self._texts = ["it is not cut"]

    def fresh(self, length: int) -> Tensor:
        """Returns new labels, each a class of its own; a single slice has none."""
        if length < 2:
            return torch.zeros(length, dtype=torch.int64)
        start, self._size = self._size, self._size + length
        if self._size > len(self._parent):
            unused = np.arange(len(self._parent), 2 * self._size)
            self._parent = np.concatenate([self._parent, unused])
            self._text = np.concatenate([self._text, np.full_like(unused, -1)])
            self._is_made = np.concatenate([self._is_made, np.zeros_like(unused, np.bool_)])
        return torch.arange(start, self._size)

    def name(self, tensor: str, shape: tuple[int, ...]) -> list[Tensor]:
        """Returns new labels for each dimension of a tensor of the state_dict."""
        labels = [self.fresh(length) for length in shape]
        self.named += [Named(tensor, dim, along) for dim, along in enumerate(labels)]
        return labels

    def find(self, labels: Tensor) -> Tensor:
        """Returns the representative of each label's class."""
        return torch.from_numpy(np.asarray(self._find(labels)))

    def union(self, a: Tensor, b: Tensor, reason: str) -> None:
        """Makes the classes of a and b one, element by element; the shapes are broadcast.

        Args:
            a: Labels.
            b: Labels.
            reason: Why a class stays whole that meets NO_UNIT.
        """
        pairs = np.stack(np.broadcast_arrays(self._find(a), self._find(b)), -1).reshape(-1, 2)
        differ = pairs[pairs[:, 0] != pairs[:, 1]]
        fixed = (differ == NO_UNIT).any(1)
        self.freeze(torch.from_numpy(differ[fixed]), reason)
        self._join(differ[~fixed])

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Keeps the classes of labels whole; the first reason of a class stands."""
        roots = self._find(labels)
        roots = roots[self._text[roots] < 0]
        if roots.size:
            self._text[roots] = len(self._texts)
            self._texts.append(reason)

    def produce(self, labels: Tensor) -> None:
        """Notes that a layer makes these slices, so that a caller may want to prune them."""
        self._is_made[labels.numpy()] = True

    def produced(self, labels: Tensor) -> Tensor:
        """Returns which labels are of slices that a layer makes."""
        return torch.from_numpy(self._is_made[labels.numpy()]) & (labels != NO_UNIT)

    def units(self, labels: Tensor) -> Tensor:
        """Returns the representative of each label's class, and NO_UNIT for what is not cut."""
        found = self._find(labels)
        return torch.from_numpy(np.where(self._text[found] < 0, found, NO_UNIT))

    def reason(self, label: int) -> str:
        """Returns why a label's class is whole."""
        return self._texts[int(self._text[self._root(label)])]

    def _find(self, labels: Tensor) -> Labels:
        found: Labels = self._parent[labels.numpy()]
        while not np.array_equal(found, parents := self._parent[found]):
            found = parents
        return found

    def _root(self, label: int) -> int:
        while label != self._parent[label]:
            label = self._parent[label] = self._parent[self._parent[label]]
        return label

    def _join(self, pairs: Labels) -> None:
        """Makes the classes of the two labels of each row one; the lowest label represents it."""
        while len(pairs):
            pairs.sort(1)
            np.minimum.at(self._parent, pairs[:, 1], pairs[:, 0])
            child, root = pairs[:, 1], self._parent[pairs[:, 1]]
            taken = (self._text[root] < 0) & (self._text[child] >= 0)
            self._text[root[taken]] = self._text[child[taken]]
            pairs = self._find(torch.from_numpy(pairs))
            pairs = pairs[pairs[:, 0] != pairs[:, 1]]
