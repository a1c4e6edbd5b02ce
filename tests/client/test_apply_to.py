"""result.apply_to(module): the module is left as torch.nn.utils.prune leaves it."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import secateur
from tests.reference import (
    Step,
    all_l1,
    assert_same_tensors,
    custom,
    distinct,
    identity,
    l1,
    ln,
    lowest,
    module_of,
    place,
    prune,
    same_bits,
)

WEIGHTS = ["conv.weight", "fc.weight"]
STEPS: dict[str, Step] = {
    "identity": identity(WEIGHTS),
    "l1": l1([*WEIGHTS, "fc.bias"], 0.3),
    "slices": ln(WEIGHTS, 2, 2, 0),
    "global": all_l1(WEIGHTS, 0.5),
    "custom": custom({"fc.weight": distinct((10, 96)) > 0}),
    "one layer": l1(["conv.weight"], 0.5),
}
every_step = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)


def net() -> nn.Module:
    """A small network that is the same each time."""
    layers = OrderedDict(
        conv=nn.Conv2d(2, 6, 3),
        norm=nn.BatchNorm2d(6),
        act=nn.ReLU(),
        flat=nn.Flatten(),
        fc=nn.Linear(6 * 4 * 4, 10),
    )
    module = nn.Sequential(layers)
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(distinct(parameter.shape, seed=seed))
    return module


def batch(seed: int = 0) -> Tensor:
    return torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


def twins(client: secateur.Client, *steps: Step) -> tuple[nn.Module, nn.Module]:
    """A network that we pruned, and one that torch did."""
    ours, theirs = net(), net()
    for step in steps:
        client.prune(ours, step.spec).apply_to(ours)
        step.on(theirs)
    return ours, theirs


def hooks(part: nn.Module) -> list[tuple[str, bool]]:
    """The pruning hooks: what each prunes, and whether it is a container."""
    return sorted(
        (hook._tensor_name, isinstance(hook, prune.PruningContainer))
        for hook in part._forward_pre_hooks.values()
        if isinstance(hook, prune.BasePruningMethod)
    )


def assert_same_modules(ours: nn.Module, theirs: nn.Module) -> None:
    """But for the order of the names in it, which is that of torch's calls."""
    assert_same_tensors(ours.state_dict(), theirs.state_dict())
    for (path, one), (_, other) in zip(ours.named_modules(), theirs.named_modules(), strict=True):
        assert one._parameters.keys() == other._parameters.keys(), path
        assert one._buffers.keys() == other._buffers.keys(), path
        assert one._non_persistent_buffers_set == other._non_persistent_buffers_set, path
        assert hooks(one) == hooks(other), path
        for name, _ in hooks(one):
            weight, twin = getattr(one, name), getattr(other, name)
            assert same_bits(weight.detach(), twin.detach()), path
            assert weight.requires_grad == twin.requires_grad, path
            assert not isinstance(weight, nn.Parameter), path


@every_step
def test_the_module_is_as_torch_leaves_it(client: secateur.Client, step: Step) -> None:
    ours, theirs = twins(client, step)
    assert_same_modules(ours, theirs)
    assert prune.is_pruned(ours)


@pytest.mark.parametrize("second", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("first", [STEPS["l1"], STEPS["slices"]], ids=["l1", "slices"])
def test_a_module_is_pruned_again(client: secateur.Client, first: Step, second: Step) -> None:
    assert_same_modules(*twins(client, first, second))


@every_step
def test_a_module_that_torch_pruned_is_pruned_again(client: secateur.Client, step: Step) -> None:
    ours, theirs = net(), net()
    for module in (ours, theirs):
        STEPS["l1"].on(module)
    client.prune(ours, step.spec).apply_to(ours)
    step.on(theirs)
    assert_same_modules(ours, theirs)


@pytest.mark.parametrize("training", [True, False])
@every_step
def test_it_computes_what_the_twin_computes(
    client: secateur.Client, step: Step, training: bool
) -> None:
    ours, theirs = twins(client, step)
    for module in (ours, theirs):
        module.train(training)
    assert torch.equal(ours(batch()), theirs(batch()))


def test_it_learns_as_the_twin_does(client: secateur.Client) -> None:
    outputs = []
    for module in twins(client, STEPS["global"]):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for seed in range(3):
            optimizer.zero_grad()
            module(batch(seed)).square().sum().backward()
            optimizer.step()
        outputs.append(module(batch()))
        grad = module.get_parameter("fc.weight_orig").grad
        assert grad is not None
        assert not bool(grad[module.get_buffer("fc.weight_mask") == 0].any())
    assert torch.equal(*outputs)


@every_step
def test_torch_removes_the_pruning(client: secateur.Client, step: Step) -> None:
    ours, theirs = twins(client, step)
    for module in (ours, theirs):
        for path, part in list(module.named_modules()):
            for name, _ in hooks(part):
                assert prune.remove(*place(module, f"{path}.{name}")) is part
        assert not prune.is_pruned(module)
    assert_same_modules(ours, theirs)
    assert torch.equal(ours(batch()), theirs(batch()))


def test_torch_prunes_it_further(client: secateur.Client) -> None:
    ours, theirs = twins(client, STEPS["l1"])
    for module in (ours, theirs):
        l1(WEIGHTS, 0.3).on(module)
        all_l1(["conv.weight"], 0.3).on(module)
    assert_same_modules(ours, theirs)


def test_parameters_and_their_values_are_kept(client: secateur.Client) -> None:
    module = net()
    before = dict(module.named_parameters())
    values = {name: parameter.detach().clone() for name, parameter in before.items()}
    module.get_parameter("conv.weight").requires_grad_(False)
    client.prune(module, STEPS["l1"].spec).apply_to(module)
    pruned = ["conv.weight", "fc.weight", "fc.bias"]
    for name, parameter in before.items():
        now = module.get_parameter(f"{name}_orig" if name in pruned else name)
        assert now is parameter  # optimizers refer to it
        assert same_bits(now.detach(), values[name])
        assert now.requires_grad == (name != "conv.weight")


def test_prune_does_not_change_the_source(client: secateur.Client) -> None:
    module = net()
    client.prune(module, STEPS["global"].spec).state_dict("dense")
    assert_same_modules(module, net())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_masks_have_the_weights_dtype(client: secateur.Client, dtype: torch.dtype) -> None:
    ours, theirs = net().to(dtype), net().to(dtype)
    step = custom({"fc.weight": distinct((10, 96)) > 0})
    client.prune(ours, step.spec).apply_to(ours)
    step.on(theirs)
    assert_same_modules(ours, theirs)
    assert ours.get_buffer("fc.weight_mask").dtype == dtype


def as_arrays(module: nn.Module, _: Path) -> Any:
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def as_file(module: nn.Module, folder: Path) -> Any:
    save_file(module.state_dict(), folder / "net.safetensors")
    return folder / "net.safetensors"


@pytest.mark.parametrize("source", [as_arrays, as_file])
@every_step
def test_a_result_of_any_source_can_be_applied(
    client: secateur.Client, tmp_path: Path, source: Callable[..., Any], step: Step
) -> None:
    ours, theirs = net(), net()
    client.prune(source(ours, tmp_path), step.spec).apply_to(ours)
    step.on(theirs)
    assert_same_modules(ours, theirs)


def test_a_reparametrized_result_can_be_applied(client: secateur.Client) -> None:
    ours, theirs = net(), net()
    client.prune(ours, STEPS["global"].spec, output="reparametrized").apply_to(ours)
    STEPS["global"].on(theirs)
    assert_same_modules(ours, theirs)


def test_other_hooks_are_kept(client: secateur.Client) -> None:
    module, seen = net(), []
    module.get_submodule("fc").register_forward_pre_hook(lambda part, _: seen.append(part))
    client.prune(module, STEPS["global"].spec).apply_to(module)
    module(batch())
    assert seen == [module.get_submodule("fc")]


def test_recurrent_layers_compute_what_the_twin_computes(client: secateur.Client) -> None:
    ours, theirs = nn.LSTM(3, 4), nn.LSTM(3, 4)
    theirs.load_state_dict(ours.state_dict())
    step = all_l1(["weight_ih_l0", "weight_hh_l0"], 0.5)
    client.prune(ours, step.spec).apply_to(ours)
    step.on(theirs)
    assert_same_modules(ours, theirs)
    assert torch.equal(ours(torch.ones(2, 1, 3))[0], theirs(torch.ones(2, 1, 3))[0])


def test_a_parameter_with_two_names_gets_one_mask_under_both(client: secateur.Client) -> None:
    weight = distinct((4, 6))
    module = module_of({"a.w": weight, "b.w": weight})
    module.get_submodule("b").register_parameter("w", module.get_parameter("a.w"))
    client.prune(module, all_l1(["a.w", "b.w"], 11).spec).apply_to(module)
    assert module.get_parameter("a.w_orig") is module.get_parameter("b.w_orig")
    (kept,) = lowest([weight], 11)
    for name in ("a", "b"):
        assert torch.equal(module.get_buffer(f"{name}.w_mask") == 1, kept)


def test_two_masks_for_one_parameter_are_refused(client: secateur.Client) -> None:
    tensors = {"a.w": distinct((4, 6)), "b.w": distinct((4, 6), seed=1)}
    module = module_of(tensors)
    module.get_submodule("b").register_parameter("w", module.get_parameter("a.w"))
    result = client.prune(tensors, secateur.l1_unstructured(["a.w", "b.w"], 7))
    assert_refused(module, result, r"a\.w and b\.w are one parameter")


def test_a_module_with_two_names_has_the_masks_of_the_result(client: secateur.Client) -> None:
    shared = module_of({"w": distinct((4, 6))})
    module = nn.ModuleDict({"a": shared, "b": shared})
    result = client.prune(module, secateur.l1_unstructured(["a.w", "b.w"], 7))
    result.apply_to(module)
    for name, mask in result.masks.items():
        assert torch.equal(module.get_buffer(f"{name}_mask") == 1, mask)


def snapshot(module: nn.Module) -> tuple[Any, ...]:
    """All that pruning changes in a module."""
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    parts = list(module.modules())
    names = [(list(p._parameters), list(p._buffers), list(p._forward_pre_hooks)) for p in parts]
    return state, names, [hooks(part) for part in parts]


def assert_refused(module: nn.Module, result: secateur.PruneResult, message: str) -> None:
    """The result does not fit, and nothing of it is applied."""
    state, *rest = snapshot(module)
    with pytest.raises(secateur.InvalidStateDict, match=message):
        result.apply_to(module)
    after, *rest_after = snapshot(module)
    assert_same_tensors(after, state)
    assert rest_after == rest


def missing(module: nn.Module) -> None:
    del module.get_submodule("fc")._parameters["bias"]


def missing_part(module: nn.Module) -> None:
    del module._modules["fc"]


def other_shape(module: nn.Module) -> None:
    module.get_submodule("fc").register_parameter("bias", nn.Parameter(torch.zeros(11)))


def same_count_other_shape(module: nn.Module) -> None:
    module.get_submodule("fc").register_parameter("bias", nn.Parameter(torch.zeros(5, 2)))


def buffer(module: nn.Module) -> None:
    missing(module)
    module.get_submodule("fc").register_buffer("bias", torch.zeros(10))


def pruned_otherwise(module: nn.Module) -> None:
    prune.random_unstructured(*place(module, "fc.bias"), 1.0)


def two_hooks(module: nn.Module) -> None:
    part, name = place(module, "fc.bias")
    prune.identity(part, name)
    hook = prune.L1Unstructured(1)
    hook._tensor_name = name
    part.register_forward_pre_hook(hook)


def hook_without_mask(module: nn.Module) -> None:
    prune.identity(*place(module, "fc.bias"))
    del module.get_submodule("fc")._buffers["bias_mask"]


def pair_without_hook(module: nn.Module) -> None:
    prune.identity(*place(module, "fc.bias"))
    module.get_submodule("fc")._forward_pre_hooks.clear()


def taken_mask(module: nn.Module) -> None:
    module.get_submodule("fc").bias_mask = "of the caller's own"  # type: ignore[assignment]


def taken_orig(module: nn.Module) -> None:
    module.get_submodule("fc").bias_orig = "of the caller's own"  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (missing, "fc.bias: the module has no such parameter"),
        (missing_part, "fc.weight: the module has no such parameter"),
        (buffer, "fc.bias: the module has no such parameter"),
        (other_shape, r"fc.bias: .*\[11\].*\[10\]"),
        (same_count_other_shape, r"fc.bias: .*\[5, 2\].*\[10\]"),
        (pruned_otherwise, "fc.bias: .*pruned in another way"),
        (two_hooks, "fc.bias: has 2 pruning hooks"),
        (hook_without_mask, "fc.bias: has a pruning hook, but not both"),
        (pair_without_hook, "fc.bias: is a pair without a pruning hook"),
        (taken_mask, "bias_mask"),
        (taken_orig, "bias_orig"),
    ],
)
def test_masks_that_do_not_fit_change_nothing(
    client: secateur.Client, change: Callable[[nn.Module], None], message: str
) -> None:
    module = net()
    result = client.prune(module, STEPS["l1"].spec)  # the bias is the last
    change(module)
    assert_refused(module, result, message)


@pytest.mark.parametrize("change", [two_hooks, hook_without_mask])
def test_a_module_with_broken_hooks_is_not_sent(
    client: secateur.Client, change: Callable[[nn.Module], None]
) -> None:
    module = net()
    change(module)
    for call in (client.report, client.finalize, lambda m: client.prune(m, STEPS["l1"].spec)):
        with pytest.raises(secateur.InvalidStateDict, match=r"fc\.bias"):
            call(module)


def test_later_pruning_within_the_result_is_accepted(client: secateur.Client) -> None:
    ours, theirs = net(), net()
    result = client.prune(ours, all_l1(WEIGHTS, 0.5).spec)
    for module in (ours, theirs):
        all_l1(WEIGHTS, 0.2).on(module)
    result.apply_to(ours)
    prune.custom_from_mask(*place(theirs, "conv.weight"), result.masks["conv.weight"])
    prune.custom_from_mask(*place(theirs, "fc.weight"), result.masks["fc.weight"])
    assert_same_modules(ours, theirs)


@pytest.mark.parametrize("output", ["dense", "none"])
def test_a_result_without_masks_changes_nothing(client: secateur.Client, output: Any) -> None:
    module = net()
    result = client.prune(module, STEPS["l1"].spec, output=output)
    with pytest.raises(secateur.SecateurError, match="has no masks"):
        result.apply_to(module)
    assert_same_modules(module, net())


def test_a_copy_of_a_pruned_module_is_pruned_too(client: secateur.Client) -> None:
    ours, theirs = twins(client, STEPS["global"])
    with torch.no_grad():  # torch cannot copy weights that have a history
        for module in (ours, theirs):
            module(batch())
    assert_same_modules(copy.deepcopy(ours), copy.deepcopy(theirs))


class Counted(nn.Module):
    """Counts how often its submodules are listed."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(layers))
        self.walks = 0

    def named_modules(self, *args: Any, **options: Any) -> Any:
        self.walks += 1
        return super().named_modules(*args, **options)


def test_many_masks_walk_through_a_module_no_more_often_than_few(client: secateur.Client) -> None:
    walks = []
    for layers in (1, 30):
        module = Counted(layers)
        result = client.prune(module, secateur.global_unstructured("*", 0.5))
        module.walks = 0
        result.apply_to(module)
        walks.append(module.walks)
    assert walks[0] == walks[1] > 0
