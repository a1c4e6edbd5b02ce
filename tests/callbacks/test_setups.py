"""secateur.callbacks with mixed precision, accumulated gradients, wrappers and tied weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import secateur
from secateur import callbacks
from tests.callbacks.training import SPEC, batches, count, cubic, loss_of, network, trained, zeros
from tests.conftest import RunningServer


def test_mixed_precision_with_a_scaler_and_accumulation(client: secateur.Client) -> None:
    module = network()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu")
    pruning = callbacks.start(client, module, SPEC, 3, prunings=3, optimizer=optimizer)
    sums = []
    for number, batch in enumerate(batches(12), 1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(module, batch)
        if number == 8:
            loss = loss * float("inf")  # the scaler then skips the step
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if number % 2 == 0:
            scaler.step(optimizer)
            scaler.update()
            callbacks.step(pruning)
            optimizer.zero_grad()
            sums.append(count(zeros(module)))
    assert sums == [cubic(1, 3), cubic(2, 3)] + [cubic(3, 3)] * 4
    assert all(bool(p.isfinite().all()) for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(client: secateur.Client, dtype: torch.dtype) -> None:
    module = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 4)).to(dtype)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    pruning = callbacks.start(client, module, SPEC, 2, prunings=2, optimizer=optimizer)
    for _ in range(4):
        module(torch.ones(2, 16, dtype=dtype)).square().sum().backward()
        optimizer.step()
        callbacks.step(pruning)
    assert pruning.report is not None
    assert pruning.report.zeros == round(0.8 * (16 * 32 + 32 * 4))
    assert pruning.masks.hold()


def eager(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "compiled": eager,
    "parallel": nn.DataParallel,
    "both": lambda module: nn.DataParallel(eager(module)),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_modules_train_as_plain_ones(
    client: secateur.Client, wrap: Callable[[nn.Module], Any]
) -> None:
    spec = secateur.l1_unstructured(["0.weight", "4.*"], 0.7)
    plain, inner = network(), network()
    for module in (plain, wrap(inner)):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
        pruning = callbacks.start(client, module, spec, 4, prunings=2, optimizer=optimizer)
        trained(pruning, module, optimizer, 6)
        assert list(pruning.masks.pruned) == ["0.weight", "4.weight", "4.bias"]
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(inner.get_parameter(name), parameter)


@pytest.mark.slow  # inductor compiles for half a minute
@pytest.mark.filterwarnings("ignore")
def test_a_module_compiled_by_inductor(client: secateur.Client) -> None:
    inner = network()
    module = torch.compile(inner)
    optimizer = torch.optim.AdamW(inner.parameters(), lr=0.01)
    pruning = callbacks.start(client, module, SPEC, 4, prunings=2, optimizer=optimizer)
    assert trained(pruning, module, optimizer, 6)[-1] == cubic(2, 2)


def test_tied_weights_have_one_mask(client: secateur.Client) -> None:
    module = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 12, bias=False))
    module[1].weight = module[0].weight
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    pruning = callbacks.start(client, module, SPEC, 2, prunings=2, optimizer=optimizer)
    for _ in range(4):
        module(torch.arange(12)).square().sum().backward()
        optimizer.step()
        callbacks.step(pruning)
    assert module[1].weight is module[0].weight
    assert int(zeros(module)["0.weight"].sum()) == round(0.8 * 96)


def test_sparse_gradients(client: secateur.Client) -> None:
    module = nn.Sequential(nn.Embedding(12, 8, sparse=True))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    pruning = callbacks.start(client, module, SPEC, 0, optimizer=optimizer)
    module(torch.arange(5)).square().sum().backward()
    optimizer.step()
    callbacks.step(pruning)
    assert int(zeros(module)["0.weight"].sum()) == round(0.8 * 96)


def one_of_two(rank: int, address: str, folder: str) -> None:
    """Trains with other data than the other process. Only the first one reaches the server."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    module = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    with secateur.Client(address if rank == 0 else "127.0.0.1:1", timeout=60) as client:
        pruning = callbacks.start(client, module, SPEC, 4, prunings=2, optimizer=optimizer)
        for batch in list(batches(12))[rank::2]:
            optimizer.zero_grad()
            loss_of(module, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            callbacks.step(pruning)
        torch.save(module.module.state_dict(), f"{folder}/{rank}.pt")
        with pytest.raises(secateur.InvalidSpec, match="none"):  # in both processes
            callbacks.start(client, module, secateur.l1_unstructured("none", 0.5), 4)
    distributed.destroy_process_group()


@pytest.mark.slow  # two processes that import torch
def test_processes_of_distributed_training_have_the_same_masks(
    server: RunningServer, tmp_path: Path
) -> None:
    spawn(one_of_two, (server.address, str(tmp_path)), nprocs=2)  # type: ignore[no-untyped-call]
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    module = network()
    module.load_state_dict(one)
    assert count(zeros(module)) == cubic(2, 2)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, other[name])
