"""Valid rules in plain data, of every method and choice."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

import secateur

Plain = dict[str, Any]

TENSORS = {
    "conv.weight": np.random.default_rng(0).standard_normal((8, 4, 3, 3), np.float32),
    "0.weight": np.random.default_rng(1).standard_normal((8, 16), np.float32),
    "0.bias": np.ones(8, np.float32),
    "2.weight": np.random.default_rng(2).standard_normal((4, 8), np.float32),
}


def save_files(folder: Path) -> dict[str, str]:
    """Writes the files that rules refer to. Returns their paths by argument."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    batches = [torch.randn(64, 16)]
    secateur.calibrate(module, batches, gram=True).save(folder / "statistics.safetensors")
    save_file({"0.weight": TENSORS["0.weight"] > 0}, folder / "masks.safetensors")
    save_file({"0.weight": TENSORS["0.weight"] ** 2}, folder / "importance_scores.safetensors")
    names = ("statistics", "masks", "importance_scores")
    return {name: str(folder / f"{name}.safetensors") for name in names}


def valid_rules(files: dict[str, str]) -> list[Plain]:
    statistics = {"statistics": files["statistics"]}
    scores = {"importance_scores": files["importance_scores"]}
    select = {"method": "select", "tensors": ["0.weight", "2.*t"], "amount": 0.5}
    members = [
        {"tensor": "0.weight", "offset": 0, "stride": 2, "units": 4},
        {"tensor": "0.bias", "scored": False, "masked": False, "stride": 2},
        {"tensor": "2.weight", "dim": 1, "indices": [0, 1, 2, 3, 4, 5, 6, 7], "units": 4},
    ]
    grouped = {"method": "grouped", "groups": [{"name": "g", "members": members}], "amount": 1}
    rails = {
        **{"max_sparsity": 0.9, "min_sparsity": "1%", "keep_at_least": 1, "keep_last": True},
        **{"keep_first": False, "exclude": "0.bias", "per_tensor": {"2.*": {"keep_at_least": 3}}},
    }
    macs = {"target": 30.5, "per_unit": {"0.weight": 0.5}}
    return [
        {"method": "identity", "tensors": "*.weight"},
        {"method": "l1_unstructured", "tensors": "0.weight", "amount": "50%", **scores},
        {"method": "random_unstructured", "tensors": "*", "amount": 3, "seed": 7},
        {"method": "ln_structured", "tensors": "*.weight", "amount": 2, "n": "fro", "dim": -1},
        {"method": "random_structured", "tensors": "*.weight", "amount": 0.25, "dim": 0},
        {"method": "global_unstructured", "tensors": "*", "amount": 0.5, "importance": "random"},
        {"method": "custom_from_mask", "masks": files["masks"]},
        {"method": "n_m_structured", "tensors": "2.weight", "n": 1, "m": 2, "dim": 0},
        {"method": "block_structured", "tensors": "0.*t", "amount": 1, "rows": 2, "cols": 0},
        {"method": "global_structured", "tensors": "*.weight", "amount": 3, "n": 2, "dim": 0},
        {"method": "lamp", "tensors": "*", "amount": 0.5},
        {"method": "erk", "tensors": ["*.weight"], "amount": 0.5},
        {"method": "wanda", "tensors": "*", "amount": 0.5, **statistics},
        {"method": "wanda", "tensors": "*", "n_m": [2, 4], **statistics},
        {"method": "ria", "tensors": "0.weight", "amount": 2, "power": 0.25, **statistics},
        {"method": "refit", "tensors": "*", "damping": 0.5, **statistics},
        {"method": "sparsegpt", "tensors": "*", "amount": 0.5, "block_size": 4, **statistics},
        {"method": "sparsegpt", "tensors": "*", "n_m": [2, 4], "damping": 1, **statistics},
        {"method": "alps", "tensors": "*", "amount": 1, "scope": "row", **statistics},
        {**select, "importance": "random", "granularity": "filters", "scope": "global"},
        {**select, "importance": {"random": {"seed": 3}}, "granularity": {"slices": {"dim": 1}}},
        {**select, "importance": {"magnitude": {"p": 2.5}}, "granularity": "columns"},
        {**select, "importance": {"magnitude": {}}, "granularity": {"heads": {"head_dim": 2}}},
        {
            **{**select, "importance": {"activation": {**statistics, "p": 2, "power": 0.5}}},
            **{"scope": "row", "allocation": "owl", "row_dims": {"0.*": 1}},
        },
        {**select, "tensors": "conv.weight", "granularity": {"kernels": {"dims": 4}}},
        {**select, "granularity": {"blocks_of": {"shape": [2, 0]}}, "normalization": "mean"},
        {**select, "granularity": {"n_m": {"n": 1}}, "of_all": True, "allocation": None},
        {**select, "amount": {"threshold": {"value": 0.25}}, "guard_rails": rails},
        {**select, "amount": {"target_bytes": {"n": "1.5kB"}}, "scope": "global"},
        {**select, "tensors": "0.weight", "amount": {"target_macs": macs}, **scores},
        {**select, "amount": {"table": {"fractions": {"0.*": "10%", "*": 0.75}}}},
        {
            **select,
            "granularity": "filters",
            "tensors": "0.weight",
            "scales": {"0.weight": "0.bias"},
        },
        {**grouped, "p": 2, "combination": "max", "align": 2, "scope": "tensor"},
        {**grouped, "importance": {"random": {}}, "normalization": None, "guard_rails": None},
    ]
