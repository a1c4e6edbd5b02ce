"""Tensors without plain values in memory: the error for each names the tensor."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import secateur

# Warnings of torch about prototypes, and about names that it will change.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

HALF = secateur.l1_unstructured("ok", 0.5)


@pytest.fixture(scope="module")
def distributed() -> Iterator[torch.Tensor]:
    """A real DTensor, on a mesh of this process alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield distribute_tensor(torch.ones(4, 3), init_device_mesh("cpu", (1,)), [Shard(0)])
    dist.destroy_process_group()


def fake() -> torch.Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(3, 3)


def inside(transform: Callable[..., Any]) -> torch.Tensor:
    """A tensor that was taken out of a transform of torch.func."""
    taken = []

    def function(x: torch.Tensor) -> torch.Tensor:
        taken.append(x)
        return x.sum()

    transform(function)(torch.ones(3, 2))
    found: torch.Tensor = taken[0]
    return found


def freed() -> torch.Tensor:
    """As FSDP leaves a parameter whose values are elsewhere."""
    tensor = torch.ones(4, 3)
    tensor.untyped_storage().resize_(0)
    return tensor


class Broken(torch.Tensor):
    """One that fails only when its values are read."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "cpu":
            raise RuntimeError("the device is lost\nand more lines")
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


class NoArray:
    def __array__(self, *_: object, **__: object) -> Any:
        raise OSError("the file is closed")


MADE: dict[str, tuple[Callable[[], Any], str]] = {
    "lazy": (lambda: nn.LazyLinear(3).weight, "run the lazy module on a batch first"),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        r"nested tensor: give its parts, tensor\.unbind\(\)",
    ),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged),
        "nested tensor",
    ),
    "meta": (lambda: torch.ones(3, device="meta"), "device meta .* load the weights first"),
    "fake": (fake, "FakeTensor and has no values: call outside FakeTensorMode"),
    "vmap": (lambda: inside(torch.vmap), r"torch\.func: call outside it"),
    "grad": (lambda: inside(torch.func.grad), r"torch\.func: call outside it"),
    "masked": (
        lambda: torch.masked.masked_tensor(torch.ones(3), torch.ones(3) > 0),
        "is a MaskedTensor, .* give a plain torch.Tensor",
    ),
    "freed": (freed, "its storage was freed"),
    "broken": (
        lambda: torch.ones(4, 3).as_subclass(Broken),
        "cannot read its values: the device is lost$",
    ),
    "no array": (NoArray, "cannot make an array of it: the file is closed"),
}


def calls(client: secateur.Client) -> dict[str, Callable[[Any], object]]:
    return {
        "prune": lambda source: client.prune(source, HALF),
        "prune, streamed": lambda source: client.prune(source, HALF, output="dense"),
        "prune, kept": lambda source: client.prune(source, HALF, keep=True),
        "report": client.report,
        "plan": lambda source: client.plan(source, HALF),
        "finalize": client.finalize,
        "upload": client.upload,
    }


def assert_named(client: secateur.Client, tensor: Any, message: str) -> None:
    """The tensor is refused as a parameter, as a mask and as a score, by its name."""
    # The first tensor fills messages, so that the second is read in gRPC's thread.
    source = {"ok": np.ones((600, 1000), np.float32), "at.fault": tensor}
    for call in calls(client).values():
        with pytest.raises(secateur.InvalidStateDict, match=rf"^at\.fault: .*{message}"):
            call(source)
    mask = secateur.custom_from_mask({"ok": tensor})
    with pytest.raises(secateur.SecateurError, match=f"ok: .*{message}"):
        client.prune({"ok": np.ones((4, 3), np.float32)}, mask)


@pytest.mark.parametrize("kind", MADE)
def test_each_is_named_with_what_to_do(client: secateur.Client, kind: str) -> None:
    make, message = MADE[kind]
    assert_named(client, make(), message)


def test_a_distributed_tensor_is_named(client: secateur.Client, distributed: torch.Tensor) -> None:
    assert_named(client, distributed, r"is a DTensor, .* give tensor\.full_tensor\(\)")
    assert_named(client, nn.Parameter(distributed), r"full_tensor\(\)")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(3)), r"^0\.weight: .*lazy module"),
        (lambda: nn.Linear(2, 2, device="meta"), "^weight: .*device meta"),
    ],
)
def test_a_module_of_them_is_refused_by_every_call(
    client: secateur.Client, module: Callable[[], nn.Module], message: str
) -> None:
    for call in calls(client).values():
        with pytest.raises(secateur.InvalidStateDict, match=message):
            call(module())


def test_a_state_dict_that_fails_is_an_invalid_state_dict(client: secateur.Client) -> None:
    class Failing(nn.Linear):
        def state_dict(self, *_: object, **__: object) -> Any:
            raise AssertionError("not on this rank")

    for call in calls(client).values():
        with pytest.raises(secateur.InvalidStateDict, match="not on this rank"):
            call(Failing(2, 2))


def test_plain_tensors_of_unusual_kinds_are_sent(client: secateur.Client) -> None:
    """Views, subclasses without an own dispatch, and those that autograd does not know."""
    plain = torch.arange(1.0, 13).reshape(4, 3)

    class Mine(torch.Tensor):
        pass

    with torch.inference_mode():
        inferred = plain + 0
    for tensor in (
        plain.as_subclass(Mine),
        inferred,
        plain.flip(0).flip(0),
        torch.ones(1).expand(4, 3) * plain,
        torch.cat([plain, plain])[4:],
        plain.T.contiguous().T,
        nn.Parameter(plain),
        plain[:0],
    ):
        zeros = client.prune({"ok": tensor}, HALF).report.zeros
        assert zeros == round(tensor.numel() / 2)
