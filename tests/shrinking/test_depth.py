"""Whole layers removed from a state_dict, and the others numbered anew."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.nn import Linear, Module, ModuleList

import secateur


class Stack(Module):
    """One or two lists of layers, the first in another module."""

    def __init__(self, layers: int, others: int = 0) -> None:
        super().__init__()
        self.first = Linear(3, 3)
        self.inside = Module()
        self.inside.layers = ModuleList(Linear(3, 3) for _ in range(layers))
        if others:
            self.others = ModuleList(Linear(3, 3) for _ in range(others))


@given(st.integers(2, 12), st.data())
def test_the_rest_is_what_torch_has_after_a_deletion(layers: int, data: st.DataObject) -> None:
    removed = data.draw(st.sets(st.integers(0, layers - 1), max_size=layers - 1))
    module = Stack(layers, others=2)
    shorter = secateur.depth(module, removed, stack="inside.layers")
    for layer in sorted(removed, reverse=True):
        stack = module.get_submodule("inside.layers")
        assert isinstance(stack, ModuleList)
        del stack[layer]
    expected = module.state_dict()
    assert list(shorter) == list(expected)
    assert all(torch.equal(shorter[name], expected[name]) for name in expected)


def test_the_only_stack_needs_no_name() -> None:
    shorter = secateur.depth(Stack(3), [1])
    assert [name for name in shorter if name.endswith("weight")] == [
        "first.weight",
        "inside.layers.0.weight",
        "inside.layers.1.weight",
    ]


def test_arrays_pairs_and_other_entries_are_renamed() -> None:
    source = {
        "layers.0.weight": np.zeros((2, 2), np.float32),
        "layers.1.weight_orig": np.ones((2, 2), np.float32),
        "layers.1.weight_mask": np.eye(2, dtype=np.float32),
        "layers.1.10.weight": np.full(3, 2.0),
        "layersless": np.full(3, 3.0),
    }
    shorter = secateur.depth(source, [0])
    assert {name: value.tolist() for name, value in shorter.items()} == {
        "layers.0.weight_orig": [[1, 1], [1, 1]],
        "layers.0.weight_mask": [[1, 0], [0, 1]],
        "layers.0.10.weight": [2, 2, 2],
        "layersless": [3, 3, 3],
    }


@pytest.mark.parametrize("removed", [0, 1])
def test_a_tensor_shared_by_two_layers_survives_in_the_other(removed: int) -> None:
    weight = torch.ones(2, 2)
    source = {"head": weight, "l.0.a": weight, "l.0.b": torch.zeros(1), "l.1.b": weight}
    shorter = secateur.depth(source, [removed])
    names = ["head", "l.0.b"] if removed == 0 else ["head", "l.0.a", "l.0.b"]
    assert list(shorter) == names
    assert torch.equal(shorter["head"], weight)
    last = shorter["l.0.b" if removed == 0 else "l.0.a"]
    assert last is shorter["head"]


def test_the_first_name_of_a_shared_tensor_may_be_removed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"l.0.w": torch.ones(2), "l.1.b": torch.zeros(1)}, path, {"l.1.w": "l.0.w"})
    shorter = secateur.depth(path, [0])
    assert {name: value.tolist() for name, value in shorter.items()} == {
        "l.0.b": [0],
        "l.0.w": [1, 1],
    }


WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "two stacks": (Stack(2, 2), {"layers": [0]}, "these lists of layers: inside.layers, others"),
    "no stack": ({"weight": np.ones(2)}, {"layers": [0]}, "these lists of layers: none"),
    "no such stack": (
        Stack(2),
        {"layers": [0], "stack": "inside.layer"},
        "no tensor has a name such as 'inside.layer.0.weight'",
    ),
    "no such layer": (Stack(2), {"layers": [2]}, r"layers: 2 is outside \[0, 2\)"),
    "all layers": (Stack(2), {"layers": [0, 1]}, "layers: all 2 layers of inside.layers"),
    "not a list": (Stack(2), {"layers": "01"}, "layers: '01' is not a list of ints"),
    "negative": (Stack(2), {"layers": [-1]}, r"layers\[0\]: -1 is not an int"),
    "a URI": ("file:///m.safetensors", {"layers": [0]}, "source: the model is on the server"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    source, arguments, message = WRONG[case]
    with pytest.raises(secateur.InvalidSpec, match=message):
        secateur.depth(source, **arguments)
