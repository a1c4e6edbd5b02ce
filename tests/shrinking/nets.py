"""Networks of many kinds, written by hand, small enough for float64 on a CPU."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import secateur
from tests.shrinking.sequence_nets import Cells, Encoder, GroupedQueries, Recurrent, ViT


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 4 * 4, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.sigmoid(self.conv1(x)), 2)
        x = F.max_pool2d(torch.relu(self.conv2(x)), 2)
        x = torch.tanh(self.fc1(torch.flatten(x, 1)))
        return self.fc3(F.gelu(self.fc2(x)))  # type: ignore[no-any-return]


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.bn2(self.conv2(x))
        x += identity
        return F.relu(x, inplace=True)


class ResNet(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        widths = [width << stage for stage in range(4)]
        stages = [
            nn.Sequential(BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1))
            for inputs, outputs, stride in zip([width, *widths], widths, [1, 2, 2, 2], strict=False)
        ]
        self.layers = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        return self.fc(self.avgpool(self.layers(x)).flatten(1))  # type: ignore[no-any-return]


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.is_residual = stride == 1 and inputs == outputs
        expand = [nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()]
        self.body = nn.Sequential(
            *(expand if expansion > 1 else []),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.is_residual else self.body(x)  # type: ignore[no-any-return]


class MobileNetV2(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        table = [(1, 2, 1, 1), (6, 3, 2, 2), (6, 4, 1, 2)]
        layers: list[nn.Module] = [
            nn.Conv2d(3, 2 * width, 3, 2, 1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU6(),
        ]
        inputs = 2 * width
        for expansion, factor, repeats, stride in table:
            for index in range(repeats):
                step = stride if index == 0 else 1
                layers.append(InvertedResidual(inputs, factor * width, step, expansion))
                inputs = factor * width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(inputs, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean([2, 3]))  # type: ignore[no-any-return]


def convolutions(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs), nn.SiLU())


class UNet(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.down1 = convolutions(1, width)
        self.down2 = convolutions(width, 2 * width)
        self.bottom = convolutions(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.join2 = convolutions(4 * width, 2 * width)
        self.join1 = convolutions(3 * width, width)
        self.out = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        x = self.up2(self.bottom(F.max_pool2d(second, 2)))
        x = self.join2(torch.cat([second, x], 1))
        x = F.interpolate(x, scale_factor=2, mode="bilinear")
        return self.out(self.join1(torch.cat([x, first], 1)))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """A vector to an image, with transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 12 * 4 * 4)
        self.up1 = nn.ConvTranspose2d(12, 8, 4, 2, 1)
        self.bn1 = nn.BatchNorm2d(8)
        self.depthwise = nn.ConvTranspose2d(8, 8, 3, 1, 1, groups=8)
        self.prelu = nn.PReLU(8)
        self.up2 = nn.ConvTranspose2d(8, 3, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x).unflatten(1, (-1, 4, 4))
        x = self.prelu(self.depthwise(torch.sigmoid(self.bn1(self.up1(x)))))
        return torch.tanh(self.up2(x))


class Grouped(nn.Module):
    """A ResNeXt-like block: convolutions with groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.reduce = nn.Conv2d(16, 24, 1)
        self.grouped = nn.Conv2d(24, 48, 3, padding=1, groups=6)
        self.up = nn.ConvTranspose2d(48, 24, 2, 2, groups=4)
        self.expand = nn.Conv2d(24, 16, 1)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.up(torch.sigmoid(self.grouped(F.relu(self.reduce(x)))))
        y = x + F.avg_pool2d(self.expand(y), 2)
        return self.fc(y.mean((-2, -1)))  # type: ignore[no-any-return]


class Normed(nn.Module):
    """Group and layer norms over channels that others would cut, and an instance norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3)
        self.group_norm = nn.GroupNorm(4, 12)
        self.conv2 = nn.Conv2d(12, 10, 3)
        self.instance_norm = nn.InstanceNorm2d(10, affine=True)
        self.conv3 = nn.Conv2d(10, 9, 3)
        self.fc1 = nn.Linear(9, 8)
        self.layer_norm = nn.LayerNorm(8)
        self.fc2 = nn.Linear(8, 7)
        self.fc3 = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.group_norm(self.conv1(x)))
        x = self.conv3(self.instance_norm(self.conv2(x))).amax((2, 3))
        return self.fc3(F.relu(self.fc2(self.layer_norm(self.fc1(x)))))  # type: ignore[no-any-return]


class Gates(nn.Module):
    """Squeeze and excitation, halves of channels, pixel shuffle, a padded shortcut, a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.excite = nn.Conv2d(4, 8, 1)
        self.scale = nn.Parameter(torch.randn(8, 1, 1))
        self.wide = nn.Conv2d(8, 24, 3, padding=1)
        self.shuffled = nn.Conv2d(12, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 24, 1)
        self.conv3 = nn.Conv2d(8, 12, 3, padding=1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        a, b = self.wide(x * self.scale).chunk(2, 1)
        y = F.pixel_shuffle(self.shuffled(a * torch.sigmoid(b)), 2)
        y = F.glu(self.conv2(y), 1)
        z = self.conv3(x) + F.pad(x, (0, 0, 0, 0, 2, 2))
        return self.fc(torch.flatten(y.mean((2, 3)) * z.mean((2, 3)), 1))  # type: ignore[no-any-return]


def image(channels: int, size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, size, size, dtype=torch.float64)


def tokens(length: int = 7) -> Tensor:
    return torch.randint(0, 20, (2, length))


# Name: how to make the module, how to make its input.
NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "LeNet": (LeNet, lambda: image(1, 28)),
    "ResNet-18": (ResNet, lambda: image(3, 32)),
    "MobileNetV2": (MobileNetV2, lambda: image(3, 32)),
    "U-Net": (UNet, lambda: image(1, 16)),
    "decoder": (Decoder, lambda: torch.randn(2, 8, dtype=torch.float64)),
    "LSTM": (lambda: Recurrent(nn.LSTM), tokens),
    "LSTM, 2 layers, both directions": (
        lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True),
        tokens,
    ),
    "LSTM with projection": (lambda: Recurrent(nn.LSTM, num_layers=2, proj_size=6), tokens),
    "GRU": (lambda: Recurrent(nn.GRU, num_layers=2, bias=False), tokens),
    "RNN": (lambda: Recurrent(nn.RNN), tokens),
    "cells": (Cells, lambda: torch.randn(2, 3, 4, dtype=torch.float64)),
    "ViT": (ViT, lambda: image(3, 16)),
    "TransformerEncoder": (Encoder, lambda: torch.randn(2, 5, 6, dtype=torch.float64)),
    "grouped queries": (GroupedQueries, tokens),
    "grouped queries, repeated keys": (lambda: GroupedQueries("repeat"), tokens),
    "grouped convolution": (Grouped, lambda: image(3, 8)),
    "norms": (Normed, lambda: image(3, 10)),
    "gates": (Gates, lambda: image(3, 8)),
}


def net(name: str) -> tuple[nn.Module, Tensor]:
    """Makes a network in float64 with random statistics, in evaluation, and an input of it."""
    torch.manual_seed(0)
    make, example = NETS[name]
    return prepared(make()), example()


@cache
def traced(name: str) -> tuple[nn.Module, Tensor, secateur.TracedGroups]:
    """Makes a network as `net`, and traces it once; tests change none of the three."""
    module, example = net(name)
    return module, example, secateur.groups(module, example)


def prepared(module: nn.Module) -> nn.Module:
    """Returns a module in float64 and evaluation, with other running statistics than 0 and 1."""
    for name, buffer in module.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    for parameter in module.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return module.double().eval()
