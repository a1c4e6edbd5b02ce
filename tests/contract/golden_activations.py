"""The family of rules by activations. Statistics are exact: integers over powers of two."""

from typing import Any

import numpy as np
import torch

import secateur as s
from secateur import LayerStatistics, Statistics
from tests.contract import golden_models as models
from tests.contract.golden_digests import Case, all_pruned, planned, stored
from tests.contract.golden_models import MATRICES
from tests.contract.golden_specs import GRANULARITIES, LAYERS


def statistics() -> Statistics:
    """Squares of small integers over 4, 0 among them, and one convolution of two groups."""
    layers = {}
    for seed, (name, shape) in enumerate(models.SHAPES.items()):
        inputs = shape[1] * (2 if name == "layer1.0.conv.weight" else 1)
        roots = models.raw_bits(400 + seed, (inputs,)) % np.uint64(9)
        layers[name] = LayerStatistics(4, roots.astype(np.float64) ** 2)
    return Statistics(layers)


def transposed() -> tuple[models.Tensors, Statistics]:
    """The matrices, every other one as [inputs, outputs], and their statistics."""
    layers, known = dict(models.layers()), statistics()
    found = {}
    for name in MATRICES[::2]:
        layers[name] = layers[name].transpose(0, 1).contiguous()
        layer = known[name]
        squares = layer.sum_squares[: layers[name].shape[0]]
        found[name] = LayerStatistics(layer.count, squares, input_dim=0)
    return layers, Statistics({**known, **found})


def row_dims() -> dict[str, Case]:
    """Rows along other dimensions than the first."""
    layers, known = transposed()
    by = s.activation(known)
    specs = {
        "wanda": s.wanda("*", 0.5, known),
        "ria, a count": s.ria("*", 2, known),
        "ria, then wanda": s.ria("*", 0.2, known) + s.wanda("*", 0.3, known),
        "owl": s.select("*", 0.5, by, scope="row", allocation="owl"),
        "normalized": s.select("*", 0.5, by, scope="row", normalization="mean"),
        **{
            f"{unit}, {dim}, {importance}": s.select(
                MATRICES, 0.4, importance, GRANULARITIES[unit], "row", row_dims={"*": dim}
            )
            for unit, dim in (("element", 1), ("element", -1), ("2:4", 1), ("blocks 4x4", 1))
            for importance in ("magnitude", "random")
        },
        "of all": s.l1_unstructured(MATRICES, 0.3)
        + s.select(MATRICES, 0.6, scope="row", row_dims={"*": 1}, of_all=True),
        "a table": s.select(
            MATRICES, s.table({"a*": 0.5, "*": 0.25}), scope="row", row_dims={"layer*": 1}
        ),
    }
    return all_pruned({"transposed": lambda: layers}, specs) | {
        "plan of wanda": planned(lambda: layers, specs["wanda"], [0.2, 0.5]),
        "checkpoint": stored(lambda folder: layers, specs["wanda"], specs["ria, a count"]),
    }


def activation() -> dict[str, Case]:
    """Wanda, RIA and OWL, and activations with other choices."""
    inputs = statistics()
    by, relative = s.activation(inputs), s.activation(inputs, 2, 0.5, relative=True)
    methods = {
        "wanda": s.wanda("*", 0.5, inputs),
        "wanda, a count": s.wanda("*", 3, inputs),
        "wanda, 2:4": s.wanda("*", None, inputs, n_m=(2, 4)),
        "ria": s.ria("*", 0.4, inputs),
        "ria, 2:4": s.ria("attn.*", None, inputs, n_m=(2, 4)),
        "ria, then wanda": s.ria("*", 0.2, inputs) + s.wanda("attn.*", 0.3, inputs),
        **{
            f"owl, {scope}, {amount}": s.select("*", amount, by, scope=scope, allocation="owl")
            for scope in ("row", "tensor")
            for amount in (0.3, 0.97)
        },
        "owl by magnitude": s.select(MATRICES, 0.5, scope="row", allocation="owl"),
    }
    units = {
        f"{unit}, {scope}": s.select("*", 0.45, by, GRANULARITIES[unit], scope)
        for unit in ("element", "slices 0", "slices 1", "blocks 4x4", "2:4", "1:3 along 0")
        for scope in ("tensor", "global")
    }
    choices: dict[str, Any] = {
        "threshold": {"amount": s.threshold(0.5)},
        "bytes": {"amount": s.target_bytes(9000)},
        "normalized": {"normalization": "mean"},
        "rails": {"guard_rails": {"max_sparsity": 0.6, "keep_last": True}},
        **{name: {"allocation": name} for name in ("uniform", "erk", "lamp")},
    }
    others = {
        f"{name}, {how}": s.select(
            "*", **{"amount": 0.5, "scope": "global", **given}, importance=of
        )
        for name, given in choices.items()
        for how, of in (("plain", by), ("relative", relative))
    }
    stem = s.group("stem", s.member("stem.weight"), s.member("norm.weight"), s.member("stem.bias"))
    heads = s.head_groups(
        "attn.q.weight", "attn.k.weight", "attn.v.weight", "attn.o.weight", 4, 4, 2
    )
    groups = {
        f"groups, {combination}": s.grouped(
            [*heads, stem], 0.5, combination=combination, importance=by
        )
        for combination in ("mean", "sum", "max")
    }
    few = {name: methods[name] for name in ("wanda", "ria", "wanda, 2:4")}
    half = {
        str(dtype): lambda dtype=dtype: {name: models.layers()[name].to(dtype) for name in MATRICES}
        for dtype in (torch.float64, torch.float16, torch.bfloat16)
    }
    return (
        all_pruned(LAYERS, {**methods, **units, **others, **groups})
        | all_pruned({"grid": models.grid, **half}, few)
        | {
            "plan of wanda": planned(models.layers, methods["wanda"], [0.2, 0.5]),
            "plan of global": planned(models.layers, others["normalized, plain"], [0.2, 0.5]),
            "checkpoint": stored(lambda folder: models.layers(), methods["wanda"], methods["ria"]),
        }
    )
