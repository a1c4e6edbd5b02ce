"""The models of benchmarks/quality.py: what is pruned, and how good they are.

Nothing that is calibrated on is measured on.
"""

import ast
import random
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import byte_lm
import nets
from examples.demo import LeNet, accuracy, read_digits, train

TOKENS = 8192  # of calibration, for models of text
IMAGES = 1024  # of calibration
LONGEST = 128  # tokens of a text
TEXTS = 128  # that sentence embeddings are measured on
SEEDS = (0, 1, 2)  # of networks that read digits


@dataclass(frozen=True)
class Case:
    """A trained model.

    Attributes:
        name: Of the model.
        figure: What `measure` returns.
        module: In evaluation.
        tensors: The names of what is pruned.
        patterns: The names of what is pruned 2:4.
        batches: What it is calibrated on.
        measure: How good a module is.
    """

    name: str
    figure: str
    module: nn.Module
    tensors: Sequence[str]
    patterns: Sequence[str]
    batches: Sequence[Any]
    measure: Callable[[nn.Module], float]


def language_model(cache: Path | None) -> Case:
    """The language model of bytes. Embeddings, norms and the head are not pruned.

    Args:
        cache: See `byte_lm.trained`.
    """
    corpus = byte_lm.read_corpus()
    length = byte_lm.CONTEXT
    starts = torch.linspace(0, len(corpus.train) - length, TOKENS // length).long()
    windows = corpus.train[starts[:, None] + torch.arange(length)]
    held_out = corpus.windows()
    module = byte_lm.trained(corpus, cache)
    names = matrices(module, "blocks.")
    return Case(
        name="byte LM",
        figure="perplexity of a byte",
        module=module,
        tensors=names,
        patterns=names,
        batches=torch.split(windows, 16),
        measure=lambda module: byte_lm.perplexity(module, held_out),
    )


def sentence_encoder() -> Case:
    """MiniLM, on docstrings. Embeddings, norms and the pooler are not pruned."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(nets.minilm_folder())

    def tokens(texts: Sequence[str]) -> Any:
        return tokenizer(
            list(texts), padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
        )

    texts = list(docstrings())
    held_out = [tokens(part) for part in _parts(texts[::8][:TEXTS], 16)]
    others = [text for index, text in enumerate(texts) if index % 8]
    random.Random(0).shuffle(others)  # neighbours are of one file
    module = nets.minilm().eval()
    names = matrices(module, "encoder.layer.")
    expected = [embeddings(module, batch) for batch in held_out]

    def cosine(pruned: nn.Module) -> float:
        found = [embeddings(pruned, batch) for batch in held_out]
        pairs = zip(found, expected, strict=True)
        return float(torch.cat([F.cosine_similarity(*pair) for pair in pairs]).mean())

    return Case(
        name="MiniLM",
        figure="cosine with the unpruned embeddings",
        module=module,
        tensors=names,
        patterns=names,
        batches=list(_calibration(iter(others), tokens)),
        measure=cosine,
    )


def matrices(module: nn.Module, prefix: str) -> list[str]:
    """The names of the weights of linear layers."""
    return [
        f"{name}.weight"
        for name, part in module.named_modules()
        if name.startswith(prefix) and isinstance(part, nn.Linear)
    ]


def _parts(texts: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(texts), size):
        yield texts[start : start + size]


def _calibration(texts: Iterator[str], tokens: Callable[[Sequence[str]], Any]) -> Iterator[Any]:
    """Batches of TOKENS tokens and a few more."""
    count = 0
    while count < TOKENS:
        batch = tokens(list(islice(texts, 16)))
        count += int(batch["attention_mask"].sum())
        yield batch


@torch.no_grad()
def embeddings(module: nn.Module, batch: Any) -> Tensor:
    """The mean of the hidden states of each text's tokens, (texts, width)."""
    hidden = module(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(2)
    found: Tensor = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
    return found


def docstrings() -> Iterator[str]:
    """The docstrings of the standard library with at least 100 characters, in a fixed order."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, kinds) and len(text := ast.get_docstring(node) or "") >= 100:
                yield text


def digit_readers() -> list[Case]:
    """LeNets of several seeds. The last layer is not pruned.

    2 of 4 inputs are kept in linear layers only: 4 does not divide the inputs of the convolutions.
    """
    return [_digit_reader(seed) for seed in SEEDS]


@contextmanager
def one_thread() -> Iterator[None]:
    """More threads only slow down a network as small as a LeNet."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _digit_reader(seed: int) -> Case:
    digits = read_digits()
    torch.manual_seed(seed)
    module = LeNet()
    with one_thread():
        train(module, digits, epochs=10)
    return Case(
        name="LeNet",
        figure="accuracy",
        module=module.eval(),
        tensors=["conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"],
        patterns=["fc1.weight", "fc2.weight"],
        batches=torch.split(digits.train_images[:IMAGES], 256),
        measure=lambda pruned: accuracy(pruned, digits),
    )
