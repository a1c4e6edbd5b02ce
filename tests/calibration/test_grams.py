"""X^T X of each layer, and layers that share one."""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import Module

import secateur
from secateur.calibration.grams import Gram
from tests.calibration.naive import gram_of, needed, rows_of, whole_numbers

CONVOLUTIONS = [
    (nn.Conv1d(3, 4, 3), (3, 8)),
    (nn.Conv1d(3, 4, 4, padding="same"), (3, 8)),
    (nn.Conv2d(3, 4, (2, 3), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (3, 6, 7)),
    (nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), (2, 5, 5)),
    (nn.Conv2d(2, 4, 3, padding=2, padding_mode="circular"), (2, 5, 5)),
    (nn.Conv3d(2, 3, (1, 2, 2), stride=2, padding=1), (2, 3, 4, 5)),
]


def patch_rows(layer: Any, sample: Tensor) -> list[list[float]]:
    """The factor of each element of the weight in each output, by convolving one-hot weights."""
    elements = layer.weight[0].numel()
    single = type(layer)(
        layer.in_channels,
        elements,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        bias=False,
        padding_mode=layer.padding_mode,
    )
    with torch.no_grad():
        single.weight.copy_(torch.eye(elements).reshape(single.weight.shape))
        return rows_of(single(sample[None])[0].flatten(1).T)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS, ids=str)
def test_the_gram_of_a_convolution_is_of_patches(layer: Any, shape: tuple[int, ...]) -> None:
    batch = whole_numbers(3, *shape)
    found = secateur.calibrate(layer, [batch[:2], batch[2]], gram=True)
    rows = [row for sample in batch for row in patch_rows(layer, sample)]
    gram = needed(found["weight"].gram)
    assert gram.dtype == np.float32
    assert (gram == gram_of(rows)).all()
    assert found.triangle("weight").size == layer.weight[0].numel()


def test_large_inputs_are_cut_into_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(48, 2))
    batch = whole_numbers(5, 2, 6, 6)
    expected = secateur.calibrate(module, [batch], gram=True)
    for size in (1, 7, 100):
        monkeypatch.setattr("secateur.calibration.sums.PIECE", size)
        monkeypatch.setattr("secateur.calibration.kinds.ROWS", 2)
        found = secateur.calibrate(module, [batch], gram=True)
        assert found["0.weight"] == expected["0.weight"]
        np.testing.assert_allclose(
            needed(found["2.weight"].gram), needed(expected["2.weight"].gram), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(4, 4, 3, groups=2), nn.ConvTranspose2d(4, 2, 3)], ids=str
)
def test_grouped_and_transposed_convolutions_have_no_gram(layer: Module) -> None:
    found = secateur.calibrate(layer, [torch.randn(1, 4, 5, 5)], gram=True)
    assert found["weight"].gram is None
    with pytest.raises(
        secateur.InvalidStatistics, match=r"^weight: the statistics have no gram .*grouped"
    ):
        found.triangle("weight")
    with pytest.raises(secateur.InvalidStatistics, match=r"^fc: the statistics have no such layer"):
        found.triangle("fc")


class Attention(Module):
    """Layers q, k and v see one tensor; `late` sees it too, after others."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.late = (nn.Linear(4, 4) for _ in range(4))
        self.o = nn.Linear(4, 4)
        self.is_changed = False

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        value = self.q(x) * self.k(x)
        value = value + self.v(x if other is None else other)
        return self.late(x) + self.o(value)  # type: ignore[no-any-return]


def test_layers_with_the_same_input_share_a_gram() -> None:
    module, batches = Attention(), [whole_numbers(2, 3, 4, seed=seed) for seed in range(3)]
    found = secateur.calibrate(module, batches, gram=True)
    assert found.gram_owners() == {
        **dict.fromkeys(["q.weight", "k.weight", "v.weight", "late.weight"], "q.weight"),
        "o.weight": "o.weight",
    }
    assert found["q.weight"].triangle is found["late.weight"].triangle
    expected = gram_of(row for batch in batches for row in rows_of(batch))
    assert (needed(found["v.weight"].gram) == expected).all()
    doubled = found + found
    assert doubled.gram_owners() == found.gram_owners()
    assert (needed(doubled["v.weight"].gram) == 2 * expected).all()


@pytest.mark.parametrize("differs", [0, 1, 2])
def test_layers_that_once_had_another_input_share_none(differs: int) -> None:
    module = Attention()
    batches = [whole_numbers(2, 3, 4, seed=seed) for seed in range(3)]
    others = [
        whole_numbers(2, 3, 4, seed=9) if index == differs else batches[index] for index in range(3)
    ]
    pairs = [(x, None if x is other else other) for x, other in zip(batches, others, strict=True)]
    found = secateur.calibrate(module, pairs, gram=True)
    owners = found.gram_owners()
    assert [owners[f"{n}.weight"] for n in ("q", "k", "late", "v")] == [
        *["q.weight"] * 3,
        "v.weight",
    ]
    assert (
        needed(found["k.weight"].gram) == gram_of(row for b in batches for row in rows_of(b))
    ).all()
    assert (
        needed(found["v.weight"].gram) == gram_of(row for b in others for row in rows_of(b))
    ).all()
    both = found + secateur.calibrate(module, batches, gram=True)  # there all four share one
    assert both.gram_owners() == owners
    assert (
        needed(both["v.weight"].gram)
        == needed(found["v.weight"].gram) + needed(found["q.weight"].gram)
    ).all()


class Steps(Module):
    """Each layer sees a new tensor, which may have the memory of one that was freed."""

    def __init__(self, is_in_place: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))
        self.is_in_place = is_in_place

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for step, layer in enumerate(self.layers):
            layer(x)
            x = x.add_(step + 1) if self.is_in_place else x + (step + 1)
        return x


@pytest.mark.parametrize("is_in_place", [False, True])
def test_memory_that_is_used_again_is_another_input(is_in_place: bool) -> None:
    x = whole_numbers(5, 64)
    found = secateur.calibrate(Steps(is_in_place), [x, x], gram=True)
    assert len(set(found.gram_owners().values())) == 6
    for step, layer in enumerate(found.values()):
        total = 2 * gram_of(rows_of(x + sum(range(step + 1))))
        assert (needed(layer.gram) == total).all()


class Sometimes(Module):
    """One of two layers does not run on every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor, has_b: bool) -> Tensor:
        return self.a(x) + (self.b(x) if has_b else 0)  # type: ignore[no-any-return]


def test_a_layer_that_runs_on_some_batches() -> None:
    x, y = whole_numbers(3, 2), whole_numbers(4, 2, seed=1)
    found = secateur.calibrate(Sometimes(), [(x, True), (y, False), (x, True)], gram=True)
    assert (needed(found["b.weight"].gram) == 2 * gram_of(rows_of(x))).all()
    assert (needed(found["a.weight"].gram) == 2 * gram_of(rows_of(x)) + gram_of(rows_of(y))).all()
    assert found["b.weight"].count == 6


def test_memory_does_not_grow_with_the_batches() -> None:
    """While a batch is made, only the one before it and one matrix for each input exist."""
    module = Attention()
    alive: list[weakref.ref[Tensor]] = []
    matrices: list[int] = []

    def batches() -> Iterator[Tensor]:
        for _ in range(6):
            made = torch.randn(2, 3, 4)
            alive.append(weakref.ref(made))
            yield made
            del made
            assert sum(one() is not None for one in alive) <= 1
            grams = (one for one in gc.get_objects() if type(one) is Gram)
            matrices.append(sum(one.matrix is not None for one in grams))

    secateur.calibrate(module, batches(), gram=True)
    assert matrices == [2] * 6  # of q, k, v and late; of o


@pytest.fixture
def default_precision() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


def medium() -> None:
    torch.set_float32_matmul_precision("medium")


MKLDNN: Any = torch.backends.mkldnn


def bf16() -> None:
    MKLDNN.matmul.fp32_precision = "bf16"


@pytest.mark.parametrize("choose", [medium, bf16])
@pytest.mark.usefixtures("default_precision")
def test_products_are_of_full_precision(choose: Callable[[], None]) -> None:
    """Under autocast, and where the caller allows bfloat16 in the products of the model."""
    layer, x = nn.Linear(8, 8), torch.randn(100, 8)
    expected = x.double().T @ x.double()
    choose()
    with torch.autocast("cpu", torch.bfloat16):
        found = secateur.calibrate(layer, [x], gram=True)["weight"]
    assert MKLDNN.matmul.fp32_precision == "bf16"
    if choose is medium:
        assert torch.get_float32_matmul_precision() == "medium"
    np.testing.assert_allclose(needed(found.gram), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.sum_squares, expected.diagonal(), rtol=1e-12)
