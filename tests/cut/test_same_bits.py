"""The same request gives the same bits with any number of threads and any size of pieces."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur_server.backends.scan import SPACING
from secateur_server.backends.torch_backend import TorchBackend
from secateur_server.cut import select, sorted_keys
from secateur_server.cut.choice import Choice
from secateur_server.cut.prune import prune as apply_rules
from secateur_server.granularity.element import Element
from secateur_server.granularity.slice import Slice
from secateur_server.importance.magnitude import Magnitude
from secateur_server.importance.random import Random
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.rules import Scope, Selection
from secateur_server.state_dict.parameter import Parameter
from tests.conftest import examples
from tests.definition import amount_of
from tests.masks import packed, unpacked
from tests.reference import EXACT, HALF, distinct, lowest_slices

Answer = tuple[dict[str, Tensor], list[Sequence[Choice]]]


def rule(
    names: list[str],
    importance: Magnitude | Random,
    granularity: Element | Slice,
    amount: float = 0.5,
    is_global: bool = False,
    scores: Mapping[str, str] | None = None,
) -> Selection:
    scope: Scope = "global" if is_global else "tensor"
    return Selection(
        "rule", tuple(names), importance, granularity, scope, amount_of(amount), scores or {}
    )


def answer(
    parameters: Mapping[str, Parameter],
    rules: list[Selection],
    extras: Mapping[str, Tensor] | None = None,
) -> Answer:
    pruned, outcomes = apply_rules(RequestContext(), parameters, rules, extras or {})
    return {name: unpacked(parameter) for name, parameter in pruned.items()}, outcomes


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
    """Local and global rules of elements and slices, one after another."""
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
def test_masks_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    # Above 32768 elements torch splits a reduction among its threads.
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
    """Makes rows of the same values in other orders, so that norms differ only by rounding."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(columns, generator=generator, dtype=torch.float64).to(dtype)
    orders = [torch.randperm(columns, generator=generator) for _ in range(rows)]
    return torch.stack([values[order] for order in orders])


@pytest.mark.parametrize("dtype", [*EXACT, *HALF], ids=str)
@pytest.mark.parametrize(
    "p", [2.0, 0.5, *(pytest.param(p, marks=pytest.mark.slow) for p in (1.0, 3.0))]
)
@pytest.mark.usefixtures("threads")
def test_norms_of_large_slices_do_not_depend_on_the_number_of_threads(
    dtype: torch.dtype, p: float
) -> None:
    weight = shuffled_rows(4, 150_000, dtype)
    rules = [rule(["w"], Magnitude(p), Slice(0), 1)] * 3
    answers = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        answers.append(answer({"w": Parameter(weight)}, rules))
    for other in answers[1:]:
        assert_same_answers(answers[0], other)


def test_slices_with_equal_float32_norms_are_ties() -> None:
    weight = shuffled_rows(6, 100_000, torch.float32)
    masks, _ = answer({"w": Parameter(weight)}, [rule(["w"], Magnitude(2.0), Slice(0), 2)])
    assert torch.equal(masks["w"], lowest_slices(torch.ones(6), 2, weight.shape, 0))


PIECES = [8, 64, 1000]
# How the search finds bounds of the threshold: see select.py.
WAYS = ["histograms", "a sample", "a sample that misses", "ties in a sample", "ties that are none"]


# Every pair of a dtype, a piece and a way is tested by default, and all triples in the slow suite.
COMBINATIONS = [
    pytest.param(
        *(dtype, piece, way),
        id=f"{dtype}-{piece}-{way}",
        marks=[] if (row + column + layer) % 3 == 0 else pytest.mark.slow,
    )
    for row, dtype in enumerate([*EXACT, *HALF])
    for column, piece in enumerate(PIECES)
    for layer, way in enumerate(WAYS)
]


@pytest.mark.parametrize(("dtype", "piece", "way"), COMBINATIONS)
def test_masks_depend_neither_on_pieces_nor_on_the_search(
    monkeypatch: pytest.MonkeyPatch, piece: int, dtype: torch.dtype, way: str
) -> None:
    parameters = {
        "a": Parameter(distinct((5, 6, 4), dtype)),
        "b": Parameter(distinct((8, 7), dtype, 1), packed(distinct((8, 7), seed=2) > -0.5)),
    }
    extras = {"scores": distinct((5, 6, 4), seed=3)}
    whole = answer(parameters, every_rule(["a", "b"]), extras)
    cut_into(monkeypatch, piece, way)
    assert_same_answers(answer(parameters, every_rule(["a", "b"]), extras), whole)


def cut_into(monkeypatch: pytest.MonkeyPatch, piece: int, way: str) -> None:
    """Lowers the limits, so that few units take the way of millions."""
    monkeypatch.setattr(TorchBackend, "piece", piece)
    monkeypatch.setattr(TorchBackend, "ranked", piece)
    monkeypatch.setattr(select, "FEW", 0)  # few units would be sorted at once
    if way == "histograms":
        monkeypatch.setattr(select, "FEW_OF", 1 << 40)
        return
    monkeypatch.setattr(select, "LARGE", 1)
    monkeypatch.setattr(select, "SAMPLE", 1)
    monkeypatch.setattr(select, "SPACING", 3)
    monkeypatch.setattr(select, "FEW_OF", 1 if way != "ties in a sample" else 1 << 40)
    if way == "a sample that misses":
        monkeypatch.setattr(select, "_sampled_bounds", lambda units, count: (1, 3))
    if way == "ties that are none":
        monkeypatch.setattr(select, "_sampled_bounds", lambda units, count: (1, 1))


@settings(
    examples(150),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    values=st.lists(st.lists(st.integers(-2, 2), max_size=70), min_size=1, max_size=4),
    piece=st.sampled_from([8, 16, 40]),
    fraction=st.floats(0, 1),
    way=st.sampled_from(WAYS),
)
def test_ties_across_pieces_are_pruned_in_order(
    monkeypatch: pytest.MonkeyPatch,
    values: list[list[int]],
    piece: int,
    fraction: float,
    way: str,
) -> None:
    tensors = [torch.tensor(row, dtype=torch.float32) for row in values]
    parameters = {f"w{i}": Parameter(tensor) for i, tensor in enumerate(tensors)}
    rules = [rule(list(parameters), Magnitude(), Element(), fraction, is_global=True)]
    with monkeypatch.context() as small:
        cut_into(small, piece, way)
        masks, _ = answer(parameters, rules)
    flat = [abs(value) for row in values for value in row]
    count = round(fraction * len(flat))
    first = sorted(range(len(flat)), key=lambda i: (flat[i], i))[:count]
    kept = torch.cat([masks[name] for name in parameters])
    assert (~kept).nonzero().flatten().tolist() == sorted(first)


@cache
def millions(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns as many weights as are sampled, their sorted magnitudes, and the order."""
    generator = torch.Generator().manual_seed(0)
    count = select.LARGE + 12_345
    weight = {
        "normal": lambda: torch.randn(count, generator=generator),
        "periodic": lambda: (torch.arange(count) % SPACING).float() + 1,
        "constant": lambda: torch.full((count,), -0.5),
        "few values": lambda: torch.randint(-3, 4, (count,), generator=generator).float(),
    }[kind]()
    return weight, *torch.sort(weight.abs(), stable=True)


KINDS = ["normal", "periodic", "constant", "few values"]


@pytest.mark.parametrize(
    ("kind", "fraction"),
    [
        *((kind, 0.5) for kind in KINDS),
        (KINDS[-1], 1.0),
        *(pytest.param(kind, 1.0, marks=pytest.mark.slow) for kind in KINDS[:-1]),
        *(pytest.param(kind, f, marks=pytest.mark.slow) for f in (0.0001, 0.97) for kind in KINDS),
    ],
)
def test_exactly_the_lowest_of_millions_of_units_are_pruned(kind: str, fraction: float) -> None:
    """With ties across the pieces."""
    weight, ordered, order = millions(kind)
    count = len(weight)
    pruned = round(fraction * count)
    masks, outcomes = answer(
        {"w": Parameter(weight)}, [rule(["w"], Magnitude(), Element(), fraction)]
    )
    kept = torch.ones(count, dtype=torch.bool)
    kept[order[:pruned]] = False
    assert torch.equal(masks["w"], kept)
    assert outcomes[0][0].pruned == pruned
    threshold = ordered[pruned - 1]
    choice = outcomes[0][0]
    assert choice.threshold == threshold.item()
    assert choice.ties == int((weight.abs() == threshold).sum())
    assert choice.ties_pruned == pruned - int((weight.abs() < threshold).sum())


def test_few_unpruned_units_of_millions_are_compared_with_each_other() -> None:
    """The unpruned units are so few that they are sorted at once."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5_000_000, generator=generator)
    kept = torch.zeros(len(weight), dtype=torch.bool)
    kept[torch.randperm(len(weight), generator=generator)[: sorted_keys.FEW + 1000]] = True
    parameters = {"w": Parameter(weight, packed(kept))}
    masks, _ = answer(parameters, [rule(["w"], Magnitude(), Element(), 0.25)])
    unpruned = kept.nonzero().view(-1)
    order = torch.sort(weight[unpruned].abs(), stable=True).indices
    kept[unpruned[order[: round(0.25 * len(unpruned))]]] = False
    assert torch.equal(masks["w"], kept)


@pytest.mark.parametrize("dtype", [*EXACT, *HALF], ids=str)
def test_inputs_are_not_modified(dtype: torch.dtype) -> None:
    weight, mask = distinct((8, 7), dtype), packed(distinct((8, 7), seed=1) > -0.5)
    scores = distinct((8, 7), seed=2)
    copies = weight.clone(), mask.bits.clone(), scores.clone()
    answer({"w": Parameter(weight, mask)}, every_rule(["w"]), {"scores": scores})
    assert all(map(torch.equal, (weight, mask.bits, scores), copies))
