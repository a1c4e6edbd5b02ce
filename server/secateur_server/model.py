"""A model between the wire and the pruning: its file, and the parameters in it."""

from collections.abc import Collection, Container, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from secateur_server.devices import passes_of, spans
from secateur_server.errors import InvalidPair, InvalidStateDict, quote
from secateur_server.pruning.catalog import Catalog, Stored, match, read_catalog
from secateur_server.pruning.masks import Mask
from secateur_server.pruning.prune import to_mask
from secateur_server.pruning.spec import Parameter
from secateur_server.wire.header import Header
from secateur_server.wire.reader import ByteStream, read_header, read_tensors
from secateur_server.wire.tensors import TORCH_DTYPES, WireTensor
from secateur_server.wire.writer import Outgoing


class Model:
    """A state_dict that a caller sends.

    catalog and metadata are known once the header is here; the rest once `read` has returned:
    tensors: what the file has, without the masks of pairs.
    parameters: what can be pruned, on the tensors' memory.
    extras: uploaded scores and masks.
    """

    def __init__(self, header: Header, extras: Collection[str]) -> None:
        stored = {
            entry.name: Stored(entry.dtype, TORCH_DTYPES.get(entry.dtype), entry.shape)
            for entry in header.entries
        }
        self._header = header
        self._extra_names = extras
        self.catalog: Catalog = read_catalog(stored, extras)
        self.metadata = header.metadata
        self.tensors: dict[str, WireTensor] = {}
        self.parameters: dict[str, Parameter] = {}
        self.extras: dict[str, Tensor] = {}

    def named(self, field: str, patterns: Sequence[str]) -> list[str]:
        """The prunable tensors that `patterns` mean; all, where there are none."""
        return match(field, patterns, self.catalog) if patterns else list(self.catalog.prunable)

    def read(self, stream: ByteStream, device: torch.device) -> None:
        """Reads the data to `device`.  Errors: WrongLength, InvalidPair."""
        self.tensors = read_tensors(stream, self._header, device)
        self.extras = {name: _values(self.tensors.pop(name)) for name in self._extra_names}
        for name in self.catalog.prunable:
            orig, mask = self.catalog.pairs.get(name, (name, None))
            # As bits a mask is a small part of what it is in the weight's dtype.
            kept = None if mask is None else _prior_mask(mask, self.tensors.pop(mask))
            tensor = self.tensors[orig]
            self.parameters[name] = Parameter(_values(tensor), kept, tensor.extremes)


def open_model(stream: ByteStream, extras: Collection[str] = ()) -> Model:
    """Reads the head of a model.  extras: names of uploaded scores and masks.

    Errors: MalformedFile, WrongLength, InvalidPair.
    """
    return Model(read_header(stream), extras)


def _prior_mask(name: str, tensor: WireTensor) -> Mask:
    return to_mask(_values(tensor), InvalidPair, f"data[{quote(name)}]")


def _values(tensor: WireTensor) -> Tensor:
    values = tensor.values()
    assert values is not None, "the catalog lets no other dtype through"
    return values


def packed_masks(pruned: Mapping[str, Parameter]) -> dict[str, Outgoing]:
    """The masks of `pruned` as bits."""

    def packed(mask: Mask | None) -> Outgoing:
        assert mask is not None, "what was pruned has a mask"
        return Outgoing("U8", tuple(mask.bits.shape), lambda: [mask.bits])

    return {name: packed(parameter.mask) for name, parameter in pruned.items()}


def whole_model(
    model: Model, parameters: Mapping[str, Parameter], folded: Container[str]
) -> dict[str, Outgoing]:
    """All tensors of a model, in the file's order.

    parameters: with the masks that count.
    folded: of these parameters the weights are folded; the other pruned ones are pairs.
    Errors: InvalidStateDict, where a pair's names are taken.
    """
    names = {orig: name for name, (orig, _) in model.catalog.pairs.items()}
    written: dict[str, Outgoing] = {}
    for stored, tensor in model.tensors.items():
        name = names.get(stored, stored)
        mask = parameters[name].mask if name in parameters else None
        for key, outgoing in _written(name, stored, tensor, mask, name in folded):
            if key in written or (key in model.tensors and key != stored):
                raise InvalidStateDict(
                    f"data[{quote(key)}]", f"stands where the pruned {quote(name)} is to be written"
                )
            written[key] = outgoing
    return written


def _written(
    name: str, stored: str, tensor: WireTensor, mask: Mask | None, is_folded: bool
) -> Iterator[tuple[str, Outgoing]]:
    """The tensors that one tensor of the file becomes."""
    as_it_is = Outgoing(tensor.dtype, tensor.shape, lambda: [tensor.data])
    if mask is None:
        yield stored, as_it_is
    elif is_folded:
        yield name, as_it_is
    else:
        dtype = TORCH_DTYPES[tensor.dtype]
        yield f"{name}_orig", as_it_is
        floats = Outgoing(tensor.dtype, tensor.shape, lambda: _as_floats(mask, dtype))
        yield f"{name}_mask", floats


def _as_floats(mask: Mask, dtype: torch.dtype | None) -> Iterator[Tensor]:
    """A mask of 0.0 and 1.0, in parts."""
    for begin, end in spans(mask.elements, passes_of(mask.bits.device).piece):
        yield mask.flags(begin, end).to(dtype)
