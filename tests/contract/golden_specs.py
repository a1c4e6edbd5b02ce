"""Families of cases: every choice of a spec, on small models."""

import math
from collections.abc import Mapping
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import torch

import secateur as s
from secateur.literals import Scope
from tests.contract import golden_models as models
from tests.contract.golden_digests import Case, all_pruned
from tests.contract.golden_models import CONVOLUTIONS, MATRICES

EVERY = "*.weight"
GRANULARITIES: Mapping[str, Any] = {
    "element": "element",
    "slices 0": s.slices(0),
    "slices 1": s.slices(1),
    "slices -1": s.slices(-1),
    "filters": s.filters(),
    "columns": s.columns(),
    "heads of 4": s.heads(4),
    "blocks 4x4": s.blocks(4, 4),
    "blocks 0x3": s.blocks(0, 3),
    "2:4": s.n_m(2, 4),
    "1:3 along 0": s.n_m(1, 3, 0),
}


LAYERS = {"layers": models.layers}
BOTH = {**LAYERS, "grid": models.grid}


def methods() -> dict[str, Case]:
    """The methods of torch.nn.utils.prune, and sums of them."""
    amounts = {"0": 0, "7": 7, "0.137": 0.137, "0.5": 0.5, "1.0": 1.0}
    l1 = {f"l1 {shown}": s.l1_unstructured(EVERY, amount) for shown, amount in amounts.items()}
    everywhere = {
        f"global {shown}": s.global_unstructured(EVERY, amount) for shown, amount in amounts.items()
    }
    at_random = {
        "random": s.random_unstructured(EVERY, 0.4, seed=3),
        "random, the largest seed": s.random_unstructured(EVERY, 5, seed=2**64 - 1),
        "random slices": s.random_structured(MATRICES, 0.4, dim=1, seed=3),
        "global random": s.global_unstructured(EVERY, 0.3, "random", seed=11),
        "random blocks": s.select(CONVOLUTIONS, 0.5, s.random(4), s.kernels(), "global"),
        "random 2:4": s.select(MATRICES, 0.5, s.random(4), s.n_m(2, 4), "global"),
    }
    others = {
        "identity": s.identity(EVERY),
        "n:m": s.n_m_structured(MATRICES),
        "5:8": s.n_m_structured("attn.*.weight", 5, 8),
        "block_structured": s.block_structured(MATRICES, 0.4, 3, 5, n=2),
        "global_structured": s.global_structured(MATRICES, 0.4, 2, 0),
        "one after another": s.ln_structured(MATRICES, 0.25, 2, 0)
        + s.random_structured(MATRICES, 1, -1, seed=5)
        + s.n_m_structured("attn.?.weight")
        + s.global_unstructured(EVERY, 0.2),
        "two by name": s.l1_unstructured(["head.bias", "stem.weight"], 3),
    }
    found = all_pruned(BOTH, {**l1, **everywhere, **at_random})
    return found | all_pruned(LAYERS, others)


def norms() -> dict[str, Case]:
    orders: list[Any] = [1, 2, 0.5, 3, 1.5, 0, math.inf, -math.inf, -1, "fro"]
    slices = {
        f"slices {dim} by {order}": s.ln_structured(MATRICES, 0.4, order, dim)
        for order in orders
        for dim in (0, 1)
    }
    means = {
        f"blocks by {order}": s.select(MATRICES, 0.4, s.magnitude(order), s.blocks(2, 6), "global")
        for order in orders[:-1]
    }
    nuclear = {"nuclear": s.ln_structured("line.weight", 2, "nuc", 1)}
    return all_pruned(LAYERS, {**slices, **means, **nuclear})


def granularities() -> dict[str, Case]:
    specs = {
        f"{name}, {scope}": s.select(MATRICES, 0.45, s.magnitude(2), unit, scope)
        for name, unit in GRANULARITIES.items()
        for scope in ("tensor", "global", "isomorphic")
    }
    whole = {
        f"{name}, all": s.select(MATRICES, 1.0, granularity=unit)
        for name, unit in GRANULARITIES.items()
    }
    kernels = {
        "kernels": s.select(CONVOLUTIONS, 0.5, granularity=s.kernels()),
        "kernels of 3": s.select("line.weight", 0.5, granularity=s.kernels(3)),
        "blocks of 4 dimensions": s.select(
            CONVOLUTIONS, 0.5, granularity=s.blocks_of([2, 3, 0, 2])
        ),
    }
    ties = {name: spec for name, spec in specs.items() if "global" in name}
    grid = all_pruned({"grid": models.grid}, ties)
    return grid | all_pruned(LAYERS, {**specs, **whole, **kernels})


def amounts() -> dict[str, Case]:
    macs = {name: 1.5 + len(name) for name in MATRICES}
    kinds = {
        "threshold": s.threshold(0.21),
        "threshold of a value": s.threshold(0.25),
        "threshold 0": s.threshold(0.0),
        "bytes": s.target_bytes(9000),
        "macs": s.target_macs(9000.0, macs),
    }
    ways: list[tuple[str, Scope]] = [
        ("element", "tensor"),
        ("element", "global"),
        ("slices 0", "global"),
    ]
    specs = {
        f"{kind}, {unit}, {scope}": s.select(
            MATRICES, amount, "magnitude", GRANULARITIES[unit], scope
        )
        for kind, amount in kinds.items()
        for unit, scope in ways
        if not (kind in ("bytes", "macs") and scope == "tensor")
    }
    table = s.table({"stem.*": 0.2, "layer?.0.*": "50%", "attn.q.weight": 1.0})
    shares = {
        "table": s.select(MATRICES, table),
        "table of slices": s.select(MATRICES, table, granularity="filters"),
        "bytes of blocks": s.select(
            "attn.*.weight", s.target_bytes(2500), "magnitude", s.blocks(4, 4), "global"
        ),
        "macs of blocks": s.select(
            "attn.*.weight",
            s.target_macs(40, {name: 1.5 for name in MATRICES if name.startswith("attn.")}),
            "magnitude",
            s.blocks(3, 0),
            "global",
        ),
        "threshold of 2:4": s.select(MATRICES, s.threshold(0.1), granularity=s.n_m(2, 4)),
        "a half is a tie": s.l1_unstructured("stem.bias", 0.3125),
    }
    steps = {
        f"step {step} of 4 by {schedule}": s.select(EVERY, 0.8, scope="global").at(
            step, 4, schedule
        )
        for step, schedule in ((1, "cubic"), (3, "linear"), (4, "cubic"))
    }
    return all_pruned(BOTH, specs) | all_pruned(LAYERS, {**shares, **steps})


def allocations() -> dict[str, Case]:
    specs = {
        f"{name}, {scope}, {amount}": s.select(MATRICES, amount, scope=scope, allocation=name)
        for name in ("rank", "uniform", "erk", "lamp")
        for scope in ("global", "isomorphic")
        for amount in (0.3, 0.9, 101)
    }
    units = {
        f"{name} of {unit}": s.select(
            MATRICES, 0.5, s.magnitude(2), GRANULARITIES[unit], "global", allocation=name
        )
        for name in ("uniform", "erk", "lamp")
        for unit in ("slices 0", "blocks 4x4")
    }
    random = {
        f"random by {name}": s.select(MATRICES, 0.5, "random", scope="global", allocation=name)
        for name in ("uniform", "erk")
    }
    few = {name: spec for name, spec in specs.items() if "global, 0.3" in name}
    return all_pruned(LAYERS, {**specs, **units, **random}) | all_pruned({"grid": models.grid}, few)


def guard_rails() -> dict[str, Case]:
    bounds = {
        "at most": s.guard_rails(max_sparsity=0.55),
        "at least": s.guard_rails(min_sparsity=0.45),
        "both": s.guard_rails(max_sparsity=0.6, min_sparsity=0.4),
        "equal": s.guard_rails(max_sparsity=0.5, min_sparsity=0.5),
        "keep at least": s.guard_rails(keep_at_least=3),
        "ends": s.guard_rails(keep_first=True, keep_last=True),
        "exclude": s.guard_rails(exclude=["attn.*", "head.weight"]),
        "each": s.guard_rails(
            max_sparsity=0.9,
            per_tensor={
                "layer*": s.rail(0.4),
                "head.weight": s.rail(0.9, 0.7),
                "attn.q.*": s.rail(keep_at_least=4),
            },
        ),
    }
    ways: list[tuple[str, Scope]] = [
        ("element", "global"),
        ("slices 0", "global"),
        ("element", "isomorphic"),
    ]
    specs = {
        f"{bound}, {unit}, {scope}": s.select(
            MATRICES, 0.5, "magnitude", GRANULARITIES[unit], scope, guard_rails=rails
        )
        for bound, rails in bounds.items()
        for unit, scope in (ways[:2] if bound == "each" else ways)  # else some rails are too narrow
    }
    allocated = {
        f"both, {name}": s.select(
            MATRICES, 0.5, scope="global", allocation=name, guard_rails=bounds["both"]
        )
        for name in ("uniform", "erk", "lamp")
    }
    others = {
        "both of a threshold": s.select(
            MATRICES, s.threshold(0.2), scope="global", guard_rails=bounds["both"]
        ),
        "bytes": s.select(
            MATRICES, s.target_bytes(11_000), scope="global", guard_rails=bounds["at most"]
        ),
        "random": s.select(MATRICES, 0.5, "random", scope="global", guard_rails=bounds["each"]),
        "of each by itself": s.select(MATRICES, 0.7, guard_rails=bounds["ends"]),
    }
    grid = {name: spec for name, spec in specs.items() if name.startswith(("both", "each"))}
    return all_pruned(LAYERS, {**specs, **allocated, **others}) | all_pruned(
        {"grid": models.grid}, grid
    )


def normalizations() -> dict[str, Case]:
    specs = {
        f"{name} of {unit}, {scope}": s.select(
            MATRICES, 0.5, s.magnitude(2), GRANULARITIES[unit], scope, normalization=name
        )
        for name in ("mean", "norm", "z_score")
        for unit in ("element", "slices 0", "blocks 4x4")
        for scope in ("global", "isomorphic")
    }
    others = {
        "z_score of each tensor": s.select(MATRICES, 0.5, normalization="z_score"),
        "z_score, a threshold": s.select(
            MATRICES, s.threshold(-0.5), scope="global", normalization="z_score"
        ),
        "mean, rails": s.select(
            MATRICES, 0.5, scope="global", normalization="mean", guard_rails={"max_sparsity": 0.6}
        ),
    }
    return all_pruned(LAYERS, {**specs, **others})


def groups() -> dict[str, Case]:
    heads = s.head_groups(
        "attn.q.weight", "attn.k.weight", "attn.v.weight", "attn.o.weight", 4, 4, 2
    )
    channels = s.group(
        "channels",
        s.member("layer1.0.conv.weight"),
        s.member("layer1.1.conv.weight", dim=1),
        s.member("layer2.0.conv.weight", dim=1, scored=False),
    )
    stem = s.group("stem", s.member("stem.weight"), s.member("norm.weight"), s.member("stem.bias"))
    picked = s.group("picked", s.member("head.weight", dim=1, indices=[5, 0, 7, 2, 9, 11], units=3))
    every = [*heads, channels, stem, picked]
    specs = {
        f"{combination}, {normalization}, {scope}": s.grouped(
            every, 0.4, 2, combination, normalization, scope
        )
        for combination in ("mean", "sum", "max")
        for normalization in (None, "mean", "z_score")
        for scope in ("global", "tensor")
    }
    others = {
        "query heads": s.grouped(s.query_head_groups("attn.q.weight", "attn.o.weight", 4, 4), 1),
        "random": s.grouped(every, 0.5, importance=s.random(9)),
        "count": s.grouped(every, 5, math.inf),
        "threshold": s.grouped(every, s.threshold(0.2)),
        "macs": s.grouped([channels], s.target_macs(20, {"channels": 2})),
        "rails": s.grouped(every, 0.5, guard_rails={"max_sparsity": 0.6, "keep_at_least": 1}),
        "scores": s.grouped(
            every, 0.5, importance_scores={"channels": models.bell(70, (16,)).numpy()}
        ),
    }
    few = {name: spec for name, spec in specs.items() if name.startswith("mean, ")}
    return all_pruned(LAYERS, specs | others) | all_pruned({"grid": models.grid}, few)


def scores() -> dict[str, Case]:
    """Uploaded scores, scales, and custom masks."""
    of_elements = {
        name: models.bell(300 + seed, models.SHAPES[name])
        for seed, name in enumerate(["head.weight", "attn.q.weight", "stem.weight"])
    }
    of_rows = {"head.weight": models.coarse(310, (10,)), "attn.q.weight": models.bell(311, (16,))}
    names = [*of_elements, "attn.k.weight"]
    specs = {
        f"{granularity}, {scope}": s.select(
            names, 0.4, s.magnitude(2), GRANULARITIES[granularity], scope, importance_scores=arrays
        )
        for granularity, arrays in (
            ("element", of_elements),
            ("slices 0", of_elements),
            ("slices 0", of_rows),
            ("2:4", of_elements),
        )
        for scope in ("tensor", "global")
    }
    # One rule each: one rule would report its masks in the order of a protobuf map, which differs
    # from process to process.
    masks = {
        f"masks of {dtype}": reduce(
            add,
            (
                s.custom_from_mask({name: models.flags(i, models.SHAPES[name], 40).to(dtype)})
                for i, name in enumerate(names)
            ),
        )
        for dtype in (torch.bool, torch.uint8, torch.float32)
    }
    bits = np.packbits(models.flags(9, (10, 24), 50).numpy(), bitorder="little")
    others = {
        "masks of bits": s.custom_from_mask({"head.weight": bits}),
        "masks, then a rule": masks["masks of torch.bool"] + s.l1_unstructured(names, 0.3),
        "scales": s.select(
            "stem.weight", 0.5, granularity="filters", scales={"stem.weight": "norm.weight"}
        ),
        "scales of a name": s.select(
            "stem.weight", 0.5, granularity="filters", scales={"stem.weight": "norm.running_var"}
        ),
        "scores of half precision": s.l1_unstructured(
            "head.weight", 0.5, {"head.weight": of_elements["head.weight"].half()}
        ),
        "scores by erk": s.select(
            names, 0.5, scope="global", allocation="erk", importance_scores=of_elements
        ),
        "scores by lamp": s.select(
            names, 0.5, scope="global", allocation="lamp", importance_scores=of_elements
        ),
    }
    return all_pruned(LAYERS, {**specs, **masks, **others})
