"""Many small tensors are pruned and measured in batches, with the results of each by itself."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import secateur
from secateur_proto import report_pb2 as pb
from secateur_proto.report_pb2 import SparsityReport
from secateur_server.api.convert import columns
from secateur_server.api.convert.report import encode_report
from secateur_server.backends import batches, kernels
from secateur_server.backends.batches import SMALL
from secateur_server.backends.scan import Scan
from secateur_server.cut.choice import ChoiceTable
from secateur_server.cut.plan import plan
from secateur_server.cut.prune import prune
from secateur_server.errors import AmountOutOfRange, Cancelled, NanScores
from secateur_server.importance.random import Random
from secateur_server.report.tensors import measure_tensors
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.parameter import Parameter
from tests.conftest import examples
from tests.definition import amount_of, applied, catalog_of, rule
from tests.masks import packed, unpacked

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64)
SIZES = st.sampled_from([0, 1, 2, 7, 8, 9, 63, 64, 65, 1000, 5000])
AMOUNTS = st.sampled_from([0, 1, 0.0, 0.3, 0.5, 0.99, 1.0])


@pytest.fixture(params=[True, False], ids=["compiled", "torch"])
def is_compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param and not kernels.enabled:
        pytest.skip("NUMBA_DISABLE_JIT is set")
    monkeypatch.setattr(kernels, "enabled", request.param)


@pytest.fixture(autouse=True, scope="module")
def are_many() -> Iterator[None]:
    """A few tensors also form a batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "FEW", 0)
        yield


@st.composite
def models(draw: st.DrawFn) -> dict[str, Parameter]:
    """Draws tensors of several dtypes with many ties, some of them partly pruned."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    spread = draw(st.sampled_from([2, 5, 1000]))
    model = {}
    for index, size in enumerate(draw(st.lists(SIZES, min_size=1, max_size=12))):
        dtype = draw(st.sampled_from(DTYPES))
        whole = torch.randint(-spread, spread, (size,), generator=generator)
        weight = whole.to(torch.int8 if dtype == torch.int8 else dtype)
        kept = torch.rand(size, generator=generator) > draw(st.sampled_from([0.0, 0.3, 1.0]))
        is_pruned = draw(st.booleans())
        model[f"w{index}"] = Parameter(weight, packed(kept) if is_pruned else None)
    return model


def candidates_of(parameter: Parameter) -> Tensor:
    if parameter.mask is None:
        return torch.ones(parameter.weight.shape, dtype=torch.bool)
    return unpacked(parameter)


def lowest(weight: Tensor, kept: Tensor, amount: float) -> Tensor:
    """Returns the mask after the least important candidates are pruned."""
    candidates = kept.nonzero().view(-1)
    count = round(amount * len(candidates)) if isinstance(amount, float) else amount
    order = weight[candidates].to(torch.float64).abs().sort(stable=True).indices
    mask = kept.clone()
    mask[candidates[order[:count]]] = False
    return mask


@examples(40)
@given(models(), AMOUNTS)
def test_each_tensor_loses_its_least_important(model: dict[str, Parameter], amount: float) -> None:
    candidates = {name: candidates_of(parameter) for name, parameter in model.items()}
    if isinstance(amount, int):
        model = {n: p for n, p in model.items() if int(candidates[n].sum()) >= amount}
    assume(model)
    masks, choices = applied(model, rule(list(model), amount, scope="tensor"))
    assert isinstance(choices, ChoiceTable)
    for name, parameter in model.items():
        expected = lowest(parameter.weight, candidates[name], amount)
        assert torch.equal(masks[name], expected), name
        pruned = candidates[name] & ~expected
        (choice,) = (choice for choice in choices if choice.tensors == (name,))
        assert choice.candidates == int(candidates[name].sum())
        assert choice.pruned == int(pruned.sum())
        assert choice.requested == choice.pruned
        if not choice.pruned:
            assert (choice.threshold, choice.ties, choice.ties_pruned) == (None, 0, 0)
            continue
        magnitudes = parameter.weight.to(torch.float64).abs()
        assert choice.threshold == float(magnitudes[pruned].max())
        at_cut = torch.eq(magnitudes, choice.threshold)
        assert choice.ties == int(at_cut[candidates[name]].sum())
        assert choice.ties_pruned == int(at_cut[pruned].sum())


@pytest.mark.parametrize("size", [SMALL - 1, SMALL, SMALL + 1])
@pytest.mark.usefixtures("is_compiled")
def test_small_and_large_tensors_are_pruned_alike(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    weights = {f"w{i}": torch.randn(n, generator=generator) for i, n in enumerate((9, size, 64))}
    model = {name: Parameter(weight) for name, weight in weights.items()}
    masks, choices = applied(model, rule(list(model), 0.3, scope="tensor"))
    assert [choice.tensors for choice in choices] == [(name,) for name in model]
    for name, weight in weights.items():
        assert torch.equal(masks[name], by_torch(weight, 0.3)), name


def by_torch(weight: Tensor, amount: float) -> Tensor:
    module = nn.Module()
    module.register_parameter("weight", nn.Parameter(weight))
    torch_prune.l1_unstructured(module, "weight", amount)  # type: ignore[no-untyped-call]
    return module.get_buffer("weight_mask").bool()


HOWS = st.sampled_from(
    [
        {"scope": "tensor"},
        {"scope": "tensor", "importance": Random(3)},
        {"scope": "global"},
        {"scope": "global", "importance": Random(3)},
        {"scope": "global", "allocation": "lamp"},
        {"scope": "isomorphic", "of_all": True},
    ]
)


@examples(30)
@given(models(), st.sampled_from([0.0, 0.3, 0.7, 1.0]), HOWS)
def test_masks_depend_neither_on_the_batch_size_nor_on_numba(
    model: dict[str, Parameter], amount: float, how: dict[str, Any]
) -> None:
    selection = rule(list(model), amount, **how)
    expected = applied(model, selection)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "enabled", False)
        patch.setattr(batches, "MOST", 64)
        patch.setattr(batches, "CHECKED", 2)
        assert_same(expected, applied(model, selection))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secateur_server.state_dict.parameter.SMALL", 0)
        assert_same(expected, applied(model, selection))


def assert_same(
    one: tuple[Mapping[str, Tensor], Any], other: tuple[Mapping[str, Tensor], Any]
) -> None:
    assert one[1] == other[1]
    for name, mask in one[0].items():
        assert torch.equal(mask, other[0][name]), name


def test_the_first_nan_is_named() -> None:
    model = {f"w{i}": Parameter(torch.ones(3, 4)) for i in range(40)}
    for index in (7, 30):
        model[f"w{index}"].weight[1, 2] = torch.nan
    with pytest.raises(
        NanScores, match=r"data\['w7'\]: is NaN at \[1, 2\] and in 1 of 12 elements; replace NaN "
    ):
        applied(model, rule(list(model), 0.5, scope="tensor"))


def test_cancellation_ends_the_prune() -> None:
    context = RequestContext()
    context.cancel()
    model = {f"w{i}": Parameter(torch.ones(3, 4)) for i in range(40)}
    with pytest.raises(Cancelled):
        prune(context, model, [rule(list(model), 0.5, scope="tensor")], {})


def test_small_tensors_are_compared_by_scores(client: secateur.Client) -> None:
    model = {f"w{i}": torch.randn(4, 6) for i in range(30)}
    scores = {name: torch.randn(4, 6) for name in model}
    masks = client.prune(model, secateur.l1_unstructured("*", 7, importance_scores=scores)).masks
    for name in model:
        expected = lowest(scores[name].flatten(), torch.ones(24, dtype=torch.bool), 7)
        assert torch.equal(masks[name], expected.view(4, 6)), name


@st.composite
def shaped(draw: st.DrawFn) -> dict[str, Parameter]:
    """Draws tensors of up to four dimensions, with zeros, masks, or both."""
    model = {}
    for name, parameter in draw(models()).items():
        shape = draw(st.lists(st.integers(0, 9), max_size=4))
        count = math.prod(shape)
        weight = parameter.weight.repeat(count)[:count]
        kept = torch.rand(count) > 0.5 if draw(st.booleans()) and len(weight) == count else None
        if len(weight) == count:
            mask = None if kept is None else packed(kept)
            is_seen = draw(st.booleans()) and weight.dtype.is_floating_point
            scan = Scan(1, ((0, -(-count // 8) * 8),) if bool((weight == 0).any()) else (), None)
            model[name] = Parameter(weight.view(shape), mask, scan if is_seen else None)
    return model


@examples(60)
@given(shaped(), st.booleans())
def test_a_report_does_not_depend_on_the_batch_size(
    model: dict[str, Parameter], is_folded: bool
) -> None:
    def reported() -> SparsityReport:
        return encode_report(
            RequestContext(),
            measure_tensors(RequestContext(), model),
            catalog_of(model),
            "",
            are_folded=is_folded,
        )

    report = reported()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "FEW", 100)
        assert report == reported()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "MOST", 64)
        patch.setattr(kernels, "enabled", False)
        assert report == reported()


INTEGERS = st.one_of(st.integers(0, 300), st.integers(0, 2**64 - 1))
DOUBLES = st.floats(allow_nan=False) | st.sampled_from([0.0, -0.0])


@examples(100)
@given(
    st.lists(
        st.builds(
            pb.Choice,
            tensors=st.tuples(st.text(max_size=200)),
            candidates=INTEGERS,
            requested=INTEGERS,
            threshold=st.none() | DOUBLES,
        ),
        max_size=6,
    )
)
def test_encoded_columns_are_the_bytes_of_protobuf(choices: list[pb.Choice]) -> None:
    asked, candidates = (
        np.array([getattr(choice, field) for choice in choices], np.uint64)
        for field in ("requested", "candidates")
    )
    thresholds = np.array([choice.threshold for choice in choices], np.float64)
    encoded = columns.concatenated(
        columns.texts(1, [choice.tensors[0] for choice in choices]),
        columns.numbers(2, candidates),
        columns.numbers(3, asked),
        columns.doubles(5, thresholds, np.array([c.HasField("threshold") for c in choices], bool)),
    )
    expected = pb.RuleReport(choices=choices).SerializeToString(deterministic=True)
    assert columns.nested(1, encoded).data.tobytes() == expected
    shapes = pb.TensorReport(shape=[int(number) for number in asked], sparsity=1.0)
    packed_numbers = columns.packed(2, asked, np.array([len(asked)]))
    found = columns.concatenated(packed_numbers, columns.doubles(7, np.array([1.0])))
    assert found.data.tobytes() == shapes.SerializeToString()


@examples(60)
@given(
    models(),
    st.lists(st.floats(0, 1) | st.integers(0, 3), min_size=1, max_size=5),
    st.sampled_from([("tensor", "rank"), ("global", "rank"), ("global", "lamp")]),
    st.booleans(),
)
def test_a_plan_does_not_depend_on_the_batch_size(
    model: dict[str, Parameter], amounts: list[float], how: tuple[Any, Any], of_all: bool
) -> None:
    """The sums of squares have the same bits, too."""
    scope, allocation = how
    selection = rule(list(model), scope=scope, allocation=allocation, of_all=of_all)

    def planned() -> Any:
        try:
            outcomes = plan(
                RequestContext(),
                selection,
                [amount_of(amount) for amount in amounts],
                model,
                {},
                "amounts",
            )
        except AmountOutOfRange as error:
            return str(error)
        return [(list(outcome.choices), dict(outcome.removed)) for outcome in outcomes]

    found = planned()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "MOST", 64)
        patch.setattr("secateur_server.cut.runs._CELLS", 3)
        assert planned() == found
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secateur_server.state_dict.parameter.SMALL", 0)
        assert planned() == found
