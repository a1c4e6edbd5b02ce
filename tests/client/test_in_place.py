"""Modules that are changed in place: wrapped ones, finalized ones, and those where torch fails."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import secateur
from tests.client.test_apply_to import (
    STEPS,
    WEIGHTS,
    assert_refused,
    assert_same_modules,
    batch,
    every_step,
    hooks,
    net,
    snapshot,
)
from tests.reference import Step, all_l1, assert_same_tensors, distinct, l1, place, prune

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


# Wrapped modules ----------------------------------------------------------------------------------


def compiled(module: nn.Module) -> nn.Module:
    wrapped: nn.Module = torch.compile(module)  # type: ignore[assignment]
    return wrapped


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda module: module,
    "compiled": compiled,
    "parallel": nn.DataParallel,
    "both": lambda module: nn.DataParallel(compiled(module)),
    "the other way": lambda module: compiled(nn.DataParallel(module)),
}


@pytest.mark.parametrize("target", WRAPPERS)
@pytest.mark.parametrize("source", WRAPPERS)
def test_prefixes_of_wrappers_do_not_matter(
    client: secateur.Client, source: str, target: str
) -> None:
    wrapped = WRAPPERS[source](net())
    result = client.prune(
        wrapped, secateur.global_unstructured(["*conv.weight", "*fc.weight"], 0.5)
    )
    ours, theirs = net(), net()
    result.apply_to(WRAPPERS[target](ours))
    all_l1(WEIGHTS, 0.5).on(theirs)
    assert_same_modules(ours, theirs)
    client.finalize(WRAPPERS[source](ours)).apply_to(WRAPPERS[target](ours))
    assert not prune.is_pruned(ours)


# Each names tensors in one of the fields of a rule; `net` has the layers conv, norm and fc.
STATISTICS = secateur.calibrate(net(), [batch()], gram=True)
SCORES = {"fc.weight": distinct((10, 96), seed=3)}
SPECS: dict[str, secateur.Spec] = {
    "names": secateur.l1_unstructured(["conv.weight", "fc.bias"], 0.5),
    "globs": secateur.global_unstructured(["co*.weight", "fc.*"], 0.5),
    "scores": secateur.l1_unstructured("fc.weight", 0.5, importance_scores=SCORES),
    "masks": secateur.custom_from_mask({"fc.weight": distinct((10, 96)) > 0}),
    "table": secateur.select("*.weight", secateur.table({"conv.*": 0.2, "fc.weight": 0.7})),
    "scales": secateur.select(
        "conv.weight", 2, granularity="filters", scales={"conv.weight": "norm.weight"}
    ),
    "rails": secateur.select(
        "*.weight",
        0.5,
        scope="global",
        guard_rails=secateur.guard_rails(
            exclude="norm.weight", per_tensor={"conv.weight": secateur.rail(max_sparsity=0.1)}
        ),
    ),
    "groups": secateur.grouped(
        [secateur.group("conv", secateur.member("conv.weight"), secateur.member("conv.bias"))], 2
    ),
    "statistics": secateur.wanda("fc.weight", 0.5, STATISTICS),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_spec_names_tensors_without_the_prefixes_of_wrappers(
    client: secateur.Client, wrapper: str, spec: secateur.Spec
) -> None:
    ours, theirs = net(), net()
    client.prune(WRAPPERS[wrapper](ours), spec).apply_to(ours)
    client.prune(theirs, spec).apply_to(theirs)
    assert prune.is_pruned(ours)
    assert_same_modules(ours, theirs)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_measures_name_tensors_without_the_prefixes_of_wrappers(
    client: secateur.Client, wrapper: str
) -> None:
    wrapped = WRAPPERS[wrapper](net())
    named = [name for name, _ in wrapped.named_parameters() if "fc." in name]
    assert list(client.report(wrapped, "fc.*").tensors) == named
    assert list(client.sensitivity(wrapped, "fc.*").norm_removed) == named
    l1(["fc.weight", "conv.weight"], 0.5).on(
        wrapped.get_submodule(named[0].rpartition("fc.")[0].rstrip("."))
    )
    client.finalize(wrapped, "fc.weight").apply_to(wrapped)
    assert [path for path, part in wrapped.named_modules() if hooks(part)] == [
        named[0].replace("fc.weight", "conv")
    ]


class Mixed(nn.Module):
    """Wrappers around parts, and around those that are wrapped already."""

    def __init__(self, wrap: bool) -> None:
        super().__init__()
        one, two = net(), net()
        self.one = nn.DataParallel(compiled(one)) if wrap else one
        self.two = compiled(nn.DataParallel(two)) if wrap else two


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_nested_wrappers_do_not_matter(client: secateur.Client, is_wrapped: bool) -> None:
    ours, theirs = Mixed(is_wrapped), Mixed(not is_wrapped)
    spec = secateur.global_unstructured(["one.fc.weight", "two.conv.*"], 0.5)
    result = client.prune(ours, spec)
    result.apply_to(theirs)
    pruned = {name.removesuffix("_mask") for name, _ in theirs.named_buffers() if "mask" in name}
    assert len(pruned) == 3
    assert client.report(theirs, ["one.fc.weight", "two.conv.*"]).sparsity == pytest.approx(
        result.report.sparsity
    )


def test_a_state_dict_of_a_wrapped_model_is_pruned_by_plain_names_and_the_reverse(
    client: secateur.Client,
) -> None:
    plain, wrapped = net(), compiled(nn.DataParallel(net()))
    spec = secateur.l1_unstructured("fc.weight", 0.5)
    masks = client.prune(wrapped.state_dict(), spec).masks
    assert list(masks) == ["_orig_mod.module.fc.weight"]
    result = client.prune(plain.state_dict(), secateur.custom_from_mask(masks))
    assert torch.equal(result.masks["fc.weight"], masks["_orig_mod.module.fc.weight"])


def test_a_compiled_part_does_not_matter(client: secateur.Client) -> None:
    ours, theirs = net(), net()
    result = client.prune(theirs, STEPS["global"].spec)
    ours.fc = compiled(ours.get_submodule("fc"))
    result.apply_to(ours)
    assert torch.equal(ours.get_buffer("fc._orig_mod.weight_mask") != 0, result.masks["fc.weight"])


class Nested(nn.Module):
    """Its own layer is called `module`, and has a layer of the same name and shape as another."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.module = nn.Sequential()
        self.module.add_module("fc", nn.Linear(4, 3))


@pytest.mark.parametrize("target", WRAPPERS)
@pytest.mark.parametrize("source", WRAPPERS)
@pytest.mark.parametrize("pruned", ["fc.weight", "module.fc.weight"])
def test_a_layer_called_module_is_not_taken_for_a_wrapper(
    client: secateur.Client, source: str, target: str, pruned: str
) -> None:
    module = Nested()
    wrapped = WRAPPERS[source](module)
    (name,) = (n for n, p in wrapped.named_parameters() if p is module.get_parameter(pruned))
    result = client.prune(wrapped, secateur.l1_unstructured(name, 0.5))
    result.apply_to(WRAPPERS[target](module))
    path, _, leaf = pruned.rpartition(".")
    assert hooks(module.get_submodule(path)) == [(leaf, False)]
    (mask,) = result.masks.values()
    assert torch.equal(module.get_buffer(f"{pruned}_mask") != 0, mask)
    assert sum(len(hooks(part)) for part in module.modules()) == 1


def test_a_name_that_could_be_two_is_refused(client: secateur.Client) -> None:
    """Neither name is in the module, and both would be found by leaving out prefixes."""
    model = {"module.fc.weight": np.ones((3, 4)), "_orig_mod.fc.weight": np.ones((3, 4))}
    result = client.prune(model, secateur.l1_unstructured("module.*", 0.5))
    module = nn.Sequential()
    module.add_module("fc", nn.Linear(4, 3))
    with pytest.raises(secateur.InvalidStateDict, match=r"module\.fc\.weight: .* no such param"):
        result.apply_to(module)
    assert not prune.is_pruned(module)


# Modules that cannot be pruned in place ---------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.jit.script(nn.Sequential(nn.Linear(2, 2))), "the module is a ScriptModule"),
        (lambda: nn.Sequential(torch.jit.script(nn.Linear(2, 2))), "0 is a ScriptModule"),
        (lambda: None, "not NoneType"),
        (lambda: {"0.weight": torch.ones(2, 2)}, "not dict"),
        (lambda: nn.Linear, "not type"),
    ],
)
def test_script_modules_are_refused(
    client: secateur.Client, make: Callable[[], Any], message: str
) -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    results = [client.prune(module, secateur.l1_unstructured("0.weight", 1))]
    results[0].apply_to(module)
    finalized = client.finalize(module)
    for apply in (results[0].apply_to, finalized.apply_to):
        with pytest.raises(secateur.InvalidStateDict, match=message):
            apply(make())


class Stubborn(nn.Linear):
    """torch fails to prune it, after other layers were."""

    def register_buffer(self, name: str, *arguments: Any, **options: Any) -> None:
        if name.endswith("_mask"):
            raise RuntimeError("no masks here")
        super().register_buffer(name, *arguments, **options)


@pytest.mark.parametrize("before", [None, "l1"])
def test_a_failure_at_a_later_tensor_changes_nothing(
    client: secateur.Client, before: str | None
) -> None:
    lstm = nn.LSTM(3, 4)
    module = nn.ModuleDict({"lstm": lstm, "fc": nn.Linear(4, 4)})
    if before:
        l1(["lstm.weight_ih_l0", "fc.weight"], 0.3).on(module)
        l1(["fc.weight"], 0.3).on(module)  # a container
    module["last"] = Stubborn(4, 4)
    names = ["lstm.weight_ih_l0", "lstm.weight_hh_l0", "fc.weight", "last.weight"]
    result = client.prune(module, secateur.l1_unstructured(names, 0.9))
    computed, flat = lstm(torch.ones(2, 3))[0], list(lstm._flat_weights)
    assert_refused(module, result, r"last\.weight: torch cannot prune it: no masks here")
    assert all(one is other for one, other in zip(lstm._flat_weights, flat, strict=True))
    assert torch.equal(lstm(torch.ones(2, 3))[0], computed)
    del module["last"]  # without an error
    client.prune(module, secateur.l1_unstructured(names[:-1], 0.9)).apply_to(module)


# Finalized in place -------------------------------------------------------------------------------


def removed(module: nn.Module) -> nn.Module:
    """As torch.nn.utils.prune.remove leaves it."""
    for part in list(module.modules()):
        for name, _ in hooks(part):
            prune.remove(part, name)
    return module


@every_step
def test_a_module_is_finalized_as_torch_removes(client: secateur.Client, step: Step) -> None:
    ours, theirs = net(), net()
    for module in (ours, theirs):
        step.on(module)
    parameters = dict(ours.named_parameters())
    final = client.finalize(ours)
    final.apply_to(ours)
    assert_same_modules(ours, removed(theirs))
    for name, parameter in ours.named_parameters():
        assert parameter is parameters.get(name, parameters.get(f"{name}_orig"))
    assert torch.equal(ours(batch()), theirs(batch()))
    weight = ours.get_parameter("fc.weight")
    kept = final.state_dict()["fc.weight"].clone()
    with torch.no_grad():
        weight.add_(1)  # training it does not reach into the result
    assert torch.equal(final.state_dict()["fc.weight"], kept)


def test_a_module_that_we_pruned_trains_and_keeps_its_zeros(client: secateur.Client) -> None:
    module = net()
    client.prune(module, STEPS["global"].spec).apply_to(module)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    for seed in range(2):
        optimizer.zero_grad()
        module(batch(seed)).square().sum().backward()
        optimizer.step()
    client.finalize(module).apply_to(module)
    assert not prune.is_pruned(module)
    report = client.report(module, WEIGHTS)
    assert report.zeros == round(report.total / 2)


def test_only_finalized_parameters_change(client: secateur.Client) -> None:
    ours, theirs = net(), net()
    for module in (ours, theirs):
        all_l1(WEIGHTS, 0.5).on(module)
    client.finalize(ours, tensors="fc.*").apply_to(ours)
    prune.remove(*place(theirs, "fc.weight"))
    assert_same_modules(ours, theirs)


def test_a_pruned_infinity_is_zero_as_in_the_result(client: secateur.Client) -> None:
    module = nn.Linear(2, 2)
    with torch.no_grad():
        module.weight[0, 0] = float("inf")
    mask = torch.tensor([[0.0, 1], [1, 1]])
    prune.custom_from_mask(module, "weight", mask)
    final = client.finalize(module)
    final.apply_to(module)
    assert_same_tensors(module.state_dict(), final.state_dict())
    assert module.weight[0, 0] == 0


def test_tied_and_shared_parameters_are_finalized_once(client: secateur.Client) -> None:
    shared = nn.Linear(4, 4)
    ours = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(4, 4, bias=False)})
    ours["c"].weight = shared.weight
    spec = secateur.l1_unstructured("a.weight", 0.5)
    client.prune(ours, spec).apply_to(ours)
    client.finalize(ours).apply_to(ours)
    assert not prune.is_pruned(ours)
    assert ours["a"].weight is ours["c"].weight
    assert int((ours["c"].weight == 0).sum()) == 8


def assert_unchanged(module: nn.Module, final: secateur.FinalizeResult, message: str) -> None:
    state, *rest = snapshot(module)
    with pytest.raises(secateur.InvalidStateDict, match=message):
        final.apply_to(module)
    after, *rest_after = snapshot(module)
    assert_same_tensors(after, state)
    assert rest_after == rest


def trained(module: nn.Module) -> None:
    with torch.no_grad():
        module.get_parameter("fc.weight_orig")[0] += 1


def pruned_further(module: nn.Module) -> None:
    l1(["fc.weight"], 0.3).on(module)


def converted(module: nn.Module) -> None:
    module.double()


def other_layer(module: nn.Module) -> None:
    prune.remove(*place(module, "fc.weight"))


def more_pruned(module: nn.Module) -> None:
    part = nn.Linear(2, 2)
    prune.identity(part, "weight")
    module.add_module("more", part)


def not_pruned(module: nn.Module) -> None:
    removed(module)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (trained, r"fc\.weight: the module changed since"),
        (pruned_further, r"fc\.weight: the module changed since"),
        (converted, r"\.weight: the module changed since"),
        (other_layer, r"fc\.weight: is not pruned in the module"),
        (not_pruned, r"weight: is not pruned in the module"),
        (more_pruned, r"more\.weight: the result has no such tensor"),
    ],
)
def test_a_module_that_changed_since_is_refused_and_unchanged(
    client: secateur.Client, change: Callable[[nn.Module], None], message: str
) -> None:
    module = net()
    all_l1(WEIGHTS, 0.5).on(module)
    final = client.finalize(module)
    change(module)
    assert_unchanged(module, final, message)


def test_a_failure_to_finalize_a_later_tensor_changes_nothing(
    client: secateur.Client,
) -> None:
    class Kept(nn.Linear):
        def __delattr__(self, name: str) -> None:
            if name == "weight":
                raise RuntimeError("not deleted")
            super().__delattr__(name)

    module = nn.Sequential(nn.Linear(4, 4), Kept(4, 4))
    for part in module:
        prune.l1_unstructured(part, "weight", 0.5)
    final = client.finalize(module)
    assert_unchanged(module, final, r"1\.weight: torch cannot finalize it: not deleted")
    assert torch.equal(module(torch.ones(1, 4)), module(torch.ones(1, 4)))
