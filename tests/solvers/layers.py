"""Layers, errors and definitions that the tests of solvers share."""

import numpy as np
import torch
from torch import Tensor

from secateur_server.solvers.amounts import EachRow, Layer, Pattern

AMOUNTS = [Layer(0.5), Layer(7), EachRow(0.5), EachRow(2), Pattern(2, 4), Pattern(1, 3)]


def layer(rows: int, columns: int, seed: int = 0, power: float = 0.5) -> tuple[Tensor, Tensor]:
    """A weight, and the Gram matrix of correlated inputs with a decaying spectrum."""
    numbers = torch.Generator().manual_seed(seed)
    turned = torch.linalg.qr(torch.randn(columns, columns, generator=numbers))[0]
    spectrum = torch.arange(1, columns + 1).float() ** -power
    inputs = torch.randn(2 * columns + 3, columns, generator=numbers) * spectrum @ turned
    weight = torch.randn(rows, columns, generator=numbers)
    return weight, inputs.T @ inputs


def loss(weight: Tensor, found: Tensor, gram: Tensor) -> float:
    """The squared error of the outputs."""
    error = (weight.double() - found.double()) @ torch.linalg.cholesky(_safe(gram))
    return float(error.square().sum())


def damped_double(gram: Tensor, damping: float) -> Tensor:
    """The Gram matrix in float64, with a damping relative to the mean of its diagonal."""
    gram = gram.double()
    live = gram.diagonal()[gram.diagonal() > 0]
    return gram + damping * (live.mean() if len(live) else 1.0) * torch.eye(len(gram)).double()


def _safe(gram: Tensor) -> Tensor:
    return gram.double() + 1e-12 * torch.eye(len(gram)).double()


def least_squares(weight: Tensor, kept: Tensor, gram: Tensor, damping: float) -> Tensor:
    """The definition of a refit: each row by numpy's lstsq on its kept columns."""
    inputs = torch.linalg.cholesky(damped_double(gram, damping)).T.numpy()
    found = np.zeros(weight.shape)
    for row, mask in enumerate(kept.numpy()):
        outputs = inputs @ weight[row].double().numpy()
        found[row, mask] = np.linalg.lstsq(inputs[:, mask], outputs, rcond=None)[0]
    return torch.from_numpy(found)


def lowest(scores: Tensor, candidates: Tensor, amount: Layer | EachRow | Pattern) -> Tensor:
    """The definition of an amount, in plain loops: which elements are pruned."""
    rows, columns = scores.shape
    pruned = torch.zeros_like(candidates)
    if isinstance(amount, Layer):
        groups = [[(r, c) for r in range(rows) for c in range(columns)]]
    else:
        width = amount.m if isinstance(amount, Pattern) else columns
        starts = [(r, begin) for r in range(rows) for begin in range(0, columns, width)]
        groups = [[(r, c) for c in range(b, min(b + width, columns))] for r, b in starts]
    for group in groups:
        among = sorted((at for at in group if candidates[at]), key=lambda at: float(scores[at]))
        if isinstance(amount, Pattern):
            count = max(0, len(among) - amount.n)
        else:
            given = amount.amount
            assert isinstance(given, (int, float))
            count = min(given, len(among)) if isinstance(given, int) else round(given * len(among))
        for at in among[:count]:
            pruned[at] = True
    return pruned
