"""Networks of many kinds, written by hand, small enough for float64 on a CPU."""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


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


class Recurrent(nn.Module):
    """Tokens to a class, through a recurrent layer."""

    def __init__(self, kind: Callable[..., nn.Module], **options: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 10)
        self.rnn = kind(10, 8, batch_first=True, **options)
        width = options.get("proj_size", 8) * (2 if "bidirectional" in options else 1)
        self.fc = nn.Linear(width, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.rnn(self.embedding(tokens))
        return self.fc(hidden[:, -1])  # type: ignore[no-any-return]


class Cells(nn.Module):
    """An LSTM cell and a GRU cell, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTMCell(4, 6)
        self.gru = nn.GRUCell(6, 5)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        state, other = None, None
        for step in x.unbind(1):
            state = self.lstm(step, state)
            other = self.gru(state[0], other)
        return self.fc(other)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Attention with grouped queries, and as many heads as the weights have rows for."""

    def __init__(self, width: int, heads: int, kv_heads: int, kind: str = "sdpa") -> None:
        super().__init__()
        self.head_dim, self.kind = width // heads, kind
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, kv_heads * self.head_dim)
        self.v = nn.Linear(width, kv_heads * self.head_dim)
        self.o = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._heads(one(x)) for one in (self.q, self.k, self.v))
        q, k = rotated(q), rotated(k)
        if self.kind == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
        else:
            k, v = (self._repeated(one, q.shape[1]) for one in (k, v))
            y = (q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)).softmax(-1) @ v
        return self.o(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)

    def _repeated(self, x: Tensor, heads: int) -> Tensor:
        batch, kv_heads, length, width = x.shape
        x = x[:, :, None].expand(batch, kv_heads, heads // kv_heads, length, width)
        return x.reshape(batch, heads, length, width)


def rotated(x: Tensor) -> Tensor:
    """Rotary positions."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] / torch.arange(1, half + 1)
    angles = torch.cat([angles, angles], -1).to(x.dtype)
    return x * angles.cos() + torch.cat([-x[..., half:], x[..., :half]], -1) * angles.sin()


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Gated(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class GroupedQueries(nn.Module):
    """A Llama-like decoder, in which several query heads share a key and a value."""

    def __init__(self, kind: str = "sdpa") -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 32)
        self.norm1, self.norm2 = RMSNorm(32), RMSNorm(32)
        self.attention = Attention(32, 8, 4, kind)
        self.mlp = Gated(32, 24)
        self.head = nn.Linear(32, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(x)  # type: ignore[no-any-return]


class FusedAttention(nn.Module):
    """Queries, keys and values from one Linear."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(y.transpose(1, 2).reshape(batch, length, -1))  # type: ignore[no-any-return]


class ViT(nn.Module):
    def __init__(self, width: int = 24, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 17, width))
        self.attentions = nn.ModuleList(FusedAttention(width, 6) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 40), nn.GELU(), nn.Linear(40, width))
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        for attention, mlp, norm1, norm2 in zip(
            self.attentions, self.mlps, self.norms[::2], self.norms[1::2], strict=True
        ):
            x = x + attention(norm1(x))
            x = x + mlp(norm2(x))
        return self.head(x[:, 0])  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Layers of torch's own transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.input = nn.Linear(6, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 20, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.output = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.encoder(self.input(x)).mean(1))  # type: ignore[no-any-return]


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


def prepared(module: nn.Module) -> nn.Module:
    """Returns a module in float64 and evaluation, with other running statistics than 0 and 1."""
    for name, buffer in module.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    for parameter in module.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return module.double().eval()


class Heads(nn.Module):
    """nn.MultiheadAttention on itself, with as many heads as its weights have rows for."""

    def __init__(self, attention: nn.MultiheadAttention, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.tensors, self.head_dim = tensors, attention.head_dim
        self.batch_first, self.in_proj_bias = True, None  # which nn.TransformerEncoderLayer reads

    def forward(self, x: Tensor, *_: Tensor, **options: object) -> tuple[Tensor, None]:
        qkv = F.linear(x, self.tensors["in_proj_weight"], self.tensors["in_proj_bias"])
        q, k, v = qkv.view(*x.shape[:2], 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return F.linear(y, self.tensors["out_proj.weight"], self.tensors["out_proj.bias"]), None


def rebuilt(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Returns a copy of a module with smaller tensors, and the sizes that torch's layers need."""
    small = copy.deepcopy(module)
    for path, part in list(small.named_modules()):
        prefix = f"{path}." if path else ""
        own = {n: tensors[prefix + n] for n in part.state_dict() if prefix + n in tensors}
        if isinstance(part, nn.MultiheadAttention):
            parent, _, leaf = path.rpartition(".")
            setattr(small.get_submodule(parent), leaf, Heads(part, own))
            continue
        if isinstance(part, nn.modules.conv._ConvNd) and part.groups > 1:
            part.groups = part.groups * len(own["weight"]) // len(part.weight)
        for name, tensor in own.items():
            if name in part._parameters:
                setattr(part, name, nn.Parameter(tensor))
            elif name in part._buffers:
                setattr(part, name, tensor)
        if isinstance(part, nn.InstanceNorm2d):
            part.num_features = len(own["weight"])
        if isinstance(part, nn.RNNBase):
            part.hidden_size = own["weight_hh_l0"].shape[0] // GATES[part.mode]
            part.input_size = own["weight_ih_l0"].shape[1]
            part.proj_size = part.proj_size and own["weight_hr_l0"].shape[0]
        if isinstance(part, nn.RNNCellBase):
            part.hidden_size, part.input_size = own["weight_hh"].shape[1], own["weight_ih"].shape[1]
    return small


GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
