"""How each kind of layer sees its inputs. Imported with torch only.

To add a kind, write a class with the methods of `Kind`, and add it to `KINDS`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn import Module
from torch.nn import functional as F  # noqa: N812

from secateur.calibration.grams import ROWS
from secateur.calibration.masks import Kept
from secateur.calibration.sums import Sums, channel_sums, pieces, use_sums


class Kind(Protocol):
    """A kind of layer with one weight and one input."""

    @property
    def input_dim(self) -> int:
        """The dimension of the weight along which its inputs lie."""

    def sums(self, module: Module, value: Tensor, kept: Kept) -> Sums:
        """Sums the layer's input over the tokens that count."""

    def view(self, module: Module) -> tuple[Any, ...] | None:
        """Says how `rows` makes a matrix of an input; None: the layer has no gram."""

    def rows(self, module: Module, value: Tensor, kept: Kept) -> Iterator[Tensor]:
        """Yields matrices whose rows are what a column of the weight is multiplied with."""


@dataclass(frozen=True)
class LinearKind:
    """A matrix product with the last dimension of the input."""

    input_dim: int = 1

    def sums(self, module: Module, value: Tensor, kept: Kept) -> Sums:
        return channel_sums(_tokens(value, kept))

    def view(self, module: Module) -> tuple[Any, ...] | None:
        return ()

    def rows(self, module: Module, value: Tensor, kept: Kept) -> Iterator[Tensor]:
        yield _tokens(value, kept)


def _tokens(value: Tensor, kept: Kept) -> Tensor:
    return kept.of(value, value.dim() - 1).reshape(-1, value.shape[-1])


@dataclass(frozen=True)
class EmbeddingKind:
    """A table: the input of a row is 1 where a token uses it, else 0."""

    input_dim: int = 0

    def sums(self, module: Any, value: Tensor, kept: Kept) -> Sums:
        return use_sums(kept.of(value, value.dim()).flatten(), module.num_embeddings)

    def view(self, module: Module) -> tuple[Any, ...] | None:
        return None

    def rows(self, module: Module, value: Tensor, kept: Kept) -> Iterator[Tensor]:
        raise NotImplementedError


@dataclass(frozen=True)
class ConvKind:
    """A convolution: sums are over the positions of its input, and grams over patches."""

    dims: int
    input_dim: int = 1

    def sums(self, module: Module, value: Tensor, kept: Kept) -> Sums:
        batch = _with_batch(value, self.dims)
        return channel_sums(batch.movedim(1, -1).reshape(-1, batch.shape[1]))

    def view(self, module: Any) -> tuple[Any, ...] | None:
        if module.groups != 1 or self.input_dim != 1:
            return None
        padding = tuple(module._reversed_padding_repeated_twice), module.padding_mode
        return (*padding, module.kernel_size, module.stride, module.dilation)

    def rows(self, module: Any, value: Tensor, kept: Kept) -> Iterator[Tensor]:
        # Patches, with columns in the order of weight.flatten(1).
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padding = module._reversed_padding_repeated_twice
        for sample in _with_batch(value, self.dims):
            windows = F.pad(sample[None], padding, mode=mode)[0]
            for dim in range(self.dims):
                step = module.dilation[dim]
                length = (module.kernel_size[dim] - 1) * step + 1
                windows = windows.unfold(dim + 1, length, module.stride[dim])[..., ::step]
            # [channels, positions..., kernel...] -> [positions..., channels, kernel...]
            yield from pieces(windows.movedim(0, self.dims), self.dims, ROWS)


def _with_batch(value: Tensor, dims: int) -> Tensor:
    return value if value.dim() == dims + 2 else value[None]


LINEAR = LinearKind()
KINDS: tuple[tuple[type[Module], Kind], ...] = (
    (nn.Linear, LINEAR),
    (nn.Embedding, EmbeddingKind()),
    *((kind, ConvKind(dims)) for dims, kind in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), 1)),
    (nn.ConvTranspose1d, ConvKind(1, 0)),
    (nn.ConvTranspose2d, ConvKind(2, 0)),
    (nn.ConvTranspose3d, ConvKind(3, 0)),
)
_CONV1D = LinearKind(0)


def kind_of(module: Module) -> Kind | None:
    """Returns the kind of a layer; None if it has no statistics."""
    for cls, kind in KINDS:
        if isinstance(module, cls):
            return kind
    is_conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")  # of transformers
    return _CONV1D if is_conv1d else None
