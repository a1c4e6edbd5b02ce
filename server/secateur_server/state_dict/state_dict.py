"""A state_dict between its files and the pruning: files or shards, and parameters in them."""

from collections.abc import Collection, Container, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from secateur_proto.packed import METADATA, UNPACK
from secateur_proto.ties import read_ties, write_ties
from secateur_server.backends import allocate, backend_for, spans
from secateur_server.backends.dtypes import TORCH_DTYPES
from secateur_server.backends.masks import Mask
from secateur_server.errors import InvalidPair, InvalidStateDict, quote
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.catalog import Catalog, Stored, match, read_catalog
from secateur_server.state_dict.fold import folded
from secateur_server.state_dict.given_masks import to_mask
from secateur_server.state_dict.parameter import Parameter
from secateur_server.state_dict.shards import Shard, shards_of, stored_of
from secateur_server.state_dict.slices import Shrinking, Slices, smaller_parts, smaller_shape
from secateur_server.wire.header import Header
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


class StateDict:
    """The tensors of one or more files. The catalog is known before the data is read.

    Attributes:
        shards: The files.
        index: The index of several shards; None for a single file.
        is_mapped: Whether the weights are mapped files, which must not be written to.
        catalog: Names, shapes and dtypes. All attributes below are empty until `fill` returns.
        tensors: The tensors of the files, without the masks of pairs.
        parameters: The tensors that can be pruned, in the memory of `tensors`.
        extras: Uploaded scores and masks.
        masks: Masks of the parameters that were pruned after the files were stored. They include
            prior masks.
        shrinking: What `files` keeps of the tensors; None: everything.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        extras: Mapping[str, Stored],
        index: Index | None = None,
        is_mapped: bool = False,
    ) -> None:
        """Reads the catalog.

        Args:
            shards: The files, with the entries of their headers.
            extras: Uploaded scores and masks, which are not part of the state_dict.
            index: The index of several shards.
            is_mapped: Whether the weights are mapped files.

        Raises:
            InvalidPair: A weight and its mask do not fit.
            InvalidStateDict: A tensor is in two files, or a file is packed.
        """
        self.shards = shards
        self.index = index
        self.is_mapped = is_mapped
        self._shard_of = shards_of(shards)
        entries = [entry for shard in shards for entry in shard.entries]
        stored = stored_of(entries)
        metadata = {k: v for shard in shards for k, v in shard.metadata.items()}
        if METADATA in metadata:
            raise InvalidStateDict("data", f"is packed; unpack it first: {UNPACK}")
        self._ties = read_ties(metadata, stored)
        self.catalog: Catalog = read_catalog(stored, extras, self._ties.names, self._ties.masks)
        self.tensors: dict[str, WireTensor] = {}
        self.parameters: dict[str, Parameter] = {}
        self.extras: Mapping[str, Tensor] = {}
        self.masks: Mapping[str, Mask] = {}
        self.shrinking: Shrinking | None = None

    def named(self, context: RequestContext, field: str, patterns: Sequence[str]) -> list[str]:
        """Finds the parameters that names and globs mean.

        Args:
            context: The request.
            field: The path of `patterns` in the request.
            patterns: Names and globs. If empty, all floating tensors are meant.

        Returns:
            Names in the order of the files.

        Raises:
            UnknownTensor: A pattern matches no tensor.
            NotPrunable: A name is of a tensor that cannot be pruned.
        """
        return match(context, field, patterns, self.catalog) if patterns else self.catalog.floating

    def files_of(self, names: Collection[str]) -> set[str]:
        """Returns the names that the files have for the tensors of some parameters."""
        return {stored for name in names for stored in self.catalog.pairs.get(name, (name,))}

    def fill(
        self,
        context: RequestContext,
        tensors: dict[str, WireTensor],
        extras: Mapping[str, Tensor],
        masks: Mapping[str, Mask],
    ) -> None:
        """Takes the data, of all tensors or of those of some parameters.

        Args:
            context: The request.
            tensors: The tensors of the files, by their names there. Masks of pairs are removed.
            extras: Uploaded scores and masks.
            masks: As the attribute `masks`.

        Raises:
            InvalidPair: A mask has a value other than 0 and 1.
        """
        self.tensors, self.extras, self.masks = tensors, extras, masks
        for name in self.catalog.prunable:
            orig, *stored = self.catalog.pairs.get(name, (name,))
            tensor, kept = tensors.get(orig), masks.get(name)
            if tensor is None:
                continue
            # Packed at once: in the weight's dtype a mask takes 16 or 32 times the memory.
            priors = [(mask, tensors.pop(mask)) for mask in stored]
            if priors and kept is None:
                kept = _prior_mask(context, priors)
            self.parameters[name] = Parameter(values_of(tensor), kept, tensor.scan)

    def update(self, context: RequestContext, name: str, values: Tensor) -> Tensor:
        """Gives a parameter other values.

        Args:
            context: The request.
            name: Of the parameter.
            values: In its shape and dtype.

        Returns:
            The new weight.
        """
        weight = self.parameters[name].weight
        if self.is_mapped:
            backend = backend_for(weight.device)
            memory = allocate(context, weight.nbytes, backend)
            weight = memory.view(weight.dtype).view(weight.shape)
            stored = self.catalog.pairs.get(name, (name,))[0]
            tensor = self.tensors[stored]
            self.tensors[stored] = WireTensor(tensor.dtype, tensor.shape, weight.view(-1))
        return weight.copy_(values)

    def files(self, context: RequestContext, are_folded: Container[str]) -> list[OutgoingFile]:
        """Makes files like those that the tensors came in, in the same order.

        Args:
            context: The request.
            are_folded: The names of the parameters whose masks are applied. Other pruned parameters
                are written as pairs.

        Returns:
            The files, and the index of several shards.

        Raises:
            InvalidStateDict: Another tensor has a name that is to be written.
        """
        return self.written(context, self.layout(are_folded), {})

    def written(
        self,
        context: RequestContext,
        layout: Mapping[str, Mapping[str, Outgoing]],
        more: Mapping[str, Mapping[str, str]],
    ) -> list[OutgoingFile]:
        """Makes the files of tensors.

        Args:
            context: The request.
            layout: The tensors of each file, by their names.
            more: Entries to add to the metadata of files.

        Returns:
            The files, and the index of several shards.
        """
        files = [
            state_dict_file(
                context,
                shard.filename,
                layout[shard.filename],
                {**self._metadata(shard), **more.get(shard.filename, {})},
            )
            for shard in self.shards
        ]
        if self.index:
            files.append(bytes_file(context, self.index.filename, self.index.rewritten(layout)))
        return files

    def size(self, are_folded: Container[str]) -> int:
        """Predicts the bytes of what `files` makes, without reading the data.

        Args:
            are_folded: As for `files`.

        Returns:
            Bytes of all files.

        Raises:
            InvalidStateDict: As `files` does.
        """
        written = self.layout(are_folded)
        sizes = [
            state_dict_head(written[shard.filename], self._metadata(shard))[1]
            for shard in self.shards
        ]
        return sum(sizes) + (len(self.index.rewritten(written)) if self.index else 0)

    def _metadata(self, shard: Shard) -> dict[str, str]:
        """Metadata of a file, with the ties of the tensors in it."""
        return write_ties(shard.metadata, read_ties(shard.metadata, self.catalog.stored))

    def layout(self, are_folded: Container[str]) -> dict[str, dict[str, Outgoing]]:
        """Returns the tensors that are written to each file, by their names.

        Args:
            are_folded: As for `files`.

        Raises:
            InvalidStateDict: As `files` does.
        """
        written: dict[str, dict[str, Outgoing]] = {shard.filename: {} for shard in self.shards}
        for stored, name, outgoing in self._written(are_folded):
            written[self._shard_of[stored]][name] = outgoing
        return written

    def _written(self, are_folded: Container[str]) -> Iterator[tuple[str, str, Outgoing]]:
        """For each written tensor its name in the files that came, its new name, and its data."""
        names = {orig: name for name, (orig, *_) in self.catalog.pairs.items()}
        seen: set[str] = set()
        for stored, tensor in self.tensors.items():
            name = names.get(stored, stored)
            for key, outgoing in self._becomes(name, stored, tensor, are_folded):
                if key in seen or (key in self.tensors and key != stored):
                    raise InvalidStateDict(
                        f"data[{quote(key)}]",
                        f"has a name that the pruned {quote(name)} needs; rename one of them",
                    )
                seen.add(key)
                yield stored, key, outgoing

    def _becomes(
        self, name: str, stored: str, tensor: WireTensor, are_folded: Container[str]
    ) -> Iterator[tuple[str, Outgoing]]:
        """The tensors that one tensor is written as, under their new names."""
        parameter = self.parameters.get(name)
        unchanged = Outgoing(tensor.dtype, tensor.shape, lambda: [tensor.data])
        mask = parameter.mask if parameter else None
        if self.shrinking and (kept := self.shrinking.slices.get(name)):
            yield name, _smaller(tensor, mask if self.is_mapped else None, kept)
        elif parameter is None or mask is None:
            yield stored, unchanged
        elif name in are_folded and self.is_mapped:
            yield name, Outgoing(tensor.dtype, tensor.shape, lambda: folded(parameter))
        elif name in are_folded:  # `fold` has written to the weight itself
            yield name, unchanged
        else:
            dtype = TORCH_DTYPES[tensor.dtype]
            yield f"{name}_orig", unchanged
            numbers = Outgoing(tensor.dtype, tensor.shape, lambda: _as_numbers(mask, dtype))
            yield f"{name}_mask", numbers


def _smaller(tensor: WireTensor, mask: Mask | None, kept: Slices) -> Outgoing:
    """A tensor without some of its slices."""
    values, shape = values_of(tensor), smaller_shape(tensor.shape, kept)
    return Outgoing(tensor.dtype, shape, lambda: smaller_parts(values, mask, kept))


def without_extras(header: Header, extras: Collection[str]) -> StateDict:
    """Makes the state_dict of a file that also holds the uploaded scores and masks `extras`."""
    own = [entry for entry in header.entries if entry.name not in extras]
    others = [entry for entry in header.entries if entry.name in extras]
    return StateDict([Shard("", own, header.metadata)], stored_of(others))


def values_of(tensor: WireTensor) -> Tensor:
    """Returns the values of a tensor that the catalog lists as prunable, or of a mask."""
    values = tensor.values()
    assert values is not None, "the catalog lets no other dtype through"
    return values


def masks_of(parameters: Mapping[str, Parameter]) -> dict[str, Mask]:
    """Returns the masks of the parameters that have one."""
    masks = ((name, parameter.mask) for name, parameter in parameters.items())
    return {name: mask for name, mask in masks if mask is not None}


def packed_masks(context: RequestContext, masks: Mapping[str, Mask]) -> OutgoingFile:
    """Makes a file of masks, one bit for each element."""
    return flat_file(context, "", {name: mask.bits for name, mask in masks.items()})


def _prior_mask(context: RequestContext, priors: Sequence[tuple[str, WireTensor]]) -> Mask | None:
    """Combines the masks of the names of a tensor: an element is kept if all masks keep it."""
    kept: Mask | None = None
    for name, tensor in priors:
        mask = to_mask(context, values_of(tensor), InvalidPair, f"data[{quote(name)}]")
        kept = mask if kept is None else kept.both(context, mask)
    return kept


def _as_numbers(mask: Mask, dtype: torch.dtype | None) -> Iterator[Tensor]:
    """Yields a mask as 0 and 1 in `dtype`, part by part."""
    for begin, end in spans(mask.elements, backend_for(mask.bits.device).piece):
        yield mask.flags(begin, end).to(dtype)
