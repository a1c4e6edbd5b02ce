"""One request has one answer, however many threads work at it and in whatever pieces."""

import math
from collections.abc import Iterator, Mapping

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur_server.pruning import parallel, select
from secateur_server.pruning.prune import Choice
from secateur_server.pruning.prune import prune as apply_rules
from secateur_server.pruning.spec import (
    Element,
    Magnitude,
    Parameter,
    Random,
    Selection,
    Slice,
)
from tests.pruning.torch_side import EXACT, HALF, distinct, lowest_slices

Answer = tuple[dict[str, Tensor], list[list[Choice]]]


def rule(
    names: list[str],
    importance: Magnitude | Random,
    granularity: Element | Slice,
    amount: float = 0.5,
    is_global: bool = False,
    scores: Mapping[str, str] | None = None,
) -> Selection:
    return Selection("rule", tuple(names), importance, granularity, is_global, amount, scores or {})


def answer(
    parameters: Mapping[str, Parameter],
    rules: list[Selection],
    extras: Mapping[str, Tensor] | None = None,
) -> Answer:
    pruned, outcomes = apply_rules(parameters, rules, extras or {})
    masks = {name: parameter.mask for name, parameter in pruned.items()}
    return {name: mask for name, mask in masks.items() if mask is not None}, outcomes


def assert_same_answers(one: Answer, other: Answer) -> None:
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(mask, other[0][name]) for name, mask in one[0].items())
    assert one[1] == other[1]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def every_rule(names: list[str]) -> list[Selection]:
    """Local and global, elements and slices, one behind the other."""
    return [
        rule(names, Magnitude(), Element(), 0.137),
        rule(names, Magnitude(2.0), Slice(1), 0.2),
        rule(names, Magnitude(math.inf), Slice(-1), 1),
        rule(names, Random(3), Slice(0), 0.2),
        rule(names, Magnitude(), Element(), 0.3, is_global=True),
        rule(names, Magnitude(1.0), Slice(0), 2, scores={names[0]: "scores"}),
        rule(names, Random(4), Element(), 0.3),
        rule(names, Random(5), Element(), 0.3, is_global=True),
    ]


@pytest.mark.parametrize("dtype", [*EXACT, *HALF], ids=str)
@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_does_not_show(dtype: torch.dtype) -> None:
    # Above 32768 elements torch shares a reduction out to its threads.
    shapes = {"a": (40, 60, 50), "b": (400, 310)}
    generator = torch.Generator().manual_seed(0)
    parameters = {
        name: Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in shapes.items()
    }
    extras = {"scores": torch.randn(shapes["a"], generator=generator)}
    answers = []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        answers.append(answer(parameters, every_rule(list(shapes)), extras))
    for other in answers[1:]:
        assert_same_answers(answers[0], other)


def shuffled_rows(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Rows of the same values in other orders: their norms differ by rounding errors at most."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(columns, generator=generator, dtype=torch.float64).to(dtype)
    orders = [torch.randperm(columns, generator=generator) for _ in range(rows)]
    return torch.stack([values[order] for order in orders])


@pytest.mark.parametrize("dtype", [*EXACT, *HALF], ids=str)
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 0.5])
@pytest.mark.usefixtures("threads")
def test_rounding_in_large_slices_does_not_show(dtype: torch.dtype, p: float) -> None:
    weight = shuffled_rows(4, 600_000, dtype)
    rules = [rule(["w"], Magnitude(p), Slice(0), 1)] * 3
    answers = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        answers.append(answer({"w": Parameter(weight)}, rules))
    for other in answers[1:]:
        assert_same_answers(answers[0], other)


def test_slices_of_one_norm_are_ties_where_the_norm_is_rounded_to_float32() -> None:
    weight = shuffled_rows(6, 100_000, torch.float32)
    masks, _ = answer({"w": Parameter(weight)}, [rule(["w"], Magnitude(2.0), Slice(0), 2)])
    assert torch.equal(masks["w"], lowest_slices(torch.ones(6), 2, weight.shape, 0))


PIECES = [7, 64, 1000]


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("dtype", [*EXACT, *HALF], ids=str)
def test_the_size_of_a_piece_does_not_show(
    monkeypatch: pytest.MonkeyPatch, piece: int, dtype: torch.dtype
) -> None:
    parameters = {
        "a": Parameter(distinct((5, 6, 4), dtype)),
        "b": Parameter(distinct((8, 7), dtype, 1), distinct((8, 7), seed=2) > -0.5),
    }
    extras = {"scores": distinct((5, 6, 4), seed=3)}
    whole = answer(parameters, every_rule(["a", "b"]), extras)
    cut_into(monkeypatch, piece)
    assert_same_answers(answer(parameters, every_rule(["a", "b"]), extras), whole)


def cut_into(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(parallel, "PIECE", piece)
    monkeypatch.setattr(select, "FEW", 0)  # few units are ranked at once


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    values=st.lists(st.lists(st.integers(-2, 2), max_size=40), min_size=1, max_size=4),
    piece=st.integers(1, 9),
    fraction=st.floats(0, 1),
)
def test_ties_that_lie_across_pieces_go_in_order(
    monkeypatch: pytest.MonkeyPatch, values: list[list[int]], piece: int, fraction: float
) -> None:
    tensors = [torch.tensor(row, dtype=torch.float32) for row in values]
    parameters = {f"w{i}": Parameter(tensor) for i, tensor in enumerate(tensors)}
    rules = [rule(list(parameters), Magnitude(), Element(), fraction, is_global=True)]
    with monkeypatch.context() as small:
        cut_into(small, piece)
        masks, _ = answer(parameters, rules)
    flat = [abs(value) for row in values for value in row]
    count = round(fraction * len(flat))
    first = sorted(range(len(flat)), key=lambda i: (flat[i], i))[:count]
    kept = torch.cat([masks[name] for name in parameters])
    assert (~kept).nonzero().flatten().tolist() == sorted(first)


@pytest.mark.parametrize("dtype", [*EXACT, *HALF], ids=str)
def test_nothing_that_comes_in_is_written_to(dtype: torch.dtype) -> None:
    weight, mask = distinct((8, 7), dtype), distinct((8, 7), seed=1) > -0.5
    scores = distinct((8, 7), seed=2)
    copies = weight.clone(), mask.clone(), scores.clone()
    answer({"w": Parameter(weight, mask)}, every_rule(["w"]), {"scores": scores})
    assert all(map(torch.equal, (weight, mask, scores), copies))


def test_more_units_than_a_piece_are_ranked_as_one() -> None:
    """Across the real piece of 2^20 elements: the ties at its border too."""
    weight = (torch.arange(3 * parallel.PIECE // 2) % 5).float()
    masks, outcomes = answer({"w": Parameter(weight)}, [rule(["w"], Magnitude(), Element(), 0.7)])
    count = round(0.7 * len(weight))
    order = torch.sort(weight, stable=True).indices
    kept = torch.ones(len(weight), dtype=torch.bool)
    kept[order[:count]] = False
    assert torch.equal(masks["w"], kept)
    assert outcomes[0][0].pruned == count
