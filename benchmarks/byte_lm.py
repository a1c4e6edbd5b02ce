"""A small language model of bytes, trained on the sources of Python's standard library."""

import hashlib
import math
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

LAYERS, WIDTH, HEADS, CONTEXT = 4, 128, 4, 128
STEPS, BATCH, RATE, SEED = 700, 16, 2e-3, 0
HELD_OUT = 20  # of so many files, one is never trained on
EVALUATED = 512  # windows of held-out text


class Block(nn.Module):
    """Attention and a feed-forward network, with norms before them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """Maps (batch, context, width) to the same shape; a position sees none behind it."""
        heads = self.qkv(self.norm1(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads
        mixed = F.scaled_dot_product_attention(
            rotated(query, turns), rotated(key, turns), value, is_causal=True
        )
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        found: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return found


def angles(length: int) -> Tensor:
    """The cosines and sines of rotary positions: Su et al. 2021. (2, length, head / 2)."""
    half = WIDTH // HEADS // 2
    turns = torch.arange(length)[:, None] / 1000 ** (torch.arange(half) / half)
    return torch.stack([turns.cos(), turns.sin()])


def rotated(x: Tensor, turns: Tensor) -> Tensor:
    """Turns each pair of channels by an angle that grows with the position."""
    first, second = x.chunk(2, dim=3)
    cos, sin = turns
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=3)


class ByteLM(nn.Module):
    """A transformer that predicts the next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256)
        nn.init.normal_(self.embedding.weight, std=0.1)

    def forward(self, text: Tensor) -> Tensor:
        """Maps bytes, (batch, context), to logits, (batch, context, 256)."""
        x, turns = self.embedding(text), angles(text.shape[1])
        for block in self.blocks:
            x = block(x, turns)
        logits: Tensor = self.head(self.norm(x))
        return logits


@dataclass(frozen=True)
class Corpus:
    """Bytes, as integers of 64 bits: of the files to train on, and of the others."""

    train: Tensor
    held_out: Tensor

    def windows(self) -> Tensor:
        """Held-out windows at equal distances, (EVALUATED, CONTEXT + 1)."""
        starts = torch.linspace(0, len(self.held_out) - CONTEXT - 1, EVALUATED).long()
        return self.held_out[starts[:, None] + torch.arange(CONTEXT + 1)]


def read_corpus() -> Corpus:
    """Reads the standard library of this Python, without its tests."""
    folder = Path(sysconfig.get_path("stdlib"))
    others = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
    files = sorted(p for p in folder.rglob("*.py") if not others & set(p.relative_to(folder).parts))
    parts: tuple[list[bytes], list[bytes]] = [], []
    for index, file in enumerate(files):
        parts[index % HELD_OUT == 0].append(file.read_bytes())
    train, held_out = (
        torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8).long() for part in parts
    )
    return Corpus(train, held_out)


def trained(corpus: Corpus, cache: Path | None, is_shown: bool = True) -> ByteLM:
    """Trains the model, or reads what an earlier call trained.

    Args:
        corpus: The text.
        cache: A folder for the weights, which are named by the text and the settings.
        is_shown: Whether to print how the training proceeds.
    """
    model = ByteLM()
    path = cache and cache / f"byte-lm-{_digest(corpus)}.safetensors"
    if path and path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    torch.manual_seed(SEED)
    model = ByteLM()
    begin = time.perf_counter()
    for step, loss in enumerate(_train(model, corpus)):
        if is_shown and step % 100 == 0:
            print(f"step {step} of {STEPS}: {loss:.3f}, {time.perf_counter() - begin:.0f} s")
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), path)
    return model.eval()


def _digest(corpus: Corpus) -> str:
    settings = (LAYERS, WIDTH, HEADS, CONTEXT, STEPS, BATCH, RATE, SEED, HELD_OUT)
    hashed = hashlib.sha256(repr(settings).encode())
    hashed.update(corpus.train.to(torch.uint8).numpy().data)
    return hashed.hexdigest()[:16]


def _train(model: ByteLM, corpus: Corpus) -> Iterator[float]:
    """Trains with Adam and a learning rate that rises and falls. Yields the loss of each step."""
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.Adam(model.parameters(), RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS, pct_start=0.1)
    steps = torch.arange(CONTEXT + 1)
    for _ in range(STEPS):
        starts = torch.randint(len(corpus.train) - CONTEXT, (BATCH, 1), generator=generator)
        loss = _loss(model, corpus.train[starts + steps])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor) -> float:
    """The perplexity of a byte: e to the mean loss.

    Args:
        model: A ByteLM.
        windows: Bytes, (count, CONTEXT + 1).
    """
    losses = [_loss(model, part).item() * len(part) for part in torch.split(windows, 64)]
    return math.exp(sum(losses) / len(windows))


def _loss(model: nn.Module, windows: Tensor) -> Tensor:
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
