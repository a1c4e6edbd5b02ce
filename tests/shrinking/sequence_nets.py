"""Recurrent networks and transformers, written by hand."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


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
