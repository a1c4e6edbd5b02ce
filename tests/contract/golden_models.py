"""The models of the golden file: the same bits on every machine and with every library.

All values are integers times a power of two, and the integers are raw bits of PCG64, whose stream
numpy promises never to change. No function of a mathematical library is used.
"""

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Tensors = dict[str, Tensor]

# Above these sizes the server uses other code paths (see cut, batches.py and torch_backend.py).
ABOVE_SMALL = (256, 300)
ABOVE_FEW = (300, 700)
ABOVE_PIECE = (1030, 1031)
ABOVE_LARGE = (2050, 2052)


def raw_bits(seed: int, shape: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    bits = np.random.PCG64(seed).random_raw(math.prod(shape))
    return np.asarray(bits, np.uint64)


def bell(
    seed: int, shape: Sequence[int], scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Sums of three numbers of 20 bits, in (-1.5, 1.5) times `scale`, a power of two."""
    bits, low = raw_bits(seed, shape), np.uint64((1 << 20) - 1)
    parts = [(bits >> np.uint64(shift)) & low for shift in (0, 20, 40)]
    whole = np.sum(parts, axis=0, dtype=np.int64) - 3 * (1 << 19)
    values: Tensor = torch.from_numpy(whole * (scale * 2.0**-20)).to(dtype)
    return values.view(tuple(shape))


def wide(seed: int, shape: Sequence[int]) -> Tensor:
    """Doubles in [-1, 1) that float32 cannot represent."""
    whole = (raw_bits(seed, shape) >> np.uint64(11)).astype(np.int64) - (1 << 52)
    return torch.from_numpy(whole * 2.0**-52).view(tuple(shape))


def coarse(seed: int, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Multiples of 0.25 in [-1, 1], so that nearly all are ties, with zeros of both signs."""
    bits = raw_bits(seed, shape)
    values = torch.from_numpy(((bits >> np.uint64(8)) % np.uint64(9)).astype(np.float64) - 4) * 0.25
    is_minus = torch.from_numpy((bits & np.uint64(1)).astype(np.bool_))
    values = torch.where((values == 0) & is_minus, -0.0, values)
    return values.to(dtype).view(tuple(shape))


def integers(seed: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    whole = (raw_bits(seed, shape) % np.uint64(201)).astype(np.int64)
    return torch.from_numpy(whole - (0 if dtype == torch.uint8 else 100)).to(dtype).view(*shape)


def flags(seed: int, shape: Sequence[int], percent: int) -> Tensor:
    """A mask that prunes about `percent` percent."""
    kept = raw_bits(seed, shape) % np.uint64(100) >= np.uint64(percent)
    return torch.from_numpy(kept).view(tuple(shape))


SHAPES = {
    "stem.weight": (8, 3, 3, 3),
    "layer1.0.conv.weight": (16, 8, 3, 3),
    "layer1.1.conv.weight": (16, 16, 3, 3),
    "layer2.0.conv.weight": (24, 16, 1, 1),
    "line.weight": (6, 5, 7),
    "attn.q.weight": (16, 24),
    "attn.k.weight": (8, 24),
    "attn.v.weight": (8, 24),
    "attn.o.weight": (24, 16),
    "head.weight": (10, 24),
}
CONVOLUTIONS = ["stem.weight", "layer*.conv.weight"]
MATRICES = [*SHAPES]


@cache
def layers() -> Tensors:
    """Convolutions with a batch norm, attention, and a head, each with its own scale."""
    tensors = {
        name: bell(seed, shape, 2.0 ** -(seed % 3))
        for seed, (name, shape) in enumerate(SHAPES.items())
    }
    tensors["stem.bias"] = bell(20, (8,))
    tensors["norm.weight"] = bell(21, (8,)).abs()
    tensors["norm.running_var"] = bell(22, (8,)).abs()
    tensors["norm.num_batches_tracked"] = torch.tensor(7)
    tensors["head.bias"] = bell(23, (10,))
    return tensors


@cache
def grid() -> Tensors:
    """The same layers, of few values."""
    return {
        name: coarse(seed, tensor.shape)
        for seed, (name, tensor) in enumerate(layers().items(), 30)
        if tensor.is_floating_point()
    }


@cache
def pairs() -> Tensors:
    """The layers, some of them as the pairs that torch.nn.utils.prune writes."""
    tensors: Tensors = {}
    for seed, (name, tensor) in enumerate(layers().items()):
        if name in ("layer1.0.conv.weight", "attn.q.weight", "head.weight"):
            tensors[f"{name}_orig"] = tensor
            tensors[f"{name}_mask"] = flags(60 + seed, tensor.shape, 40).to(tensor.dtype)
        else:
            tensors[name] = tensor
    tensors["line.weight"] = torch.where(
        flags(59, SHAPES["line.weight"], 30), tensors["line.weight"], 0
    )
    return tensors


@cache
def zeroed() -> Tensors:
    """The layers, dense, after an earlier pruning: most of them have some zeros."""
    return {
        name: tensor * flags(80 + seed, tensor.shape, 35) if seed % 4 else tensor
        for seed, (name, tensor) in enumerate(layers().items())
    }


@cache
def many(count: int = 180) -> Tensors:
    """Small tensors of many sizes, enough for the server to batch them."""
    tensors: Tensors = {}
    for index in range(count):
        shape = [(1 + index % 13,), (index % 7 + 1, 9), (3, 4, index % 5 + 1), (17, 16)][index % 4]
        make = coarse if index % 3 == 0 else bell
        tensors[f"blocks.{index}.weight"] = make(100 + index, shape)
    return tensors


@cache
def crowd() -> Tensors:
    """More small tensors than the server handles between two checks for cancellation."""
    return many(2100)


@cache
def heap() -> Tensors:
    """Small tensors with more elements than fit into one batch."""
    return {f"{i}.weight": bell(700 + i, (140, 150), dtype=torch.float16) for i in range(60)}


@cache
def mixed() -> Tensors:
    """Small tensors of several dtypes, some without elements, some partly pruned."""
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
    tensors: Tensors = {}
    for index, (name, tensor) in enumerate(many(100).items()):
        value = tensor.to(dtypes[index % 4])
        if index % 10 == 3:
            tensors[f"{name}_orig"] = value
            tensors[f"{name}_mask"] = flags(900 + index, value.shape, 30).to(value.dtype)
        else:
            tensors[name] = value if index % 33 else value[:0]
    return tensors


@cache
def alike() -> Tensors:
    """Blocks of a transformer: many groups of the same shapes."""
    return {
        f"blocks.{index}.{name}.weight": bell(1000 + 2 * index + place, shape)
        for index in range(60)
        for place, (name, shape) in enumerate({"up": (12, 6), "down": (6, 12)}.items())
    }


@cache
def medium() -> Tensors:
    """Tensors that are not small, and more units than are sorted at once."""
    return {
        "odd": integers(200, (7,), torch.int8),
        "a.weight": bell(201, ABOVE_FEW),
        "b.weight": bell(202, ABOVE_FEW, 0.5, torch.float16),
        "c.weight": coarse(203, ABOVE_SMALL),
        "d.weight": bell(204, (40, 24)),
    }


@cache
def pieces() -> Tensors:
    """Tensors of several pieces and messages."""
    return {
        "odd": integers(210, (3,), torch.int8),
        "a.weight": bell(211, ABOVE_PIECE),
        "b.weight": coarse(212, ABOVE_PIECE, torch.bfloat16),
    }


@cache
def large() -> Tensors:
    """So many units that the server samples them first."""
    return {"w": bell(220, ABOVE_LARGE), "bias": bell(221, (11,))}


@cache
def large_ties() -> Tensors:
    return {"w": coarse(222, ABOVE_LARGE, torch.bfloat16), "bias": bell(223, (11,))}


@cache
def large_pruned() -> Tensors:
    """Most elements are already pruned."""
    weight, mask = bell(224, ABOVE_LARGE, dtype=torch.float16), flags(225, ABOVE_LARGE, 96)
    return {"w_orig": weight, "w_mask": mask.to(torch.float16)}


@cache
def edges() -> Tensors:
    """Infinities, tensors without elements or dimensions, and numbers that underflow."""
    infinite = bell(230, (6, 9))
    infinite[1, 2], infinite[3, 4], infinite[5] = math.inf, -math.inf, math.inf
    return {
        "infinite": infinite,
        "none": torch.empty(0),
        "no_rows": torch.empty(0, 5),
        "no_columns": torch.empty(4, 0),
        "scalar": torch.tensor(-0.75),
        "one": torch.tensor([0.25]),
        "zeros": torch.tensor([[0.0, -0.0, 0.0, -0.0], [0.0, 0.0, -0.0, -0.0]]),
        "tiny": torch.tensor([2.0**-149, -(2.0**-149), 2.0**-126, 0.0, -(2.0**-140), 2.0**127]),
        "huge": torch.tensor([[2.0**127, -(2.0**127)], [2.0**100, 1.0]]),
        "count": torch.tensor(12),
    }


def of_dtype(dtype: torch.dtype) -> Tensors:
    """Matrices and a convolution of a dtype."""
    shapes = {"a": (24, 20), "b": (8, 4, 3, 3), "c": (10,)}
    if not dtype.is_floating_point:
        return {
            name: integers(i, shape, dtype) for i, (name, shape) in enumerate(shapes.items(), 240)
        }
    if dtype == torch.float64:
        return {name: wide(i, shape) for i, (name, shape) in enumerate(shapes.items(), 240)}
    return {name: bell(i, shape, 2.0, dtype) for i, (name, shape) in enumerate(shapes.items(), 240)}


INDEX = "model.safetensors.index.json"


def write_file(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    """Writes a safetensors file whose bytes do not depend on the installed library."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64", torch.int8: "I8"}
    header: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
    parts, end = [], 0
    for name, tensor in tensors.items():
        data = tensor.contiguous().numpy().tobytes()
        begin, end = end, end + len(data)
        shape = list(tensor.shape)
        header[name] = {"dtype": names[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
        parts.append(data)
    head = json.dumps(header).encode()
    path.write_bytes(b"".join([len(head).to_bytes(8, "little"), head, *parts]))
    return path


def write_shards(folder: Path, tensors: Tensors) -> Path:
    """Writes three files and their index, with a name tied to the stem's. Returns the folder."""
    shards: list[Tensors] = [{}, {}, {}]
    for index, (name, tensor) in enumerate(tensors.items()):
        shards[index % 3][name] = tensor
    weight_map = {"tied.weight": "model-1.safetensors"}
    for index, shard in enumerate(shards, 1):
        metadata = {"format": "pt"} | ({"tied.weight": "stem.weight"} if index == 1 else {})
        file = write_file(folder / f"model-{index}.safetensors", shard, metadata)
        weight_map |= dict.fromkeys(shard, file.name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
