"""Networks by hand, with the groups of their units."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import secateur
from tests.client.net import Net, inputs, norm, outputs, weights
from tests.client.nets_recurrent import cells, gru, lstm


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 2)
        x = functional.max_pool2d(functional.relu(self.conv2(x)), 2).flatten(1)
        out: Tensor = self.fc3(functional.relu(self.fc2(functional.relu(self.fc1(x)))))
        return out


def lenet() -> Net:
    groups = [
        secateur.group("conv1", *outputs("conv1"), *inputs("conv2")),
        secateur.group("conv2", *outputs("conv2"), *inputs("fc1", stride=25)),
        secateur.group("fc1", *outputs("fc1"), *inputs("fc2")),
        secateur.group("fc2", *outputs("fc2"), *inputs("fc3")),
    ]
    return Net(LeNet(), groups, torch.randn(2, 1, 28, 28))


def conv_bn(before: int, after: int, size: int, **options: Any) -> nn.Sequential:
    conv = nn.Conv2d(before, after, size, bias=False, padding=size // 2, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(after))


class Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.one, self.two = conv_bn(before, after, 3, stride=stride), conv_bn(after, after, 3)
        self.down = conv_bn(before, after, 1, stride=stride) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        short = x if self.down is None else self.down(x)
        return functional.relu(self.two(functional.relu(self.one(x))) + short)


class ResNet18(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = conv_bn(3, width, 3)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.blocks = nn.Sequential()
        for stage, (before, after) in enumerate(pairwise(widths)):
            self.blocks.append(Block(before, after, 1 if stage == 0 else 2))
            self.blocks.append(Block(after, after, 1))
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(functional.relu(self.stem(x))).mean((2, 3)))
        return out


def resnet18() -> Net:
    groups = []
    for stage in range(4):
        first, second = f"blocks.{2 * stage}", f"blocks.{2 * stage + 1}"
        for block in (first, second):
            one = [*weights(f"{block}.one.0"), *norm(f"{block}.one.1"), *inputs(f"{block}.two.0")]
            groups.append(secateur.group(block, *one))
        makers = ["stem" if stage == 0 else f"{first}.down", f"{first}.two", f"{second}.two"]
        after = f"blocks.{2 * stage + 2}"
        readers = [f"{after}.one.0", f"{after}.down.0"] if stage < 3 else ["head"]
        readers += [f"{second}.one.0"] + ([f"{first}.one.0"] if stage == 0 else [])
        members = weights(*(f"{maker}.0" for maker in makers)) + inputs(*readers)
        members += [member for maker in makers for member in norm(f"{maker}.1")]
        groups.append(secateur.group(f"stage {stage}", *members))
    return Net(ResNet18(8), groups, torch.randn(2, 3, 16, 16))


class Inverted(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        inner = 4 * before
        self.expand = conv_bn(before, inner, 1)
        self.depth = conv_bn(inner, inner, 3, stride=stride, groups=inner)
        self.project = conv_bn(inner, after, 1)
        self.adds = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu6(self.depth(functional.relu6(self.expand(x))))
        out: Tensor = self.project(y)
        return x + out if self.adds else out


class MobileNetV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = conv_bn(3, 8, 3, stride=2), conv_bn(16, 32, 1)
        blocks = [(8, 8, 1), (8, 12, 2), (12, 12, 1), (12, 16, 2), (16, 16, 1)]
        self.blocks = nn.Sequential(*(Inverted(*block) for block in blocks))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu6(self.last(self.blocks(functional.relu6(self.stem(x)))))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def mobilenet_v2() -> Net:
    groups = []
    for number in range(5):
        block = f"blocks.{number}"
        members = weights(f"{block}.expand.0", f"{block}.depth.0") + inputs(f"{block}.project.0")
        members += norm(f"{block}.expand.1") + norm(f"{block}.depth.1")
        groups.append(secateur.group(block, *members))
    last = [*weights("last.0"), *norm("last.1"), *inputs("head")]
    makers = ["blocks.1.project", "blocks.2.project"]
    stream = weights(*(f"{maker}.0" for maker in makers))
    stream += [member for maker in makers for member in norm(f"{maker}.1")]
    stream += inputs("blocks.2.expand.0", "blocks.3.expand.0")
    groups += [secateur.group("last", *last), secateur.group("stream", *stream)]
    return Net(MobileNetV2(), groups, torch.randn(2, 3, 32, 32))


class UNet(nn.Module):
    """Two levels; the way down is concatenated before the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.up = nn.ConvTranspose2d(12, 10, 2, stride=2)
        self.join, self.out = nn.Conv2d(18, 6, 3, padding=1), nn.Conv2d(6, 2, 1)
        self.act = nn.PReLU(8)

    def forward(self, x: Tensor) -> Tensor:
        high = self.act(self.down1(x))
        low = functional.gelu(self.down2(functional.max_pool2d(high, 2)))
        x = torch.cat([functional.elu(self.up(low)), high], 1)
        out: Tensor = self.out(functional.silu(self.join(x)))
        return out


def unet() -> Net:
    up = [secateur.member("up.weight", dim=1), secateur.member("up.bias")]
    groups = [
        secateur.group(
            "down1",
            *outputs("down1"),
            secateur.member("act.weight", masked=False),
            *inputs("down2"),
            *inputs("join", offset=10, units=8),
        ),
        secateur.group("down2", *outputs("down2"), secateur.member("up.weight", dim=0)),
        secateur.group("up", *up, *inputs("join", units=10)),
        secateur.group("join", *outputs("join"), *inputs("out")),
    ]
    return Net(UNet(), groups, torch.randn(2, 3, 8, 8))


def decoder() -> Net:
    """Transposed convolutions, one depthwise and one in two groups, with a group norm."""
    module = nn.Sequential(
        nn.Linear(5, 12),
        nn.Unflatten(1, (12, 1)),
        nn.ConvTranspose1d(12, 8, 4),
        nn.Tanh(),
        nn.ConvTranspose1d(8, 8, 3, stride=2, groups=8),
        nn.GroupNorm(4, 8),
        nn.Sigmoid(),
        nn.ConvTranspose1d(8, 6, 3, groups=2),
        nn.InstanceNorm1d(6, affine=True),
        nn.ConvTranspose1d(6, 3, 3),
    )
    halves = [0, 1, 4, 5, 2, 3, 6, 7]
    groups = [
        secateur.group("0", *outputs("0"), *weights("2")),
        # A unit is a half of each group of layer 7, and two whole groups of the norm.
        secateur.group(
            "2",
            secateur.member("2.weight", 1, indices=halves, units=2),
            *(
                secateur.member(name, indices=halves, units=2)
                for name in ("2.bias", "4.weight", "4.bias", "5.weight", "5.bias", "7.weight")
            ),
        ),
        secateur.group(
            "7",
            secateur.member("7.weight", 1),
            *(
                secateur.member(name, indices=[0, 3, 1, 4, 2, 5], units=3)
                for name in ("7.bias", "8.weight", "8.bias", "9.weight")
            ),
        ),
    ]
    return Net(module, groups, torch.randn(2, 5))


def encoder() -> Net:
    """torch's own transformer layer; the heads of its attention cannot be cut."""
    module = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
    )
    groups = [
        secateur.group(str(n), *outputs(f"layers.{n}.linear1"), *inputs(f"layers.{n}.linear2"))
        for n in range(2)
    ]
    return Net(module, groups, torch.randn(2, 5, 8))


NETS: dict[str, Callable[[], Net]] = {
    made.__name__: made
    for made in (lenet, resnet18, mobilenet_v2, unet, decoder, lstm, gru, cells, encoder)
}
