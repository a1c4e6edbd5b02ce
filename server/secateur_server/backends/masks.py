"""Masks of one bit an element, and the slices of tensors they cover."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from secateur_server.backends import allocate, backend_for, spans
from secateur_server.backends.pieces import around, bits_at
from secateur_server.runtime.context import RequestContext

Flags = Callable[[int, int], Tensor]

# The elements [begin, end) of a flat tensor, which are of the slices [first, last).
Box = tuple[int, int, int, int]


class Mask:
    """Which elements of a tensor are kept.

    bits: uint8, ceil(elements / 8), row-major, lowest bit first, 1 is kept, padded with 0.
    kept: how many, where it is known.
    """

    __slots__ = ("_kept", "bits", "elements")

    def __init__(self, bits: Tensor, elements: int, kept: int | None = None) -> None:
        self.bits, self.elements, self._kept = bits, elements, kept

    def kept(self, context: RequestContext) -> int:
        """The number of kept elements.

        Counted once. A cached_property would, before Python 3.12, hold one lock for all masks while
        it counts, and threads of the pool that counts would wait for it.
        """
        if self._kept is None:
            self._kept = self._count(context)
        return self._kept

    def _count(self, context: RequestContext) -> int:
        backend = backend_for(self.bits.device)
        if self.bits.numel() <= backend.piece:
            return backend.count_ones(self.bits)
        parts = spans(self.bits.numel(), backend.piece)
        return sum(
            backend.map(context, lambda span: backend.count_ones(self.bits[slice(*span)]), parts)
        )

    def part(self, begin: int, end: int) -> Tensor:
        """The bits of the elements [begin, end).  begin: a multiple of 8."""
        return self.bits[begin // 8 : (end + 7) // 8]

    def flags(self, begin: int, end: int) -> Tensor:
        """The elements [begin, end) as bool."""
        before = begin % 8
        bits = self.part(begin - before, end)
        return backend_for(bits.device).unpack(bits, end - begin + before)[before:]

    def at(self, index: Tensor) -> Tensor:
        """The elements at flat indices as bool, in the shape of `index`."""
        return bits_at(self.bits, index)

    def whole(self, context: RequestContext, shape: Sequence[int]) -> Tensor:
        """All elements as bool, of a shape."""
        backend = backend_for(self.bits.device)
        flags = allocate(context, self.elements, backend).view(torch.bool)

        def unpack(span: tuple[int, int]) -> None:
            flags[slice(*span)] = self.flags(*span)

        backend.map(context, unpack, spans(self.elements, backend.piece))
        return flags.view(tuple(shape))

    def both(self, context: RequestContext, other: "Mask") -> "Mask":
        """The elements that both masks keep."""
        both = allocate(context, self.bits.numel(), backend_for(self.bits.device))
        return Mask(torch.bitwise_and(self.bits, other.bits, out=both), self.elements)


def mask_of(context: RequestContext, flags: Flags, elements: int, device: torch.device) -> Mask:
    """The mask that `flags` gives in pieces [begin, end), as bool."""
    backend = backend_for(device)
    bits = allocate(context, (elements + 7) // 8, backend)

    def pack(span: tuple[int, int]) -> None:
        begin, end = span
        bits[begin // 8 : (end + 7) // 8] = backend.pack(flags(begin, end))

    backend.map(context, pack, spans(elements, backend.piece))
    return Mask(bits, elements)


def mask_of_flags(context: RequestContext, flags: Tensor) -> Mask:
    """The mask of a bool tensor, flat."""
    return mask_of(context, lambda begin, end: flags[begin:end], len(flags), flags.device)


def masks_of(flags: Tensor) -> list[Mask]:
    """The mask of each line.  flags: bool, (masks, elements)."""
    lines = backend_for(flags.device).pack(flags)
    return [Mask(bits, flags.shape[1]) for bits in lines.unbind()]


def flags_of(masks: Sequence[Mask]) -> Tensor:
    """Masks of as many elements as bool.  Returns: (masks, elements)."""
    bits = torch.cat([mask.bits for mask in masks])
    flags = backend_for(bits.device).unpack(bits, 8 * len(bits))
    return flags.view(len(masks), -1)[:, : masks[0].elements]


def all_kept(context: RequestContext, elements: int, device: torch.device) -> Mask:
    """The mask of a tensor that keeps all elements."""
    bits = allocate(context, (elements + 7) // 8, backend_for(device)).fill_(0xFF)
    if elements % 8:
        bits[-1] = (1 << elements % 8) - 1
    return Mask(bits, elements, elements)


def expand(context: RequestContext, kept: Tensor, shape: Sequence[int], dim: int) -> Mask:
    """The mask of a tensor from its slices along a dimension.  kept: bool, flat."""
    outer, size, inner = around(shape, dim)
    backend, elements = backend_for(kept.device), outer * size * inner
    if inner % 8 == 0:  # each slice is whole bytes
        whole = (kept.to(torch.uint8) * 0xFF).view(1, size, 1)
        bits = allocate(context, elements // 8, backend)
        bits.view(outer, size, inner // 8).copy_(whole)
        return Mask(bits, elements)
    if size * inner % 8 == 0 and size * inner <= backend.piece:  # a pattern of whole bytes
        bits = allocate(context, elements // 8, backend)
        bits.view(outer, -1).copy_(backend.pack(kept.repeat_interleave(inner)))
        return Mask(bits, elements)
    return _expand(context, kept, (outer, size, inner))


def _expand(context: RequestContext, kept: Tensor, sizes: tuple[int, int, int]) -> Mask:
    """Does `expand` where slices share bytes."""
    outer, size, inner = sizes
    # Of the runs of `inner` elements every size-th belongs to one slice: where a piece begins
    # within the pattern is all that there is to know.
    most = min(backend_for(kept.device).piece, outer * size * inner) // inner + 2
    pattern = kept.repeat(-(-(size + most) // size))

    def flags(begin: int, end: int) -> Tensor:
        first, last = begin // inner, (end - 1) // inner
        runs = pattern[first % size :][: last - first + 1]
        elements = runs.view(-1, 1).expand(-1, inner).reshape(-1)
        return elements[begin - first * inner :][: end - begin]

    return mask_of(context, flags, outer * size * inner, kept.device)


def kept_slices(context: RequestContext, mask: Mask, shape: Sequence[int], dim: int) -> Tensor:
    """Which slices along a dimension have a kept element.  Returns: bool, as long as it."""
    outer, size, inner = around(shape, dim)
    bits, backend = mask.bits, backend_for(mask.bits.device)
    if inner % 8 == 0:  # each slice is whole bytes
        in_bytes = (outer, size, inner // 8)
        return any_of_slices(context, lambda b, e: bits[b:e] != 0, in_bytes, 1, bits.device)
    if size * inner % 8 == 0 and len(bits) <= backend.piece:
        either = _either(bits.view(outer, -1))
        return backend.unpack(either, size * inner).view(size, inner).any(1)
    return any_of_slices(context, mask.flags, shape, dim, bits.device)


def _either(lines: Tensor) -> Tensor:
    """The bits that are 1 in any line.  lines: uint8, (lines, bytes)."""
    while len(lines) > 1:
        half = len(lines) // 2
        odd = lines[2 * half :]
        lines = lines[:half] | lines[half : 2 * half]
        if len(odd):
            lines[:1] |= odd
    return lines[0]


def any_of_slices(
    context: RequestContext, flags: Flags, shape: Sequence[int], dim: int, device: torch.device
) -> Tensor:
    """Which slices along a dimension have an element that is flagged.

    flags: of the elements [begin, end).  shape: with an element or more.
    Returns: bool, as long as the dimension.
    """
    backend = backend_for(device)
    outer, size, inner = around(shape, dim)
    boxes = _boxes(outer, size, inner, backend.piece)

    def found_in(box: Box) -> Tensor:
        begin, end, first, last = box
        box_flags = flags(begin, end).view(-1, last - first, min(inner, end - begin))
        return backend.any_along(box_flags)

    found = torch.zeros(size, dtype=torch.bool, device=device)
    for (_, _, first, last), flagged in zip(
        boxes, backend.map(context, found_in, boxes), strict=True
    ):
        found[first:last] |= flagged
    return found


def _boxes(outer: int, size: int, inner: int, piece: int) -> list[Box]:
    """A tensor of shape (outer, size, inner) in boxes of at most a piece, each without a gap."""
    block = size * inner
    if block <= piece:
        return [(b * block, e * block, 0, size) for b, e in spans(outer, piece // block)]
    if inner <= piece:
        return [
            (start + first * inner, start + last * inner, first, last)
            for start in range(0, outer * block, block)
            for first, last in spans(size, piece // inner)
        ]
    return [
        (run * inner + begin, run * inner + end, run % size, run % size + 1)
        for run in range(outer * size)
        for begin, end in spans(inner, piece)
    ]
