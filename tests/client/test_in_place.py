"""Modules that are changed in place: finalized ones, and those where torch fails."""

from collections.abc import Callable
from typing import Any

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
from tests.reference import Step, all_l1, assert_same_tensors, l1, place, prune

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


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
