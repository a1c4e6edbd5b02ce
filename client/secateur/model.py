"""A model that a caller gives, as the other modules read it."""

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from secateur.folders import Folder
from secateur.onnx.files import OnnxFile
from secateur.shards import Index
from secateur.tensors import LocalTensor
from secateur.torch_files import TorchFile
from secateur_proto.ties import read_ties

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Source:
    """A model in this process, or the place of one on the server.

    Attributes:
        tensors: In the state_dict's order.
        parameters: The names that a Prune sends. Of a Module its buffers are not among them, as
            torch.nn.utils.prune prunes parameters only.
        as_torch: Whether results are tensors of torch, or arrays.
        metadata: The metadata of a safetensors file of the tensors, with the names of tied ones.
        paths: The safetensors files that it is read from, and their index.
        index: The index of a model in shards.
        place: The field of a header that names a model on the server; empty for one here.
        others: Entries that are not sent, as safetensors has no dtype for them.
        order: The names of all entries, `others` included, in the state_dict's order.
        torch_file: The file of torch.save that it is read from, with all else that the file holds.
        folder: The folder that it is read from, with all other files in it.
        onnx_file: The ONNX model that it is read from.
    """

    tensors: Mapping[str, LocalTensor]
    parameters: frozenset[str]
    as_torch: bool
    metadata: Mapping[str, str] = field(default_factory=dict)
    paths: tuple[Path, ...] = ()
    index: Index | None = None
    place: Mapping[str, Any] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    torch_file: TorchFile | None = None
    folder: Folder | None = None
    onnx_file: OnnxFile | None = None

    @property
    def is_here(self) -> bool:
        """Whether it is in this process."""
        return not self.place

    @cached_property
    def other_names(self) -> Mapping[str, str]:
        """From each other name of a tied tensor to its name in `tensors`; a pair is its X."""
        return read_ties(self.metadata, self.tensors).names

    @property
    def elements(self) -> int:
        """How many elements its tensors have, without the masks of pairs."""
        masks = self.pairs().values()
        return sum(math.prod(t.shape) for name, t in self.tensors.items() if name not in masks)

    def pairs(self) -> dict[str, str]:
        """Maps each X whose pair X_orig, X_mask is here to the name of its mask."""
        names = self.parameters & self.tensors.keys()
        origs = (name for name in names if name.endswith("_orig"))
        bases = (name.removesuffix("_orig") for name in origs)
        return {base: f"{base}_mask" for base in bases if self._is_pair(base)}

    def _is_pair(self, base: str) -> bool:
        """Whether X_orig has an X_mask. The server checks the masks of floating tensors."""
        orig, mask = self.tensors[f"{base}_orig"], f"{base}_mask"
        if mask not in self.parameters or mask in self.others:
            return False
        if orig.kind == "integer":  # integers have such names for other reasons too
            is_free = base not in self.tensors
            fits = self.tensors[mask].shape == orig.shape
            return is_free and fits and self.tensors[mask].kind is not None
        return orig.kind == "floating"

    def sent(self) -> dict[str, LocalTensor]:
        """Returns the tensors that a Prune sends."""
        return {name: t for name, t in self.tensors.items() if name in self.parameters}

    def sending(self, names: Set[str]) -> "Source":
        """Returns the source with more entries that a Prune sends, such as buffers of a Module."""
        return replace(self, parameters=self.parameters.union(names & self.tensors.keys()))

    def only_parameters(self) -> "Source":
        """Returns the source without the entries that a Prune does not send."""
        if self.parameters.issuperset(self.order):
            return self
        others = {name: value for name, value in self.others.items() if name in self.parameters}
        return replace(self, tensors=self.sent(), others=others)

    def unsent(self) -> dict[str, Any]:
        """Returns the entries that a Prune does not send: a Module's buffers, and `others`."""
        return {**self.unsent_tensors(), **self.others}

    def unsent_tensors(self) -> dict[str, LocalTensor]:
        """Returns the tensors that a Prune does not send: a Module's buffers."""
        return {n: t for n, t in self.tensors.items() if n not in self.parameters}

    def places(self) -> dict[str, int]:
        """Maps the names that a result may have to their places in `order`.

        A pair takes the place of its X, and X that of its X_orig.
        """
        places = {name: place for place, name in enumerate(self.order)}
        for place, name in enumerate(self.order):
            for derived in (f"{name}_orig", f"{name}_mask", name.removesuffix("_orig")):
                places.setdefault(derived, place)
        return places

    def ordered(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Returns entries of a result in the state_dict's order; new names are last."""
        places = self.places()
        names = sorted(entries, key=lambda name: places.get(name, len(places)))
        return {name: entries[name] for name in names}

    def prunable(self) -> dict[str, LocalTensor]:
        """Returns the floating parameters; a pair is its X, with the values of X_orig."""
        pairs = self.pairs()
        names = {f"{base}_orig": base for base in pairs}
        weights = self.parameters.difference(pairs.values())
        return {
            names.get(stored, stored): tensor
            for stored, tensor in self.tensors.items()
            if stored in weights and tensor.kind == "floating"
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the floating parameters; a pair is its X."""
        return {name: tensor.shape for name, tensor in self.prunable().items()}

    def prunable_names(self) -> dict[str, str]:
        """Maps every name of the floating parameters, in their order, to that in `prunable`.

        Other names that only a file's metadata has are last.
        """
        names = {name: name for name in self.prunable()}
        names |= {other: name for other, name in self.other_names.items() if name in names}
        places = self.places()
        return {n: names[n] for n in sorted(names, key=lambda n: places.get(n, len(places)))}

    def tied_names(self) -> dict[str, str]:
        """Returns prunable_names() without the names that have no place in the state_dict."""
        places = self.places()
        return {known: name for known, name in self.prunable_names().items() if known in places}
