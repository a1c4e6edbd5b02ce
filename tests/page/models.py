"""Models whose pages are tested."""

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[np.float32]]

# Names that would be scripts, or end the page's data, if a page did not escape them.
HOSTILE = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>.weight",
    "<!--<script>.weight",
    "line\u2028separator\u2029.weight",
    "{{ 7 * 7 }}.weight",
    "\"quotes' & ampersands.weight",
)


def lenet() -> Arrays:
    """A LeNet with random weights."""
    random = np.random.default_rng(0)
    shapes = {
        "features.conv1": (6, 1, 5, 5),
        "features.conv2": (16, 6, 5, 5),
        "classifier.fc1": (120, 400),
        "classifier.fc2": (84, 120),
        "classifier.fc3": (10, 84),
    }
    entries = {}
    for number, (name, shape) in enumerate(shapes.items(), 1):
        scale = np.float32(1 / number)
        entries[f"{name}.weight"] = scale * random.standard_normal(shape, np.float32)
        entries[f"{name}.bias"] = random.standard_normal(shape[0], np.float32)
    return entries


def hostile() -> Arrays:
    """Tensors with hostile names."""
    return {name: np.eye(4, dtype=np.float32) for name in HOSTILE}


def layers(count: int) -> Arrays:
    """Many small tensors, ten in a layer."""
    random = np.random.default_rng(0)
    return {
        f"model.layers.{n // 10}.part{n % 10}.weight": random.standard_normal((8, 8), np.float32)
        for n in range(count)
    }
