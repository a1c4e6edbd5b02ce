"""The sums of each kind of layer, against loops over inputs that are computed layer by layer."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import Module

import secateur
from tests.calibration.naive import (
    assert_close,
    assert_sums,
    channels_of,
    needed,
    rows_of,
    whole_numbers,
)
from tests.conftest import examples


def test_two_linear_layers() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    batches = [torch.randn(3, 7, 5), torch.randn(2, 5), torch.randn(5)]
    found = secateur.calibrate(module, batches)
    assert list(found) == ["0.weight", "2.weight"]
    flat = torch.cat([batch.reshape(-1, 5) for batch in batches])
    assert_sums(found["0.weight"], rows_of(flat))
    assert_sums(
        found["2.weight"], rows_of(torch.cat([module[0](b).relu().reshape(-1, 4) for b in batches]))
    )
    assert found["0.weight"].gram is None
    exact, first = flat.double(), found["0.weight"]
    np.testing.assert_allclose(first.rms, exact.square().mean(0).sqrt())
    np.testing.assert_allclose(needed(first.mean), exact.mean(0))
    np.testing.assert_allclose(needed(first.variance), exact.var(0, correction=0))


CONVOLUTIONS = [
    (nn.Conv1d(4, 6, 3), (2, 4, 9), 1),
    (nn.Conv1d(4, 6, 3, groups=2, padding="same"), (2, 4, 9), 1),
    (nn.Conv2d(3, 5, (2, 3), stride=2), (2, 3, 5, 6), 1),
    (nn.Conv2d(4, 4, 3, groups=4), (1, 4, 5, 5), 1),
    (nn.Conv3d(2, 3, 2), (2, 2, 3, 3, 4), 1),
    (nn.ConvTranspose1d(4, 6, 3), (2, 4, 5), 0),
    (nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 3, 3), 0),
    (nn.ConvTranspose3d(2, 3, 2), (2, 2, 3, 3, 3), 0),
]


@pytest.mark.parametrize(("layer", "shape", "dim"), CONVOLUTIONS, ids=str)
def test_a_convolution_sums_channels_over_positions(
    layer: Module, shape: tuple[int, ...], dim: int
) -> None:
    batches = [whole_numbers(*shape, seed=seed) for seed in range(3)]
    found = secateur.calibrate(layer, batches)["weight"]
    assert_sums(found, [row for batch in batches for row in channels_of(batch)], is_exact=True)
    assert found.input_dim == dim
    unbatched = secateur.calibrate(layer, [image for batch in batches for image in batch])
    assert unbatched["weight"] == found


def test_an_embedding_counts_the_uses_of_each_row() -> None:
    module = nn.Embedding(5, 3)
    batches = [torch.tensor([[0, 1, 1], [4, 1, 0]]), torch.tensor([4])]
    found = secateur.calibrate(module, batches, gram=True)["weight"]
    assert_sums(found, [np.eye(5)[i] for i in [0, 1, 1, 4, 1, 0, 4]], is_exact=True)
    assert found.sum_squares.tolist() == [2, 3, 0, 0, 2]
    assert found.input_dim == 0
    assert found.gram is None


class Tied(Module):
    """The table of embeddings is the weight of the head, which runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 3)
        self.body = nn.Linear(3, 3)
        self.head = nn.Linear(3, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        return self.head(hidden) + self.head(self.body(hidden))  # type: ignore[no-any-return]


def test_a_tied_weight_has_its_first_name_and_the_sums_of_all_layers_that_use_it() -> None:
    module, ids = Tied(), torch.tensor([[0, 5, 2]])
    found = secateur.calibrate(module, [ids])
    assert list(found) == ["embed.weight", "body.weight"]
    hidden = module.embed(ids)
    both = rows_of(torch.cat([hidden, module.body(hidden)]))
    assert_sums(found["embed.weight"], both)
    assert found["embed.weight"].input_dim == 1


def test_two_layers_with_one_weight() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    batch = torch.randn(4, 3)
    found = secateur.calibrate(module, [batch], gram=True)
    assert list(found) == ["0.weight"]
    rows = torch.cat([batch, module[0](batch)])
    assert_sums(found["0.weight"], rows_of(rows))
    np.testing.assert_allclose(
        needed(found["0.weight"].gram), (rows.T @ rows).detach(), rtol=1e-5, atol=1e-5
    )


NET = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
SAMPLES = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))


@examples(100)
@given(cuts=st.sets(st.integers(1, 11)), is_sum=st.booleans())
def test_any_split_into_batches_gives_the_same(cuts: set[int], is_sum: bool) -> None:
    expected = secateur.calibrate(NET, [SAMPLES], gram=True)
    ends = [*sorted(cuts), 12]
    batches = [SAMPLES[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    if is_sum:
        runs = [secateur.calibrate(NET, [batch], gram=True) for batch in batches]
        found = sum(runs[1:], runs[0])
    else:
        found = secateur.calibrate(NET, iter(batches), gram=True)
    assert_close(found, expected)


@pytest.mark.parametrize("size", [1, 2, 5, 7])
def test_whole_numbers_are_exact_under_any_split(size: int) -> None:
    layer, values = nn.Conv2d(2, 3, 3, padding=1), whole_numbers(7, 2, 4, 4)
    whole = secateur.calibrate(layer, [values], gram=True)
    assert secateur.calibrate(layer, values.split(size), gram=True) == whole  # type: ignore[no-untyped-call]
    parts = [secateur.calibrate(layer, [part], gram=True) for part in values.split(size)]  # type: ignore[no-untyped-call]
    assert sum(parts[1:], parts[0]) == whole


def test_half_precision_is_summed_in_float64() -> None:
    """In float16 itself the sum of so many numbers would be 2048, and their squares infinite."""
    values = torch.full((3000, 2), 1, dtype=torch.float16)
    values[0] = 300
    found = secateur.calibrate(nn.Linear(2, 1).half(), [values], gram=True)["weight"]
    assert needed(found.sum).tolist() == [3299.0] * 2
    assert found.sum_squares.tolist() == [92_999.0] * 2
    assert needed(found.gram).tolist() == [[92_999.0] * 2] * 2


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_an_input_that_is_not_finite(wrong: float) -> None:
    bad = torch.zeros(2, 3)
    bad[1, 2] = wrong
    module = nn.Sequential(nn.Identity(), nn.Linear(3, 1))
    with pytest.raises(secateur.InvalidStatistics, match=r"^1.weight: batch 1: channel 2 of"):
        secateur.calibrate(module, [torch.zeros(2, 3), bad])
    assert not module[1]._forward_pre_hooks
