"""secateur.sweep, compared with a loop by hand over torch.nn.utils.prune."""

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import grpc
import pytest
import torch
from torch import Tensor, nn

import secateur
from tests.client.test_apply_to import WEIGHTS, batch, net
from tests.conftest import RunningServer
from tests.reference import Step, all_l1, l1, ln

AMOUNTS = [0.25, 0.5, 40, 0.9]
STEPS: dict[str, tuple[Callable[[float], Step], list[float]]] = {
    "l1": (lambda amount: l1(WEIGHTS, amount), AMOUNTS),
    "global": (lambda amount: all_l1(WEIGHTS, amount), AMOUNTS),
    "slices": (lambda amount: ln(WEIGHTS, amount, 2, 0), [0.25, 2, 0.9]),
    "two rules": (lambda amount: l1(["fc.bias"], 3) + all_l1(WEIGHTS, amount), AMOUNTS),
}


def outcome(module: nn.Module) -> dict[str, float]:
    """Depends on every weight, and changes the running mean of the batch norm in training."""
    outputs = module(batch()).detach()
    return {"sum": float(outputs.double().sum()), "largest": float(outputs.max())}


def zeros(module: Any, names: list[str]) -> int:
    parts = [module.get_submodule(name.removesuffix(".weight")) for name in names]
    return sum(int((part.weight == 0).sum()) for part in parts)


def picture(module: nn.Module) -> list[Any]:
    """Everything that a module is: its objects, and the bits of its tensors and gradients."""
    found: list[Any] = []
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            found.append((path, name, id(value), value if isinstance(value, bool) else None))
            items = value.items() if isinstance(value, dict) else [(name, value)]
            found += [(path, name, key, id(item)) for key, item in items]
            tensors = [item for _, item in items if isinstance(item, Tensor)]
            for tensor in tensors:
                grad = tensor.grad if tensor.is_leaf else None
                for of in (tensor, grad):
                    if of is not None:
                        bits = of.detach().clone().contiguous().view(-1).view(torch.uint8)
                        found.append((of.dtype, of.data_ptr(), of.requires_grad, bits.tolist()))
        hooks = [
            vars(hook) for hook in part._forward_pre_hooks.values() if hasattr(hook, "__dict__")
        ]
        found.append(repr(hooks))
    return found


def prepared(kind: str) -> nn.Module:
    """A network in training, pruned or not, with gradients."""
    module = net()
    if "pruned" in kind:
        l1(["fc.weight", "fc.bias"], 0.3).on(module)
    if "twice" in kind:
        l1(["fc.weight"], 0.3).on(module)
    module(batch(3)).square().sum().backward()
    module.get_submodule("act").eval()
    return module


@pytest.mark.parametrize("kind", ["plain", "pruned", "pruned twice"])
@pytest.mark.parametrize("name", STEPS)
def test_it_measures_what_a_loop_by_hand_measures(
    client: secateur.Client, name: str, kind: str
) -> None:
    make, amounts = STEPS[name]
    module, seen = prepared(kind), []

    def evaluate(given: nn.Module) -> dict[str, float]:
        assert given is module
        seen.append(zeros(given, WEIGHTS))
        return outcome(given)

    before = picture(module)
    found = secateur.sweep(client, module, make(0.1).spec, amounts, evaluate)
    assert picture(module) == before
    assert [row.amount for row in found.rows] == [None, *amounts]
    for row, amount, count in zip(found.rows, [None, *amounts], seen, strict=True):
        theirs = prepared(kind)
        if amount is not None:
            make(amount).on(theirs)
        assert row.metrics == outcome(theirs)
        assert count == zeros(theirs, WEIGHTS)
        if name != "two rules":  # which names a bias too
            assert (row.zeros, row.total) == (count, 6 * 2 * 9 + 960)
        assert row.sparsity == row.zeros / row.total


def harm(module: nn.Module) -> None:
    """Changes all that an evaluation may."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for seed in range(2):
        module(batch(seed)).square().sum().backward()
        optimizer.step()
    module.eval().requires_grad_(False).zero_grad()
    module.register_forward_hook(lambda *_: None)
    module.get_submodule("fc").register_buffer("new", torch.ones(1))
    module.get_submodule("norm").extra = 3  # type: ignore[assignment]
    module.half()


@pytest.mark.parametrize("kind", ["plain", "pruned", "pruned twice"])
def test_the_module_is_as_it_was_whatever_evaluate_does(client: secateur.Client, kind: str) -> None:
    module, counts = prepared(kind), []

    def evaluate(given: nn.Module) -> float:
        harm(given)
        counts.append(zeros(given, WEIGHTS))
        return 0.0

    before = picture(module)
    rows = secateur.sweep(client, module, STEPS["l1"][0](0).spec, [0.5, 0.75], evaluate).rows
    assert picture(module) == before
    assert counts[1:] == [row.zeros for row in rows[1:]], "training kept the zeros"


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt()])
def test_an_error_of_evaluate_passes_through_and_leaves_nothing(
    client: secateur.Client, at: int, error: BaseException
) -> None:
    module, calls = prepared("pruned"), []

    def evaluate(given: nn.Module) -> float:
        harm(given)
        calls.append(given)
        if len(calls) > at:
            raise error
        return 0.0

    before, kept = picture(module), list(client.checkpoints())
    with pytest.raises(type(error)) as raised:
        secateur.sweep(client, module, STEPS["l1"][0](0).spec, AMOUNTS, evaluate)
    assert raised.value is error
    assert picture(module) == before
    assert list(client.checkpoints()) == kept


class Counting(grpc.StreamStreamClientInterceptor, grpc.StreamUnaryClientInterceptor):
    """Counts calls, and the bytes of their requests."""

    def __init__(self) -> None:
        self.calls, self.bytes = Counter[str](), Counter[str]()

    def _pass(self, call: Callable[..., Any], details: Any, requests: Any) -> Any:
        method = details.method.rpartition("/")[2]
        self.calls[method] += 1

        def counted() -> Iterator[Any]:
            for request in requests:
                self.bytes[method] += len(request.data)
                yield request

        return call(details, counted())

    of_any: Any = _pass
    intercept_stream_stream = intercept_stream_unary = of_any


def test_the_weights_are_sent_once(server: RunningServer) -> None:
    module, counting = nn.Linear(1000, 300), Counting()
    with grpc.insecure_channel(server.address) as channel:
        client = secateur.Client(channel=grpc.intercept_channel(channel, counting))
        kept = list(client.checkpoints())
        spec = secateur.l1_unstructured("weight", 0)
        steps: list[tuple[int, int]] = []
        secateur.sweep(
            *(client, module, spec, [n / 10 for n in range(10)], lambda _: 0.0),
            progress=lambda done, total: steps.append((done, total)),
        )
        assert list(client.checkpoints()) == kept
    assert counting.calls["Prune"] == 10
    assert counting.bytes["Upload"] > 4 * 300_000
    assert sum(counting.bytes.values()) < 4 * 300_000 + 20_000
    assert steps == [(done, 11) for done in range(1, 12)]


def returned(value: Any, module: nn.Module) -> Any:
    return value


def test_a_metric_alone_and_numbers_of_all_kinds(client: secateur.Client) -> None:
    module = nn.Linear(4, 2)
    spec = secateur.l1_unstructured("weight", 0)
    for value in (3, 3.0, torch.tensor(3.0), torch.ones(1, 1, requires_grad=True) * 3):
        rows = secateur.sweep(client, module, spec, [0.5], partial(returned, value)).rows
        assert [row.metrics for row in rows] == [{"metric": 3.0}] * 2
        assert type(rows[0].metrics["metric"]) is float


def test_amounts_are_those_of_the_last_rule_that_has_one(client: secateur.Client) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 8))
    statistics = secateur.calibrate(module, [torch.randn(64, 16)], gram=True)
    rule = secateur.l1_unstructured("*.weight", 0.1)
    found: list[Tensor] = []

    def evaluate(given: Any) -> float:
        computed = given(torch.eye(16)) - given[0].bias
        found.append(given[0].weight.detach().clone())
        assert torch.allclose(computed.T, found[-1], atol=1e-6)
        return 0.0

    for spec in (
        rule + secateur.refit("*", statistics),
        secateur.sparsegpt("0.weight", 0.1, statistics),
    ):
        before = picture(module)
        rows = secateur.sweep(client, module, spec, [0.5, 0.75], evaluate).rows
        assert picture(module) == before
        assert [row.sparsity for row in rows] == [0, 0.5, 0.75]
        for amount, weight in zip([0.5, 0.75], found[-2:], strict=True):
            if spec.solvers == ("refit",):
                by_hand = secateur.l1_unstructured("*.weight", amount)
                by_hand += secateur.refit("*", statistics)
            else:
                by_hand = secateur.sparsegpt("0.weight", amount, statistics)
            expected = client.prune(module, by_hand, "dense").state_dict()["0.weight"]
            assert torch.equal(weight, expected)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.other(self.one(x).relu())
        return outputs


def compiled(module: nn.Module) -> Any:
    """The module may run compiled, but is not compiled again for each amount."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        assert len(graphs) == 1
        return graph.forward

    made: Any = torch.compile(module, backend=backend)
    made(torch.ones(3, 8))
    return made


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, compiled])
def test_tied_and_wrapped_modules(
    client: secateur.Client, wrap: Callable[[nn.Module], Any]
) -> None:
    torch.manual_seed(0)
    plain = Tied()
    module, x = wrap(plain), torch.randn(3, 8)
    spec = secateur.l1_unstructured("one.weight", 0.5)
    before = picture(module)
    rows = secateur.sweep(client, module, spec, [0.5], lambda given: given(x).sum()).rows
    assert picture(module) == before
    theirs = copy.deepcopy(plain)
    mask = client.prune(plain, spec).masks["one.weight"]
    with torch.no_grad():
        theirs.one.weight *= mask
    assert [row.metrics["metric"] for row in rows] == [m(x).sum().item() for m in (plain, theirs)]


def test_of_a_module_the_parameters_are_pruned(client: secateur.Client) -> None:
    module = nn.BatchNorm1d(4)
    rows = secateur.sweep(client, module, secateur.l1_unstructured("*", 0), [0.5], lambda _: 0).rows
    assert [row.total for row in rows] == [8, 8]  # without running_mean


def test_groups_whose_buffers_are_cut_too(client: secateur.Client) -> None:
    module = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 3))
    groups = secateur.groups(module, torch.ones(1, 2, 6, 6))
    spec = secateur.grouped(groups, 0.1)
    rows = secateur.sweep(client, module, spec, [2], lambda m: float((m[0].weight == 0).sum())).rows
    assert [row.metrics["metric"] for row in rows] == [0, 2 * 18]


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (None, "evaluate: returned None as 'metric'; return a number"),
        ("0.5", "evaluate: returned '0.5' as 'metric'"),
        ({}, "evaluate: returned no metric"),
        ({"a": [1, 2]}, r"evaluate: returned \[1, 2\] as 'a'"),
        ({3: 1.0}, "evaluate: returned 3 as the name of a metric"),
        (
            {"sparsity": 1.0},
            "evaluate: returned 'sparsity' as the name .*: amount, ",
        ),
    ],
)
def test_what_evaluate_must_not_return(client: secateur.Client, returned: Any, said: str) -> None:
    spec = secateur.l1_unstructured("weight", 0)
    with pytest.raises(secateur.SecateurError, match=f"^{said}"):
        secateur.sweep(client, nn.Linear(2, 2), spec, [0.5], lambda _: returned)


def test_every_call_returns_the_same_metrics(client: secateur.Client) -> None:
    found = iter([{"a": 1.0}, {"b": 1.0}])
    spec = secateur.l1_unstructured("weight", 0)
    with pytest.raises(secateur.SecateurError, match=r"\['a'\], and later \['b'\]; return the sam"):
        secateur.sweep(client, nn.Linear(2, 2), spec, [0.5], lambda _: next(found))


def test_amounts_are_checked_before_anything_is_evaluated(client: secateur.Client) -> None:
    def evaluate(module: nn.Module) -> float:
        raise AssertionError("it is called")

    module, spec = nn.Linear(2, 2), secateur.l1_unstructured("weight", 0)
    masks = secateur.custom_from_mask({"weight": torch.ones(2, 2)})
    for wrong, amounts, said in (
        (spec, [0.5, 1.5], r"^amounts\[1\]: 1\.5 "),
        (spec, [], "^amounts: at least one"),
        (spec, [1, 5], "5"),
        (masks, [0.5], "^spec: no rule has an amount"),
        (secateur.l1_unstructured("none", 0), [0.5], "none"),
    ):
        with pytest.raises(secateur.InvalidSpec, match=said):
            secateur.sweep(client, module, wrong, amounts, evaluate)


@pytest.fixture(scope="module")
def swept(client: secateur.Client) -> secateur.Sweep:
    values = iter([0.5, 0.25, 0.125] * 2)

    def evaluate(module: nn.Module) -> dict[str, float]:
        return {"a$c$": next(values), "loss <b>": next(values)}

    spec = secateur.l1_unstructured("weight", 0)
    return secateur.sweep(client, nn.Linear(4, 2), spec, [0.25, 0.5], evaluate)


def test_it_is_shown_as_a_table_with_the_sensitivity(swept: secateur.Sweep) -> None:
    head, *rows = [line.split("  ") for line in str(swept).splitlines()[:4]]
    assert [cell for cell in head if cell] == ["amount", "zeros", "sparsity", " a$c$", "loss <b>"]
    cells = [cell.strip() for cell in rows[1] if cell.strip()]
    assert cells == ["0.25", "2", "25.00%", "0.125", "0.5"]
    assert rows[0][0] == "unpruned"
    assert str(swept.sensitivity) in str(swept)
    assert list(swept.sensitivity.norm_removed) == ["weight"]
    shown = swept._repr_html_()
    assert shown.count("<table") == 2
    assert "loss &lt;b&gt;" in shown
    assert json.loads(json.dumps(swept.to_dict()))["rows"][1]["amount"] == 0.25


def test_it_is_a_frame_and_a_plot(swept: secateur.Sweep) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    frame = swept.to_frame()
    assert list(frame.columns) == ["amount", "zeros", "total", "sparsity", "a$c$", "loss <b>"]
    assert frame.amount.isna().tolist() == [True, False, False]
    assert [str(dtype) for dtype in frame.dtypes] == ["float64", "int64", "int64"] + ["float64"] * 3
    assert list(frame.sparsity) == [0, 0.25, 0.5]
    ax: Any = swept.plot()
    assert [list(line.get_xdata()) for line in ax.lines] == [[0, 0.25, 0.5]] * 2
    assert list(ax.lines[0].get_ydata()) == list(frame["a$c$"])
    assert len({line.get_marker() for line in ax.lines}) == 2
    beside = ax.figure.axes[1]
    assert len(beside.images) == 1
    ax.figure.canvas.draw()
    _, own = pyplot.subplots()
    assert swept.plot(own) is own
    assert len(own.figure.axes) == 1
    pyplot.close("all")
