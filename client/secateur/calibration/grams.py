"""Grams, X^T X, which layers with the same inputs share. Imported with torch only."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secateur.calibration.triangle import Triangle

# Products in float32 are summed over at most as many rows before they are added in float64.
ROWS = 1024


class Gram:
    """A sum of X^T X over a history of inputs, held by all layers that have had this history.

    A history with one more input is another Gram. So layers share one as long as they see the same
    inputs, and a layer that sees another input leaves it without a change for the others.

    Attributes:
        matrix: [n, n], float64; None before the first input.
        holders: How many layers have this history.
    """

    def __init__(self, matrix: Tensor | None = None) -> None:
        self.matrix, self.holders = matrix, 0
        self._next: weakref.WeakValueDictionary[int, Gram] = weakref.WeakValueDictionary()

    def moved(self, use: int, rows: Iterable[Tensor]) -> "Gram":
        """Returns the Gram of a layer that has this one, and now sees an input.

        Args:
            use: The same for two layers if they see the same input.
            rows: The input, as matrices.
        """
        known = self._next.get(use)
        self.holders -= 1
        if known is None:
            matrix = self.matrix
            if self.holders and matrix is not None:
                matrix = matrix.clone()  # other layers may see another input
            known = Gram(_accumulated(matrix, rows))
            self._next[use] = known
        known.holders += 1
        return known

    def triangle(self) -> Triangle | None:
        """Returns the upper triangle in float32; None without an input."""
        return None if self.matrix is None else Triangle.of(self.matrix.cpu().numpy())


def _accumulated(matrix: Tensor | None, rows: Iterable[Tensor]) -> Tensor | None:
    for some in rows:
        if not some.numel():
            continue
        values = some.cpu() if some.device.type == "mps" else some  # MPS has no float64
        if matrix is None:
            size, device = values.shape[1], values.device
            matrix = torch.zeros(size, size, dtype=torch.float64, device=device)
        with _full_precision(values.device.type):
            for part in torch.split(values, ROWS):
                factor = part if part.dtype == torch.float64 else part.float()
                matrix += (factor.T @ factor).to(matrix.device)
    return matrix


@contextmanager
def _full_precision(device: str) -> Iterator[None]:
    """Multiplies float32 in float32, whatever the caller has chosen for the model."""
    backends: list[Any] = [torch.backends.cuda, torch.backends.mkldnn]
    matmuls = [getattr(backend, "matmul", None) for backend in backends]
    settings: list[Any] = [one for one in matmuls if hasattr(one, "fp32_precision")]
    before = [setting.fp32_precision for setting in settings]
    legacy = None if settings else torch.get_float32_matmul_precision()  # before torch 2.9
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        if legacy is not None:
            torch.set_float32_matmul_precision("highest")
        with torch.autocast(device, enabled=False):
            yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)


class _Seen(NamedTuple):
    tensor: Any  # a weakref
    use: int


class Uses:
    """Tells whether two layers see the same tensor in one forward pass."""

    def __init__(self) -> None:
        self._seen: dict[tuple[Any, ...], _Seen] = {}
        self._count = 0

    def forget(self) -> None:
        """Begins another forward pass."""
        self._seen.clear()

    def of(self, tensor: Tensor, view: tuple[Any, ...]) -> int:
        """Returns a number, the same for the same values.

        Args:
            tensor: It is the same if it is the same memory, unchanged since. A tensor that has been
                freed since is another one: its memory may be used again.
            view: How a layer makes a matrix of it.
        """
        version = 0 if tensor.is_inference() else tensor._version
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, version, view)
        seen = self._seen.get(key)
        if seen is None or seen.tensor() is None:
            self._count += 1
            seen = self._seen[key] = _Seen(weakref.ref(tensor), self._count)
        return seen.use
