"""Applies masks to a model in this process, as the server does."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from secateur.errors import InvalidStateDict
from secateur.model import Mask, Source
from secateur.tensors import Bytes, LocalTensor, prior_mask
from secateur_proto.dtypes import DTYPES


def pruned_tensors(
    source: Source, masks: Mapping[str, Mask], dense: bool, keeps_sign: bool = True
) -> Iterator[tuple[str, LocalTensor]]:
    """Yields what was sent, with masks applied; a pair without a mask in `masks` has its own.

    Args:
        source: The model.
        masks: Flat, by the names of the pruned tensors.
        dense: Whether a pruned X is X with zeros, or the pair X_orig, X_mask.
        keeps_sign: Whether zeros have the signs of the elements.

    Raises:
        InvalidStateDict: A tensor has the name of half of a new pair.
    """
    pairs = source.pairs()
    prior = set(pairs.values())
    names = {f"{base}_orig": base for base in pairs}
    for stored, tensor in source.sent().items():
        if stored in prior:
            continue
        name = names.get(stored, stored)
        mask = masks.get(name)
        if mask is None and name in pairs:
            mask = prior_mask(source.tensors[pairs[name]])
        if mask is None:
            yield stored, tensor
        elif dense:
            yield name, LocalTensor(tensor.dtype, tensor.shape, _folded(tensor, mask, keeps_sign))
        else:
            taken = {f"{name}_orig", f"{name}_mask"} & source.tensors.keys()
            if name not in pairs and taken:
                raise InvalidStateDict(
                    f"{taken.pop()}: the pruned {name} needs this name; rename the tensor"
                )
            numbers = _as_numbers(tensor.dtype, mask)
            yield f"{name}_orig", tensor
            yield f"{name}_mask", LocalTensor(tensor.dtype, tensor.shape, numbers)


def _unsigned(dtype: str) -> np.dtype[Any]:
    """The unsigned integer dtype with as many bits."""
    return np.dtype(f"u{DTYPES[dtype].bits // 8}")


def _folded(tensor: LocalTensor, mask: Mask, keeps_sign: bool) -> Callable[[], Bytes]:
    """Pruned elements become 0; of their own sign, as in weight * mask: -0.5 becomes -0.0."""
    unsigned = _unsigned(tensor.dtype)
    has_sign = keeps_sign and tensor.kind == "floating"
    sign = unsigned.type(has_sign << (8 * unsigned.itemsize - 1))

    def read() -> Bytes:
        kept = -mask.astype(unsigned)  # all bits or none; np.where takes ten times as long
        kept |= sign
        kept &= tensor.read().view(unsigned)
        return kept.view(np.uint8)

    return read


def _as_numbers(dtype: str, mask: Mask) -> Callable[[], Bytes]:
    """The mask as numbers 0 and 1 of a dtype."""
    one = _unsigned(dtype).type(DTYPES[dtype].one)
    return lambda: (mask * one).view(np.uint8)
