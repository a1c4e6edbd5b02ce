"""secateur.callbacks in hand-written loops: schedules, zeros, optimizers, resuming, faults."""

import copy
import gc
import io
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

import secateur
from secateur import callbacks
from secateur.callbacks.schedule import steps_of
from tests.callbacks.training import SPEC, batches, cubic, loss_of, network, trained
from tests.conftest import start_server, stop_server


def test_a_model_is_pruned_by_the_schedule_and_keeps_its_zeros(client: secateur.Client) -> None:
    module = network()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    pruning = callbacks.start(client, module, SPEC, 14, 2, prunings=4, optimizer=optimizer)
    sums = trained(pruning, module, optimizer, 16)
    # 3 steps between prunings: at steps 5, 8, 11 and 14.
    expected = (
        [0] * 4 + [cubic(1, 4)] * 3 + [cubic(2, 4)] * 3 + [cubic(3, 4)] * 3 + [cubic(4, 4)] * 3
    )
    assert sums == expected
    report = callbacks.finish(pruning)
    assert report is not None
    assert report.zeros == sums[-1]
    assert sorted(dict(module.named_parameters())) == sorted(dict(network().named_parameters()))


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 60))
def test_prunings_are_at_equal_distances(start: int, length: int, prunings: int) -> None:
    steps = steps_of(start, start + length, prunings)
    number = steps.prunings
    assert number == min(prunings, max(1, length))
    for step in range(start + length):
        assert steps.due(step) == sum(
            (step - start) * number >= k * length for k in range(1, number + 1)
        )
    assert steps.due(start + length) == number
    if length:  # retries after the end
        assert steps.due(start + 2 * length) == 2 * number


def test_each_pruning_is_what_the_service_makes_of_the_masks_so_far(
    client: secateur.Client,
) -> None:
    module, twin = network(), network()
    pruning = callbacks.start(client, module, SPEC, 3, prunings=3)
    for number in range(1, 4):
        with torch.no_grad():
            for ours in module.parameters():
                ours.add_(torch.randn(ours.shape) / 10)
        callbacks.step(pruning)
        with torch.no_grad():
            for name, ours in module.named_parameters():
                path, _, leaf = name.rpartition(".")
                theirs = twin.get_submodule(path)._parameters
                weight = theirs.get(f"{leaf}_orig", theirs.get(leaf))
                assert weight is not None
                weight.copy_(ours)
        # The weights are those after pruning, so the twin prunes at least the same.
        client.prune(twin, SPEC.at(number, 3)).apply_to(twin)
        for name, mask in pruning.masks.pruned.items():
            assert torch.equal(mask, twin.get_buffer(f"{name}_mask") == 0)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "AdamW": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, amsgrad=True),
    "Adam": partial(torch.optim.Adam, lr=0.01, weight_decay=0.1, foreach=True),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.001, momentum=0.9, centered=True),
    "fused": partial(torch.optim.AdamW, lr=0.01, fused=True),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers_neither_move_nor_remember_pruned_weights(
    client: secateur.Client, make: Callable[[Any], torch.optim.Optimizer]
) -> None:
    module = network()
    optimizer = make(module.parameters())
    pruning = callbacks.start(client, module, SPEC, 6, prunings=2, optimizer=optimizer)
    for number, batch in enumerate(batches(9)):
        optimizer.zero_grad()
        loss_of(module, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        for name, pruned in pruning.masks.pruned.items():
            weight = module.get_parameter(name)
            assert not weight[pruned].any()  # before our step too
            assert weight.grad is not None
            assert not weight.grad[pruned].any()
            assert weight.grad[~pruned].any()
        callbacks.step(pruning)
        assert bool(pruning.masks.pruned) == (number >= 2)
        for name, pruned in pruning.masks.pruned.items():
            remembered = optimizer.state[module.get_parameter(name)]
            of_weights = [v for v in remembered.values() if v.shape == pruned.shape]
            assert of_weights
            assert not any(value[pruned].any() for value in of_weights)


class Noisy(torch.optim.SGD):
    """Moves every weight, whatever its gradient."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(0.01)


def test_weights_are_zero_after_any_optimizer(client: secateur.Client) -> None:
    module = network()
    optimizer = Noisy(module.parameters(), lr=0.1)
    pruning = callbacks.start(client, module, SPEC, 2, prunings=1)
    sums = trained(pruning, module, optimizer, 5)
    assert sums == [0] + [cubic(1, 1)] * 4


def test_the_norm_that_clips_gradients_is_of_kept_weights(client: secateur.Client) -> None:
    """As with torch.nn.utils.prune."""
    ours, theirs = network(), network()
    pruning = callbacks.start(client, ours, SPEC, 0)
    client.prune(theirs, SPEC).apply_to(theirs)
    [batch] = batches(1)
    for module in (ours, theirs):
        loss_of(module, batch).backward()  # type: ignore[no-untyped-call]
    norms = [nn.utils.clip_grad_norm_(module.parameters(), 1.0) for module in (ours, theirs)]
    torch.testing.assert_close(*norms)
    callbacks.finish(pruning)


# Before and after ---------------------------------------------------------------------------------


def test_masks_of_torch_are_taken_over(client: secateur.Client) -> None:
    module = network()
    prune.l1_unstructured(module[4], "weight", 0.5)  # type: ignore[no-untyped-call]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    pruned = module.get_buffer("4.weight_mask") == 0
    pruning = callbacks.start(client, module, SPEC, 4, prunings=2, optimizer=optimizer)
    assert not prune.is_pruned(module)
    trained(pruning, module, optimizer, 5)
    assert not module.get_parameter("4.weight")[pruned].any()


def test_a_start_that_fails_leaves_the_masks_of_torch(client: secateur.Client) -> None:
    module = network()
    prune.l1_unstructured(module[4], "weight", 0.5)  # type: ignore[no-untyped-call]
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(secateur.InvalidSpec, match="none"):
        callbacks.start(client, module, secateur.l1_unstructured("none", 0.5), 4)
    assert prune.is_pruned(module)
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_fine_tuning_a_pruned_model_keeps_its_masks(client: secateur.Client) -> None:
    module = network()
    masks = client.prune(module, SPEC).masks
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    spec = secateur.custom_from_mask(masks)
    pruning = callbacks.start(client, module, spec, 0, optimizer=optimizer)
    trained(pruning, module, optimizer, 3)
    for name, mask in masks.items():
        assert torch.equal(module.get_parameter(name) != 0, mask)


@pytest.mark.parametrize("wrap", [lambda module: module, nn.DataParallel])
def test_a_training_is_resumed(client: secateur.Client, wrap: Callable[[Any], Any]) -> None:
    def begun(module: nn.Module, state: Any = None) -> tuple[Any, Any]:
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
        pruning = callbacks.start(client, module, SPEC, 6, optimizer=optimizer, state=state)
        return optimizer, pruning

    whole = network()
    optimizer, pruning = begun(whole)
    saved: dict[str, Any] = {}
    for number, batch in enumerate(batches(8), 1):
        optimizer.zero_grad()
        loss_of(whole, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        callbacks.step(pruning)
        if number == 4:
            saved = copy.deepcopy(
                {"w": whole.state_dict(), "o": optimizer.state_dict(), "p": pruning.state_dict()}
            )
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    inner = network(seed=1)
    inner.load_state_dict(saved["w"])
    resumed = wrap(inner)
    optimizer, pruning = begun(resumed, saved["p"])
    optimizer.load_state_dict(saved["o"])
    for batch in list(batches(8))[4:]:
        optimizer.zero_grad()
        loss_of(resumed, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        callbacks.step(pruning)
    for name, parameter in whole.named_parameters():
        assert torch.equal(inner.get_parameter(name), parameter)
    with pytest.raises(secateur.InvalidStateDict, match=r"0 zeros, and \d+ of its weights were pr"):
        begun(network(seed=1), saved["p"])


def test_nothing_is_left_behind(client: secateur.Client) -> None:
    module = network()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    pruning = callbacks.start(client, module, SPEC, 1, optimizer=optimizer)
    trained(pruning, module, optimizer, 2)
    left = [weakref.ref(mask) for mask in pruning.masks.pruned.values()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.save(module, io.BytesIO())  # torch warns of hooks that it cannot save
    assert left
    callbacks.finish(pruning)
    assert not any(parameter._backward_hooks for parameter in module.parameters())
    del pruning
    gc.collect()
    assert not any(ref() is not None for ref in left)


def test_memory_is_one_mask(client: secateur.Client) -> None:
    """One byte for each element, and no copy of a weight, between prunings."""
    module = nn.Sequential(nn.Linear(256, 512, bias=False))
    elements = module.get_parameter("0.weight").numel()
    before = storages_now()
    pruning = callbacks.start(client, module, SPEC, 0)
    new = [held.nbytes() for place, held in storages_now().items() if place not in before]
    assert [size for size in new if size >= elements] == [elements]
    callbacks.finish(pruning)


def storages_now() -> dict[int, torch.UntypedStorage]:
    """The storages of all tensors, by their addresses."""
    gc.collect()
    found = [tensor.untyped_storage() for tensor in tensors_now()]
    return {storage.data_ptr(): storage for storage in found}


def tensors_now() -> Iterator[Tensor]:
    for found in gc.get_objects():
        if type(found) in (Tensor, nn.Parameter) and found.layout is torch.strided:
            yield found


# The server is away -------------------------------------------------------------------------------


def test_the_training_goes_on_without_the_server_and_catches_up() -> None:
    first = start_server()
    module = network()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    with secateur.Client(first.address, timeout=60) as client:
        pruning = callbacks.start(client, module, SPEC, 4, prunings=4, optimizer=optimizer)
        assert trained(pruning, module, optimizer, 2)[-1] == cubic(2, 4)
        stop_server(first)
    pruning.client = secateur.Client(first.address, timeout=0.2)
    with pytest.warns(secateur.NotPruned, match=r"^pruning [34] of 4 failed at step \d, and"):
        assert trained(pruning, module, optimizer, 3) == [cubic(2, 4)] * 3
    pruning.client.close()
    second = start_server()
    with secateur.Client(second.address, timeout=60) as client:
        pruning.client = client
        assert trained(pruning, module, optimizer, 1) == [cubic(4, 4)]
    assert callbacks.finish(pruning) is pruning.report
    stop_server(second)


def test_a_training_that_ends_early_warns(client: secateur.Client) -> None:
    module = network()
    pruning = callbacks.start(client, module, SPEC, 4, prunings=2)
    callbacks.step(pruning, 3)
    message = r"ended after 1 of 2 prunings, at step 3 \(end_step is 4\): .* less sparse than asked"
    with pytest.warns(secateur.NotPruned, match=message):
        report = callbacks.finish(pruning)
    assert report is not None
    assert report.zeros == cubic(1, 2)


def test_no_server_at_the_start_is_an_error() -> None:
    module = network()
    with (
        secateur.Client("127.0.0.1:1", timeout=0.2) as client,
        pytest.raises((secateur.Unavailable, secateur.DeadlineExceeded)),
    ):
        callbacks.start(client, module, SPEC, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"client": None}, r"^client: None is not a secateur\.Client$"),
        ({"module": {}}, r"a torch\.nn\.Module is needed, not dict"),
        ({"spec": "l1"}, r"^spec: 'l1' is not a Spec; make one"),
        ({"spec": secateur.l1_unstructured("none", 0.5)}, "none"),
        ({"spec": secateur.select("*", secateur.threshold(0.1))}, "amount: threshold has no steps"),
        ({"end_step": 1, "start_step": 2}, "^end_step: 1 is before start_step, 2; give a later"),
        ({"end_step": -1}, r"^end_step: -1 is not an int in \[0, "),
        ({"prunings": 0}, r"^prunings: 0 is not an int in \[1, "),
        ({"schedule": "no"}, "^schedule: 'no' is "),
        ({"optimizer": 3}, "^optimizer: 3 is not an optimizer of torch$"),
        (
            {"state": {"step": 1}},
            r"^state: .* is not a Pruning's state_dict\(\): 'done'$",
        ),
        ({"state": {"step": 1, "done": 0, "pruned": {"x": 1}}}, "^state: x has 0 zeros, and 1 of"),
    ],
)
def test_wrong_arguments(client: secateur.Client, arguments: dict[str, Any], message: str) -> None:
    module = network()
    given = {"client": client, "module": module, "spec": SPEC, "end_step": 4, **arguments}
    with pytest.raises(secateur.SecateurError, match=message):
        callbacks.start(**given)
    assert not any(parameter._backward_hooks for parameter in module.parameters())


def test_a_nan_is_an_error_that_names_it(client: secateur.Client) -> None:
    module = network()
    pruning = callbacks.start(client, module, SPEC, 1)
    with torch.no_grad():
        module.get_parameter("4.weight")[2, 3] = float("nan")
    with pytest.raises(secateur.InvalidSpec, match=r"4\.weight.*NaN"):
        callbacks.step(pruning)
