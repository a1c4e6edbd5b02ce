"""A model between its files and the pruning: one file or shards, and the parameters in them."""

from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur_proto.ties import read_ties, write_ties
from secateur_server.backends import backend_for, spans
from secateur_server.backends.dtypes import TORCH_DTYPES
from secateur_server.backends.masks import Mask
from secateur_server.errors import InvalidPair, InvalidStateDict, quote
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.catalog import Catalog, Shape, Stored, match, read_catalog
from secateur_server.state_dict.fold import folded
from secateur_server.state_dict.given_masks import to_mask
from secateur_server.state_dict.parameter import Parameter
from secateur_server.wire.header import Entry, Header
from secateur_server.wire.index import Index
from secateur_server.wire.tensors import WireTensor
from secateur_server.wire.writer import (
    Outgoing,
    OutgoingFile,
    bytes_file,
    flat_file,
    state_dict_file,
    state_dict_head,
)


@dataclass(frozen=True)
class Shard:
    """A file of a model, of which it may be the only one."""

    filename: str
    entries: Sequence[Entry]
    metadata: Mapping[str, str]


class Model:
    """A state_dict.

    catalog is known once the headers are; the rest once `fill` has returned:
    tensors: what the files have, without the masks of pairs.
    parameters: what can be pruned, on the tensors' memory.
    extras: uploaded scores and masks.
    masks: of parameters that were pruned since the files were stored; they have prior ones in them.
    is_mapped: whether the weights are files, which are not to be written to.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        extras: Mapping[str, Stored],
        index: Index | None = None,
        is_mapped: bool = False,
    ) -> None:
        """Errors: InvalidPair, InvalidStateDict."""
        self.shards = shards
        self.index = index
        self.is_mapped = is_mapped
        self._shard_of = _shards_of(shards)
        entries = [entry for shard in shards for entry in shard.entries]
        stored = stored_of(entries)
        metadata = {k: v for shard in shards for k, v in shard.metadata.items()}
        self._ties = read_ties(metadata, stored)
        self.catalog: Catalog = read_catalog(stored, extras, self._ties.names, self._ties.masks)
        self.tensors: dict[str, WireTensor] = {}
        self.parameters: dict[str, Parameter] = {}
        self.extras: Mapping[str, Tensor] = {}
        self.masks: Mapping[str, Mask] = {}

    def named(self, context: RequestContext, field: str, patterns: Sequence[str]) -> list[str]:
        """The prunable tensors that `patterns` mean; the floating ones, where there are none."""
        return match(context, field, patterns, self.catalog) if patterns else self.catalog.floating

    def files_of(self, names: Collection[str]) -> set[str]:
        """What the files call the tensors that make up some parameters."""
        return {stored for name in names for stored in self.catalog.pairs.get(name, (name,))}

    def fill(
        self,
        context: RequestContext,
        tensors: dict[str, WireTensor],
        extras: Mapping[str, Tensor],
        masks: Mapping[str, Mask],
    ) -> None:
        """The data has come: all of it, or that of some parameters.  Errors: InvalidPair."""
        self.tensors, self.extras, self.masks = tensors, extras, masks
        for name in self.catalog.prunable:
            orig, *stored = self.catalog.pairs.get(name, (name,))
            tensor, kept = tensors.get(orig), masks.get(name)
            if tensor is None:
                continue
            # As bits a mask is a small part of what it is in the weight's dtype.
            priors = [(mask, tensors.pop(mask)) for mask in stored]
            if priors and kept is None:
                kept = _prior_mask(context, priors)
            self.parameters[name] = Parameter(values_of(tensor), kept, tensor.scan)

    def files(self, context: RequestContext, are_folded: Container[str]) -> list[OutgoingFile]:
        """All tensors, in the files that they came in, and in their order.

        are_folded: of these the masks are applied to the weights; other pruned ones are pairs.
        Errors: InvalidStateDict, where a pair's names are taken.
        """
        written = self._layout(are_folded)
        files = [
            state_dict_file(context, shard.filename, written[shard.filename], self._metadata(shard))
            for shard in self.shards
        ]
        if self.index:
            files.append(bytes_file(context, self.index.filename, self.index.rewritten(written)))
        return files

    def size(self, are_folded: Container[str]) -> int:
        """Bytes of what `files` gives, without a look at the data."""
        written = self._layout(are_folded)
        of_shards = [
            state_dict_head(written[shard.filename], self._metadata(shard))[1]
            for shard in self.shards
        ]
        return sum(of_shards) + (len(self.index.rewritten(written)) if self.index else 0)

    def _metadata(self, shard: Shard) -> dict[str, str]:
        """What a file says beside its tensors, with the ties of those that it has."""
        return write_ties(shard.metadata, read_ties(shard.metadata, self.catalog.stored))

    def _layout(self, are_folded: Container[str]) -> dict[str, dict[str, Outgoing]]:
        """What is written to each file, by the tensors' names."""
        written: dict[str, dict[str, Outgoing]] = {shard.filename: {} for shard in self.shards}
        for stored, name, outgoing in self._written(are_folded):
            written[self._shard_of[stored]][name] = outgoing
        return written

    def _written(self, are_folded: Container[str]) -> Iterator[tuple[str, str, Outgoing]]:
        """What each tensor of the files becomes: as it was called, as it is called, itself."""
        names = {orig: name for name, (orig, *_) in self.catalog.pairs.items()}
        seen: set[str] = set()
        for stored, tensor in self.tensors.items():
            name = names.get(stored, stored)
            for key, outgoing in self._becomes(name, stored, tensor, are_folded):
                if key in seen or (key in self.tensors and key != stored):
                    raise InvalidStateDict(
                        f"data[{quote(key)}]",
                        f"stands where the pruned {quote(name)} is to be written",
                    )
                seen.add(key)
                yield stored, key, outgoing

    def _becomes(
        self, name: str, stored: str, tensor: WireTensor, are_folded: Container[str]
    ) -> Iterator[tuple[str, Outgoing]]:
        """What one tensor becomes, under its new names."""
        parameter = self.parameters.get(name)
        as_it_is = Outgoing(tensor.dtype, tensor.shape, lambda: [tensor.data])
        mask = parameter.mask if parameter else None
        if parameter is None or mask is None:
            yield stored, as_it_is
        elif name in are_folded and self.is_mapped:
            yield name, Outgoing(tensor.dtype, tensor.shape, lambda: folded(parameter))
        elif name in are_folded:  # in its own memory
            yield name, as_it_is
        else:
            dtype = TORCH_DTYPES[tensor.dtype]
            yield f"{name}_orig", as_it_is
            numbers = Outgoing(tensor.dtype, tensor.shape, lambda: _as_numbers(mask, dtype))
            yield f"{name}_mask", numbers


def _shards_of(shards: Sequence[Shard]) -> dict[str, str]:
    """From each tensor's name to the name of its file.  Errors: InvalidStateDict."""
    found: dict[str, str] = {}
    for shard in shards:
        for entry in shard.entries:
            if entry.name in found:
                raise InvalidStateDict(
                    f"data[{quote(entry.name)}]",
                    f"stands in {quote(found[entry.name])} and in {quote(shard.filename)}",
                )
            found[entry.name] = shard.filename
    return found


def stored_of(entries: Iterable[Entry]) -> dict[str, Stored]:
    """Tensors of a file, as a catalog has them."""
    kinds: dict[tuple[str, Shape], Stored] = {}  # of many tensors there are few
    stored = {}
    for entry in entries:
        kind = entry.dtype, entry.shape
        if kind not in kinds:
            kinds[kind] = Stored(entry.dtype, TORCH_DTYPES.get(entry.dtype), entry.shape)
        stored[entry.name] = kinds[kind]
    return stored


def without_extras(header: Header, extras: Collection[str]) -> Model:
    """The model of a file that holds scores and masks as well, named `extras`."""
    model = [entry for entry in header.entries if entry.name not in extras]
    beside = [entry for entry in header.entries if entry.name in extras]
    return Model([Shard("", model, header.metadata)], stored_of(beside))


def values_of(tensor: WireTensor) -> Tensor:
    """The values of a tensor that a catalog let through."""
    values = tensor.values()
    assert values is not None, "the catalog lets no other dtype through"
    return values


def masks_of(parameters: Mapping[str, Parameter]) -> dict[str, Mask]:
    """The masks of those parameters that have one."""
    masks = ((name, parameter.mask) for name, parameter in parameters.items())
    return {name: mask for name, mask in masks if mask is not None}


def packed_masks(context: RequestContext, masks: Mapping[str, Mask]) -> OutgoingFile:
    """A file of masks, as bits."""
    return flat_file(context, "", {name: mask.bits for name, mask in masks.items()})


def _prior_mask(context: RequestContext, priors: Sequence[tuple[str, WireTensor]]) -> Mask | None:
    """What all of some masks, by name, keep.  Errors: InvalidPair."""
    kept: Mask | None = None
    for name, tensor in priors:
        mask = to_mask(context, values_of(tensor), InvalidPair, f"data[{quote(name)}]")
        kept = mask if kept is None else kept.both(context, mask)
    return kept


def _as_numbers(mask: Mask, dtype: torch.dtype | None) -> Iterator[Tensor]:
    """A mask of 0 and 1 in a dtype, in parts."""
    for begin, end in spans(mask.elements, backend_for(mask.bits.device).piece):
        yield mask.flags(begin, end).to(dtype)
