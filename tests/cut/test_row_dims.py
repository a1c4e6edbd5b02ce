"""Rows along any dimension: the same masks as of a weight with that dimension in front."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur
from secateur import LayerStatistics, Statistics
from secateur.spec import Rule, Spec
from secateur_proto import spec_pb2 as pb
from secateur_server.backends.randomness import random_keys, random_scores
from secateur_server.backends.torch_backend import TorchBackend
from secateur_server.cut.plan import plan
from secateur_server.errors import AmountOutOfRange, NanScores
from secateur_server.granularity.block import Block
from secateur_server.granularity.n_m import NM
from secateur_server.importance.activation import Activation
from secateur_server.importance.random import Random
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.amounts import Table
from secateur_server.state_dict.parameter import Parameter
from tests.conftest import examples
from tests.cut.test_rows import lowest_of_rows
from tests.definition import DTYPES, amount_of, applied, kept_of, rule
from tests.masks import packed

some = examples(60)
AMOUNTS = st.sampled_from([0.0, 0.3, 0.5, 1.0, 1, 2])


def moved(parameter: Parameter, dim: int) -> Parameter:
    """The parameter with a dimension moved to the front."""
    weight = parameter.weight.movedim(dim, 0).contiguous()
    if parameter.mask is None:
        return Parameter(weight)
    return Parameter(weight, packed(kept_of(parameter).movedim(dim, 0).contiguous()))


def outcome(
    parameter: Parameter, amount: float, dim: int, extras: Mapping[str, Tensor], **choices: Any
) -> tuple[Tensor | None, Any]:
    """The mask with the rows in front, and the choice; or None, and the error."""
    selection = rule(["w"], amount, scope="row", row_dims={"w": dim} if dim else {}, **choices)
    try:
        masks, (choice,) = applied({"w": parameter}, selection, **extras)
    except AmountOutOfRange as error:
        return None, str(error)
    return masks["w"].movedim(dim, 0), choice


@st.composite
def parameters(draw: st.DrawFn, dims: int = 4) -> tuple[Parameter, int]:
    """Draws a weight with many ties and a prior mask, and a dimension of it."""
    shape = draw(st.lists(st.integers(1, 6), min_size=2, max_size=dims))
    numbers = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    weight = torch.from_numpy(numbers.integers(-4, 5, shape) / 4).to(draw(st.sampled_from(DTYPES)))
    kept = torch.from_numpy(numbers.random(shape) < draw(st.sampled_from([0.6, 1.0])))
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    return Parameter(weight, None if kept.all() else packed(kept)), dim


@some
@given(drawn=parameters(), amount=AMOUNTS, of_all=st.booleans())
def test_elements(drawn: tuple[Parameter, int], amount: float, of_all: bool) -> None:
    parameter, dim = drawn
    found = outcome(parameter, amount, dim, {}, of_all=of_all)
    expected = outcome(moved(parameter, dim), amount, 0, {}, of_all=of_all)
    assert found[1] == expected[1]
    assert found[0] is None or torch.equal(found[0], needed(expected[0]))


def needed(mask: Tensor | None) -> Tensor:
    assert mask is not None
    return mask


@some
@given(
    drawn=parameters(dims=2),
    amount=st.sampled_from([0.3, 0.5]),
    is_relative=st.booleans(),
    p=st.sampled_from([1.0, 2.0]),
)
def test_matrices_by_activations(
    drawn: tuple[Parameter, int], amount: float, is_relative: bool, p: float
) -> None:
    """Of a transposed weight the factors of inputs are those of dimension 0; RIA is symmetric."""
    parameter, _ = drawn
    inputs = torch.arange(parameter.weight.shape[0]) % 3 / 2
    of = Activation("activation", p, {}, {"w": "in"}, is_relative)
    other = Activation("activation", p, {"w": "in"}, {}, is_relative)
    found, choice = outcome(parameter, amount, 1, {"in": inputs}, importance=of)
    expected = outcome(moved(parameter, 1), amount, 0, {"in": inputs}, importance=other)
    assert torch.equal(needed(found), needed(expected[0]))
    assert choice == expected[1]


@pytest.mark.parametrize("dim", [1, 2, -1])
def test_units_of_several_elements(dim: int) -> None:
    weight = torch.randn(6, 8, 10, generator=torch.Generator().manual_seed(0))
    parameter, moved_parameter = Parameter(weight), Parameter(weight.movedim(dim, 0).contiguous())
    sizes = (2, 4, 5)
    order = [dim % 3, *(d for d in range(3) if d != dim % 3)]
    pairs = [
        (Block(sizes, False), Block(tuple(sizes[d] for d in order), False)),
        (NM(1, 3, 0), NM(1, 3, order.index(0))),
        (NM(2, 4, dim), NM(2, 4, 0)),
    ]
    for granularity, other in pairs:
        found, choice = outcome(parameter, 0.5, dim, {}, granularity=granularity)
        expected = outcome(moved_parameter, 0.5, 0, {}, granularity=other)
        assert torch.equal(needed(found), needed(expected[0])), granularity
        assert choice == expected[1]


def test_random_rows_have_the_count_and_the_numbers_of_their_elements() -> None:
    found, _ = outcome(Parameter(torch.ones(50, 40)), 20, 1, {}, importance=Random(3))
    numbers = random_keys(random_scores(3, "w"), torch.arange(2000)).view(50, 40).T
    expected = lowest_of_rows(numbers, torch.ones(40, 50, dtype=torch.bool), 20, False)
    assert torch.equal(needed(found), expected)


@pytest.mark.parametrize("shape", [(700, 900), (3, 1100, 130)])
@pytest.mark.parametrize("prior", [1.0, 0.7])
def test_many_pieces(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], prior: float) -> None:
    monkeypatch.setattr(TorchBackend, "piece", 1 << 14)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    kept = torch.rand(shape, generator=generator) < prior
    parameter = Parameter(weight, None if prior == 1 else packed(kept))
    found, choice = outcome(parameter, 0.4, 1, {})
    expected = outcome(moved(parameter, 1), 0.4, 0, {})
    assert torch.equal(needed(found), needed(expected[0]))
    assert choice == expected[1]


def test_a_row_with_too_few_units_and_nan_are_named() -> None:
    kept = torch.ones(4, 3, dtype=torch.bool)
    kept[:3, 2] = False
    parameter = Parameter(torch.ones(4, 3), packed(kept))
    message = "2 is more than the 1 unpruned units of row 2 of 'w'"
    with pytest.raises(AmountOutOfRange, match=message):
        applied({"w": parameter}, rule(["w"], 2, scope="row", row_dims={"w": 1}))
    weight = torch.ones(4, 3)
    weight[1, 2] = torch.nan
    with pytest.raises(NanScores, match=re.escape("is NaN at [1, 2]")):
        applied({"w": Parameter(weight)}, rule(["w"], 2, scope="row", row_dims={"w": 1}))


@pytest.mark.parametrize("importance", ["magnitude", "activation"])
def test_owl_tables_and_plans_count_both_kinds_of_rows(importance: str) -> None:
    generator = torch.Generator().manual_seed(0)
    model, extras = {}, {}
    for layer in range(3):
        for name, shape in (("a", (16, 20)), ("b", (20, 24))):
            weight = torch.randn(shape, generator=generator)
            weight[torch.rand(shape, generator=generator) < 0.02 * layer] *= 12
            model[f"h.{layer}.{name}"] = Parameter(weight)
            extras[f"in.h.{layer}.{name}"] = torch.rand(20, generator=generator)
    names = list(model)
    dims = {name: 1 for name in names if name.endswith("b")}
    choices: dict[str, Any] = {"scope": "row", "row_dims": dims}
    if importance == "activation":
        inputs, outputs = ({n: f"in.{n}" for n in names if n.endswith(end)} for end in ("a", "b"))
        choices["importance"] = Activation("activation", 1.0, inputs, outputs, False)
    owl = rule(names, 0.5, allocation="owl", **choices)
    table = rule(names, Table(dict.fromkeys(names[:3], 0.25)), **choices)
    for selection in (owl, table):
        masks, found = applied(model, selection, **extras)
        for name, mask in masks.items():
            rows = (~mask).sum(0 if name in dims else 1).tolist()
            assert len(set(rows)) == 1, name
        amount = amount_of(0.5) if selection is owl else selection.amount
        (planned,) = plan(RequestContext(), selection, [amount], model, extras)
        assert list(planned.choices) == list(found)
    shares = [int((~mask).sum()) for mask in masks.values()]
    assert [share > 0 for share in shares] == [True] * 3 + [False] * 3


def spec_of(dims: Sequence[tuple[str, int]], **choices: Any) -> Spec:
    fields: dict[str, Any] = {
        "tensors": ["*.weight"],
        "magnitude": pb.Magnitude(p=1),
        "granularity": pb.GRANULARITY_ELEMENT,
        "scope": pb.SCOPE_PER_ROW,
        "fraction": 0.5,
        **choices,
    }
    row_dims = [pb.RowDim(tensors=name, dim=dim) for name, dim in dims]
    return Spec((Rule(pb.Rule(selection=pb.Selection(row_dims=row_dims, **fields)), {}),))


@pytest.mark.parametrize(
    ("dims", "choices", "message"),
    [
        ([("*", 2)], {}, "row_dims: 2 is not in [-2, 2) of the units of '0.weight', whose shape"),
        ([("*", -3)], {}, "row_dims: -3 is not in [-2, 2)"),
        ([("x*", 1)], {}, "row_dims[0].tensors: 'x*' matches no tensor that the rule prunes"),
        ([("*", 1), ("*", 0)], {}, "row_dims[1].tensors: '*' is listed twice; list it once"),
        ([("*", 1)], {"scope": pb.SCOPE_GLOBAL}, "row_dims: needs SCOPE_PER_ROW; leave it out"),
        (
            [("*", 2)],
            {"granularity": pb.GRANULARITY_BLOCK, "block": pb.Block(shape=[2, 2], as_matrix=True)},
            "row_dims: 2 is not in [-2, 2) of the units of '0.weight', whose shape is [4, 6]",
        ),
    ],
    ids=str,
)
def test_wrong_dimensions_are_refused(
    client: secateur.Client, dims: list[tuple[str, int]], choices: dict[str, Any], message: str
) -> None:
    layers = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 8))
    with pytest.raises(secateur.InvalidSpec, match=re.escape(message)):
        client.prune(layers, spec_of(dims, **choices))


def test_the_first_name_or_glob_counts(client: secateur.Client) -> None:
    layers = nn.ModuleDict({name: nn.Linear(12, 8, bias=False) for name in "abc"})
    masks = client.prune(layers, spec_of([("a.*", 1), ("[ab].weight", 0)])).masks
    columns = {name: set((~torch.as_tensor(m)).sum(0).tolist()) for name, m in masks.items()}
    assert columns["a.weight"] == {4}
    for name in ("b.weight", "c.weight"):
        assert set((~torch.as_tensor(masks[name])).sum(1).tolist()) == {6}
    # Names that guard rails exclude may be there.
    rails = pb.GuardRails(exclude=["a.*"])
    assert "a.weight" not in client.prune(layers, spec_of([("a.*", 1)], guard_rails=rails)).masks


def test_select_takes_dimensions_of_rows(client: secateur.Client) -> None:
    weights = {name: torch.randn(6, 10) for name in "ab"}
    plain = {"method": "select", "tensors": "*", "amount": 2, "scope": "row", "row_dims": {"b": -1}}
    spec = secateur.select("*", 2, scope="row", row_dims={"b": -1})
    assert repr(Spec.from_dict({"rules": [plain]})) == repr(spec)
    masks = client.prune(weights, spec).masks
    assert (~masks["a"]).sum(1).tolist() == [2] * 6
    assert (~masks["b"]).sum(0).tolist() == [2] * 10
    message = "row_dims: 1 is not a mapping from names or globs to dimensions"
    with pytest.raises(secateur.InvalidSpec, match=message):
        secateur.select("*", 2, scope="row", row_dims=1)  # type: ignore[arg-type]
    with pytest.raises(secateur.InvalidSpec, match=r"row_dims: 0\.5 is not an int in"):
        secateur.select("*", 2, scope="row", row_dims={"b": 0.5})  # type: ignore[dict-item]


@pytest.mark.parametrize("method", [secateur.wanda, secateur.ria])
def test_a_transposed_layer_loses_what_its_linear_layer_loses(
    client: secateur.Client, method: Any
) -> None:
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    squares = np.arange(1.0, 25) ** 2
    statistics = Statistics(
        {
            "linear": LayerStatistics(4, squares),
            "conv1d": LayerStatistics(4, squares, input_dim=0),
        }
    )
    model = {"linear": weight, "conv1d": weight.T.contiguous()}
    spec = method("*", 0.4, statistics)
    assert len(spec.rules) == 1
    checkpoint = client.upload(model)
    masks, stored = client.prune(model, spec).masks, client.prune(checkpoint, spec).masks
    for found in (masks, stored):
        assert torch.equal(torch.as_tensor(found["conv1d"]).T, torch.as_tensor(found["linear"]))
    assert (~masks["linear"]).sum(1).tolist() == [10] * 16
    client.delete(checkpoint)
