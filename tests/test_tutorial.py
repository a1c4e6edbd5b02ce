"""Each step of the tutorial leaves the module that torch.nn.utils.prune leaves, bit for bit."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor
from torch.nn import Module

from tests.conftest import RunningServer

prune: Any = torch.nn.utils.prune  # it has no types
WEIGHTS = ("conv1", "conv2", "fc1", "fc2", "fc3")


def test_the_tutorial(
    server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles, codes = sections(Path("docs/tutorial.md").read_text())
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    theirs = Module()
    for title, code in zip(titles, codes, strict=True):
        exec(code.replace("localhost:50051", server.address), names)
        theirs = by_torch(title, theirs, names["model"])
        assert bits(names["model"]) == bits(theirs), title


def sections(text: str) -> tuple[list[str], list[str]]:
    """Returns the titles of the sections that have Python, and their Python."""
    parts = [part for part in text.split("\n## ")[1:] if "```python" in part]
    codes = ["\n".join(re.findall(r"```python\n(.*?)```", part, re.DOTALL)) for part in parts]
    return [part.partition("\n")[0] for part in parts], codes


def by_torch(title: str, theirs: Module, ours: Module) -> Module:
    """Does with torch what a section of the tutorial does."""
    match title:
        case "A model":
            return copy.deepcopy(ours)
        case "Prune a weight":
            mask = ours.get_buffer("conv1.weight_mask")
            assert (mask == 0).sum() == 45
            prune.custom_from_mask(theirs.get_submodule("conv1"), "weight", mask)
        case "Prune a bias":
            prune.l1_unstructured(theirs.get_submodule("conv1"), "bias", amount=3)
        case "Prune again":
            prune.ln_structured(theirs.get_submodule("conv1"), "weight", amount=0.5, n=2, dim=0)
        case "Save the model":
            pass
        case "Make it permanent":
            for name in ("weight", "bias"):
                prune.remove(theirs.get_submodule("conv1"), name)
        case "Prune several layers":
            theirs = unpruned(ours)
            for name in WEIGHTS:
                amount = 0.2 if name.startswith("conv") else 0.4
                prune.l1_unstructured(theirs.get_submodule(name), "weight", amount=amount)
        case "Prune globally":
            theirs = unpruned(ours)
            pairs = [(theirs.get_submodule(name), "weight") for name in WEIGHTS]
            prune.global_unstructured(pairs, prune.L1Unstructured, amount=0.2)
        case "Prune by a mask of your own":
            theirs = unpruned(ours)
            mask = torch.tensor([0.0, 1.0] * 5)
            prune.custom_from_mask(theirs.get_submodule("fc3"), "bias", mask)
        case _:
            pytest.fail(f"no step of torch for {title!r}")
    return theirs


def unpruned(module: Module) -> Module:
    """Returns a module with the weights from before the pruning."""
    state = module.state_dict()
    before = {k.removesuffix("_orig"): v for k, v in state.items() if not k.endswith("_mask")}
    fresh: Module = type(module)()
    fresh.load_state_dict(before)
    return fresh


def bits(module: Module) -> dict[str, list[int]]:
    """Returns the state_dict with the bits of its values, so that 0 is not -0."""
    return {name: bits_of(tensor) for name, tensor in module.state_dict().items()}


def bits_of(tensor: Tensor) -> list[int]:
    values: list[int] = tensor.flatten().view(torch.int32).tolist()
    return values
