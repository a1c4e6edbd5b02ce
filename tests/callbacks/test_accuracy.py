"""A LeNet that is pruned to 90 % while it trains reads digits as well as one that is not."""

import statistics
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional

import secateur
from secateur import callbacks


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More threads only slow down a network this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SPEC = secateur.global_unstructured("*.weight", 0.9)
BATCH = 32


def trained(client: secateur.Client | None, digits: Any, seed: int, epochs: int) -> torch.nn.Module:
    """Trains in one cycle; the pruning is from a fifth of the steps on until 60 % of them."""
    from examples.demo import LeNet

    torch.manual_seed(seed)
    model = LeNet()
    count = len(digits.train_labels) // BATCH
    steps = epochs * count
    optimizer = torch.optim.Adam(model.parameters())
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    pruning = client and callbacks.start(
        client, model, SPEC, steps * 3 // 5, steps // 5, optimizer=optimizer
    )
    for _ in range(epochs):
        for batch in torch.randperm(len(digits.train_labels))[: count * BATCH].view(count, BATCH):
            optimizer.zero_grad()
            found = model(digits.train_images[batch])
            functional.cross_entropy(found, digits.train_labels[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            rates.step()
            if pruning:
                callbacks.step(pruning)
    if pruning:
        callbacks.finish(pruning)
    return model


def lost(client: secateur.Client, seed: int, epochs: int) -> float:
    """The accuracy of a dense LeNet, less that of one with 90 % zeros."""
    from examples.demo import accuracy, read_digits  # scikit-learn takes a second to import

    digits = read_digits()
    dense, sparse = (trained(by, digits, seed, epochs) for by in (None, client))
    assert accuracy(dense, digits) > 0.95
    assert client.report(sparse, "*.weight").sparsity == pytest.approx(0.9, abs=1e-4)
    return accuracy(dense, digits) - accuracy(sparse, digits)


def test_a_short_training(client: secateur.Client) -> None:
    assert lost(client, seed=0, epochs=10) < 0.02


@pytest.mark.slow  # 20 s
def test_within_one_point(client: secateur.Client) -> None:
    losses = [lost(client, seed, epochs=15) for seed in range(3)]
    assert statistics.mean(losses) < 0.01, losses
