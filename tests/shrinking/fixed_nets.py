"""Networks whose forward has sizes that do not change when their layers get smaller."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class NanoAttention(nn.Module):
    """As in nanoGPT: splits and reshapes by the width of its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.n_head, self.n_embd = heads, width

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.size()
        parts = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (
            one.view(batch, time, self.n_head, width // self.n_head).transpose(1, 2)
            for one in parts
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).contiguous().view(batch, time, width)
        return self.c_proj(y)  # type: ignore[no-any-return]


class TimmAttention(nn.Module):
    """As in older versions of timm: reshapes to the width of its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.num_heads, self.head_dim = heads, width // heads

    def forward(self, x: Tensor) -> Tensor:
        batch, n, width = x.shape
        qkv = self.qkv(x).reshape(batch, n, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(batch, n, width))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, attention: type[nn.Module]) -> None:
        super().__init__()
        self.attention = attention(16, 4)
        self.mlp = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.norm(x))  # type: ignore[no-any-return]


class Flattened(nn.Module):
    """Flattens to a size that is written as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3)
        self.fc = nn.Linear(16 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(x)))
        return self.fc(y.view(-1, 16 * 36))  # type: ignore[no-any-return]


class Stateful(nn.Module):
    """Makes the first state of its GRU with a size that is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.h = 12
        self.rnn = nn.GRU(6, self.h, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(self.h, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.zeros(1, len(x), self.h, dtype=x.dtype)
        return self.fc2(torch.relu(self.fc1(self.rnn(x, first)[0])))  # type: ignore[no-any-return]


# The network, example inputs, the tensor whose group does not fit, and the groups that do.
FIXED: dict[str, tuple[Any, Tensor, str, list[str]]] = {
    "nanoGPT": (
        lambda: Block(NanoAttention),
        torch.randn(2, 5, 16),
        "attention.c_attn.weight",
        ["mlp.0.weight"],
    ),
    "timm": (
        lambda: Block(TimmAttention),
        torch.randn(2, 5, 16),
        "attention.qkv.weight",
        ["mlp.0.weight"],
    ),
    "flattened": (Flattened, torch.randn(2, 3, 10, 10), "conv2.weight", ["conv1.weight"]),
    "stateful": (Stateful, torch.randn(2, 5, 6), "rnn.weight_ih_l0", ["fc1.weight"]),
}
