"""Amounts select exactly what their definition in plain loops does."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur_server.solvers.amounts import EachRow, Layer, Pattern
from tests.solvers.layers import AMOUNTS, lowest


@pytest.mark.parametrize("amount", AMOUNTS, ids=str)
@given(rows=st.integers(1, 5), columns=st.integers(1, 13), seed=st.integers(0, 99))
def test_ties_go_to_the_lowest_index(
    amount: Layer | EachRow | Pattern, rows: int, columns: int, seed: int
) -> None:
    numbers = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (rows, columns), generator=numbers).float()
    scores[scores == 3] = torch.inf
    for share in (0.0, 0.3):
        candidates = torch.rand(rows, columns, generator=numbers) >= share
        expected = lowest(scores, candidates, amount)
        assert torch.equal(amount.prune(scores, candidates), expected)


@pytest.mark.parametrize("kind", [Layer, EachRow])
@given(columns=st.integers(1, 40), width=st.integers(1, 9), share=st.floats(0, 1))
def test_the_shares_of_blocks_add_up(
    kind: type[Layer] | type[EachRow], columns: int, width: int, share: float
) -> None:
    candidates = torch.rand(3, columns, generator=torch.Generator().manual_seed(columns)) < 0.7
    steps = kind(share).in_steps(candidates, width)
    scores, pruned = torch.zeros(3, columns), torch.zeros_like(candidates)
    for begin in range(0, columns, width):
        some = slice(begin, begin + width)
        pruned[:, some] = steps.amount(begin).prune(scores[:, some], candidates[:, some])
    whole = kind(share).prune(scores, candidates)
    dims = (0, 1) if kind is Layer else (1,)
    assert torch.equal(pruned.sum(dims), whole.sum(dims))
    assert not (pruned & ~candidates).any()
