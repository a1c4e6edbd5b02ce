"""Modules in wrappers of torch.compile and DataParallel: names with and without their prefixes."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import secateur
from tests.client.test_apply_to import STEPS, WEIGHTS, assert_same_modules, batch, hooks, net
from tests.reference import all_l1, distinct, l1, prune

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


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
