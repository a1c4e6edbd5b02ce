"""Tokens that a mask leaves out are not summed."""

from collections import UserDict
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import Module

import secateur
from tests.calibration.naive import assert_sums, gram_of, needed, rows_of

IDS = torch.tensor([[1, 2, 0], [3, 0, 0]])
MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


class Model(Module):
    """A layer on tokens, one on flat tokens, and one on the sum of a sample's tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.flat = nn.Linear(3, 3)
        self.tokens = nn.Linear(3, 2)
        self.pool = nn.Linear(2, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.embed(input_ids)
        hidden = self.flat(hidden.reshape(-1, 3)).reshape(hidden.shape)
        return self.pool(self.tokens(hidden).sum(1))  # type: ignore[no-any-return]


MODEL = Model()


def inputs() -> dict[str, Tensor]:
    hidden = MODEL.embed(IDS)
    tokens = MODEL.flat(hidden)
    return {
        "flat.weight": hidden,
        "tokens.weight": tokens,
        "pool.weight": MODEL.tokens(tokens).sum(1),
    }


@pytest.mark.parametrize("mask", [None, "attention_mask", lambda batch: batch["input_ids"] != 0])
@pytest.mark.parametrize("kind", [dict, UserDict])
def test_padding_is_left_out(mask: Any, kind: Any) -> None:
    batch = kind(input_ids=IDS, attention_mask=MASK)
    found = secateur.calibrate(MODEL, [batch], gram=True, mask=mask)
    kept = MASK.bool()
    assert found["embed.weight"].sum_squares.tolist() == [0, 1, 1, 1]
    for name, value in inputs().items():
        rows = rows_of(value if name == "pool.weight" else value[kept])
        assert_sums(found[name], rows)
        np.testing.assert_allclose(needed(found[name].gram), gram_of(rows), rtol=1e-5, atol=1e-5)


def test_false_is_no_mask() -> None:
    batch = {"input_ids": IDS, "attention_mask": MASK}
    found = secateur.calibrate(MODEL, [batch], mask=False)
    assert {name: layer.count for name, layer in found.items()} == {
        **{"embed.weight": 6, "flat.weight": 6, "tokens.weight": 6, "pool.weight": 2}
    }
    assert found == secateur.calibrate(MODEL, [IDS])


def constant(mask: Any, batch: Any) -> Any:
    return mask


def test_layers_that_the_default_mask_does_not_fit() -> None:
    batch = {"input_ids": IDS, "attention_mask": MASK}
    assert secateur.calibrate(MODEL, [batch], layers="pool")["pool.weight"].count == 2
    with pytest.raises(secateur.InvalidSpec, match=r"begins with \[2, 3\]; give mask=False"):
        secateur.calibrate(MODEL, [batch], layers="pool", mask="attention_mask")


def test_a_mask_of_other_types() -> None:
    expected = secateur.calibrate(MODEL, [{"input_ids": IDS, "attention_mask": MASK}])
    for mask in (MASK.tolist(), MASK.numpy(), MASK.bool()):
        assert secateur.calibrate(MODEL, [(IDS,)], mask=partial(constant, mask)) == expected


def test_nan_in_padding_is_left_out() -> None:
    values = torch.ones(1, 3, 2)
    values[0, 2] = torch.nan
    found = secateur.calibrate(
        nn.Linear(2, 1), [values], gram=True, mask=lambda batch: [[True, True, False]]
    )
    assert found["weight"].count == 2
    assert needed(found["weight"].gram).tolist() == [[2, 2], [2, 2]]


@pytest.mark.parametrize(
    ("batch", "mask", "message"),
    [
        ((IDS,), "attention_mask", "mask: the batch has no 'attention_mask': it is not a mapping"),
        ({"input_ids": IDS}, "other", "mask: the batch has no 'other': it has 'input_ids'"),
        ((IDS,), 3, "mask: 3 is not a name, a function, None or False"),
        ((IDS,), lambda batch: [True], r"mask: has shape \[1\], not \[batch, tokens\]; give mask"),
        ((IDS,), lambda batch: "text", "mask: 'text' is not an array"),
        ((IDS,), lambda batch: [[True] * 9], r"mask: no layer has .* begins with \[1, 9\]; give"),
    ],
)
def test_wrong_masks(batch: tuple[Any] | Mapping[str, Any], mask: Any, message: str) -> None:
    with pytest.raises(secateur.InvalidSpec, match=f"^{message}"):
        secateur.calibrate(MODEL, [batch], mask=mask)
