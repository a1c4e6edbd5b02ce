"""Models of many sizes, ways to prune them, and digests of torch's results.

Digests are small, so that each of many processes can hold those of all cases.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from blake3 import blake3
from torch import Tensor

import secateur
from tests.reference import (
    Step,
    Tensors,
    all_l1,
    by_torch,
    count_of,
    custom,
    identity,
    l1,
    ln,
    lowest,
    lowest_slices,
    torch_masks,
)

Shapes = Mapping[str, Sequence[int]]
Digests = Mapping[str, str]

LENET: Shapes = {
    "conv1.weight": (6, 1, 5, 5),
    "conv1.bias": (6,),
    "conv2.weight": (16, 6, 5, 5),
    "conv2.bias": (16,),
    "fc1.weight": (120, 400),
    "fc2.weight": (84, 120),
    "fc3.weight": (10, 84),
}
M1: Shapes = {"a.weight": (500, 1000), "b.weight": (400, 1200), "c.bias": (20_000,)}
M5: Shapes = {"a.weight": (1000, 2500), "b.weight": (500, 5000)}
M20: Shapes = {"a.weight": (4000, 2500), "b.weight": (2500, 4000)}
# Names, shapes and dtypes.
KINDS: Mapping[str, tuple[Shapes, torch.dtype]] = {
    "lenet": (LENET, torch.float32),
    "pruned lenet": (LENET, torch.float32),
    "half lenet": (LENET, torch.float16),
    "1M": (M1, torch.float32),
    "1M bf16": (M1, torch.bfloat16),
    "5M": (M5, torch.float32),
    "5M fp16": (M5, torch.float16),
    "20M": (M20, torch.float32),
    "20M bf16": (M20, torch.bfloat16),
}


@dataclass(frozen=True)
class Pruning:
    """A spec and the expected masks.

    Attributes:
        spec: The spec.
        masks: Computes the masks; None for random ones.
        counts: How many elements are pruned at random in each tensor, or in all of them under "".
    """

    spec: secateur.Spec
    masks: Callable[[], Tensors] | None = None
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Expected:
    """Digests of the outputs of a prune, and the zeros of each floating tensor."""

    masks: Digests
    dense: Digests
    reparametrized: Digests
    zeros: Mapping[str, int]


@dataclass(frozen=True)
class Case:
    """A model and one way to prune it.

    Attributes:
        name: Of the case.
        source: The tensors.
        path: A file with the same tensors.
        spec: How to prune them.
        folded: What is expected without pruning.
        pruned: What is expected after the prune.
        again: What is expected after a second prune.
    """

    name: str
    source: Tensors
    path: Path
    spec: secateur.Spec
    folded: Expected
    pruned: Expected
    again: Expected | None


def weights(shapes: Shapes, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Makes random weights. The magnitudes of float32 are distinct in the whole model."""
    generator = torch.Generator().manual_seed(seed)
    counts = [math.prod(shape) for shape in shapes.values()]
    total = sum(counts)
    if dtype == torch.float32:
        # Distinct bit patterns from 2^-11 to 1, shuffled.
        least, step = 0x3A000000, (0x3F800000 - 0x3A000000) // total
        bits = least + step * torch.randperm(total, generator=generator)
        signs = torch.randint(0, 2, (total,), generator=generator) * 2 - 1
        flat = bits.to(torch.int32).view(torch.float32) * signs
    else:
        flat = torch.randn(total, generator=generator).to(dtype)
    parts = torch.split(flat, counts)
    return {name: part.view(*shapes[name]) for name, part in zip(shapes, parts, strict=True)}


def base_of(kind: str) -> dict[str, Tensor]:
    """Makes the weights of a model, without masks."""
    shapes, dtype = KINDS[kind]
    tensors = weights(shapes, dtype, seed=1)
    if "lenet" in kind:  # a tensor that no spec names is returned unchanged
        tensors["steps"] = torch.tensor([7, -3], dtype=torch.int64)
    return tensors


def prior_of(kind: str) -> list[Step]:
    """Returns the earlier prunings of a model."""
    return [l1(["conv1.weight", "fc1.weight"], 0.4)] if kind == "pruned lenet" else []


def source_of(kind: str) -> dict[str, Tensor]:
    """Makes the model that is sent, with pairs for pruned tensors."""
    tensors: Mapping[str, Tensor] = by_torch(base_of(kind), *prior_of(kind)).state_dict()
    return {name: tensor.detach() for name, tensor in tensors.items()}


# Ways to prune -------------------------------------------------------------------------------


def prunings(kind: str) -> dict[str, Pruning]:
    """Returns all ways to prune a model, by name."""
    shapes, dtype = KINDS[kind]
    ways = _halves(kind, shapes) if dtype != torch.float32 else _exact(kind, shapes)
    return ways if kind.startswith(("pruned", "5M", "20M")) else {**ways, **_drawn(shapes)}


def _exact(kind: str, shapes: Shapes) -> dict[str, Pruning]:
    """Expects the masks of torch.nn.utils.prune."""
    names = list(shapes)
    matrices = [name for name in names if name.endswith("weight")]
    steps = {"l1": l1(names, 0.3), "global": all_l1(names, 0.5)}
    if not kind.startswith(("5M", "20M")):
        scores = weights(shapes, torch.float32, seed=2)
        masks = {n: (t > -0.01).float() for n, t in weights(shapes, torch.float32, 3).items()}
        steps |= {
            "identity": identity(names),
            "ln": ln(matrices, 0.25, 2, 0),
            "l1 norm along the last": ln(matrices, 2, 1, -1),
            "custom": custom(masks),
            "l1 of scores": l1(names, 0.4, scores),
            "global of scores": all_l1(names, 0.4, scores),
            "two rules": l1(names, 0.2) + ln(matrices, 0.25, 2, 0),
        }
    prior = prior_of(kind)
    return {
        name: Pruning(step.spec, partial(_by_torch, kind, (*prior, step)))
        for name, step in steps.items()
    }


def _by_torch(kind: str, steps: Sequence[Step]) -> Tensors:
    return torch_masks(base_of(kind), *steps)


def _halves(kind: str, shapes: Shapes) -> dict[str, Pruning]:
    """Expects the masks of a stable sort, because torch does not define the order of ties."""
    names = list(shapes)
    return {
        "l1": Pruning(secateur.l1_unstructured(names, 0.3), partial(_lowest_each, kind, 0.3)),
        "global": Pruning(
            secateur.global_unstructured(names, 0.5), partial(_lowest_of_all, kind, 0.5)
        ),
        "ln": Pruning(
            secateur.ln_structured("a.weight" if "a.weight" in names else "fc1.weight", 7, 2, 0),
            partial(_lowest_rows, kind, "a.weight" if "a.weight" in names else "fc1.weight", 7),
        ),
    }


def _lowest_each(kind: str, amount: float) -> Tensors:
    floats = weights(*KINDS[kind], seed=1)
    return {n: lowest([t], count_of(amount, t.numel()))[0] for n, t in floats.items()}


def _lowest_of_all(kind: str, amount: float) -> Tensors:
    floats = weights(*KINDS[kind], seed=1)
    total = sum(t.numel() for t in floats.values())
    kept = lowest(list(floats.values()), count_of(amount, total))
    return dict(zip(floats, kept, strict=True))


def _lowest_rows(kind: str, name: str, count: int) -> Tensors:
    weight = weights(*KINDS[kind], seed=1)[name]
    norms = torch.linalg.vector_norm(weight.double().flatten(1), dim=1).float()
    return {name: lowest_slices(norms, count, weight.shape, 0)}


def _drawn(shapes: Shapes) -> dict[str, Pruning]:
    name = next(iter(shapes))
    shape = shapes[name]
    whole = sum(math.prod(each) for each in shapes.values())
    of_rows = count_of(0.5, shape[0]) * math.prod(shape[1:])
    return {
        "random": Pruning(
            secateur.random_unstructured(list(shapes), 0.3, seed=5),
            counts={n: count_of(0.3, math.prod(each)) for n, each in shapes.items()},
        ),
        "random rows": Pruning(
            secateur.random_structured(name, 0.5, dim=0, seed=6), counts={name: of_rows}
        ),
        "random of all": Pruning(
            secateur.global_unstructured(list(shapes), 0.3, importance="random", seed=7),
            counts={"": count_of(0.3, whole)},
        ),
    }


# What is expected ----------------------------------------------------------------------------


def digest(tensor: Tensor) -> str:
    """Returns the dtype, shape and BLAKE3 of a tensor."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{tensor.dtype} {list(tensor.shape)} {blake3(data.data).hexdigest()}"


def digests(tensors: Tensors) -> Digests:
    return {name: digest(tensor) for name, tensor in tensors.items()}


def packed(mask: Tensor) -> Tensor:
    """Packs a mask as the wire format does."""
    return torch.from_numpy(np.packbits(mask.reshape(-1).numpy(), bitorder="little"))


def expected_of(base: Tensors, masks: Tensors) -> Expected:
    """Computes what torch.nn.utils.prune gives, before and after `remove`."""
    dense = {n: t * masks[n].to(t.dtype) if n in masks else t for n, t in base.items()}
    pairs: dict[str, Tensor] = {}
    for name, tensor in base.items():
        if name in masks:
            pairs |= {f"{name}_orig": tensor, f"{name}_mask": masks[name].to(tensor.dtype)}
        else:
            pairs[name] = tensor
    return Expected(
        masks=digests({name: packed(mask) for name, mask in masks.items()}),
        dense=digests(dense),
        reparametrized=digests(pairs),
        zeros={n: int((t == 0).sum()) for n, t in dense.items() if t.is_floating_point()},
    )


def check_counts(masks: Tensors, counts: Mapping[str, int]) -> None:
    """Checks how many elements random masks prune."""
    found = {name: int((~mask).sum()) for name, mask in masks.items()}
    assert counts == (found if "" not in counts else {"": sum(found.values())})


def write_models(folder: Path, kinds: Iterable[str], client: secateur.Client | None) -> None:
    """Writes models and the expected results.

    Args:
        folder: Where to write.
        kinds: Keys of KINDS.
        client: Its server computes the random masks once; None leaves random cases out.
    """
    for kind in kinds:
        base, source = base_of(kind), source_of(kind)
        safetensors.torch.save_file(source, folder / f"{kind}.safetensors")
        table = {"": asdict(expected_of(base, torch_masks(base, *prior_of(kind))))}
        for name, pruning in prunings(kind).items():
            if pruning.masks is not None:
                masks = pruning.masks()
            elif client is not None:
                masks = client.prune(source, pruning.spec, progress=False).masks
                check_counts(masks, pruning.counts)
                masks = {**torch_masks(base, *prior_of(kind)), **masks}
            else:
                continue
            table[name] = asdict(expected_of(base, masks))
        table |= _twice(kind, base)
        (folder / f"{kind}.json").write_text(json.dumps(table))


AGAIN = " again"


def _twice(kind: str, base: Tensors) -> dict[str, dict[str, object]]:
    """Returns the expected results of pruning twice, for float32."""
    if KINDS[kind][1] != torch.float32:
        return {}
    names, prior = list(KINDS[kind][0]), prior_of(kind)
    steps = {"l1": l1(names, 0.3), "global": all_l1(names, 0.5)}
    return {
        name + AGAIN: asdict(expected_of(base, torch_masks(base, *prior, step, step)))
        for name, step in steps.items()
    }


def read_cases(folder: Path, kinds: Iterable[str]) -> dict[str, list[Case]]:
    """Reads the cases of each model that `write_models` wrote."""
    return {kind: _cases(folder / f"{kind}.safetensors", kind) for kind in kinds}


def _cases(path: Path, kind: str) -> list[Case]:
    table = {
        name: Expected(**fields)
        for name, fields in json.loads(path.with_suffix(".json").read_text()).items()
    }
    source = safetensors.torch.load_file(path)
    return [
        Case(
            f"{name} of {kind}",
            source,
            path,
            pruning.spec,
            table[""],
            table[name],
            table.get(name + AGAIN),
        )
        for name, pruning in prunings(kind).items()
        if name in table
    ]
