"""Folders of tiny models, for tests."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

import secateur

# One of each layout; the others are slow.
FEW = ("bert", "gpt2", "vit", "llama", "qwen3_moe", "phi3", "gemma3_text")

Capsys = pytest.CaptureFixture[str]
Folder = Callable[[str], tuple[Path, type]]


def marked(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in names]


def config_in(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    return config


def half(path: Path, *parts: str) -> secateur.Spec:
    groups = secateur.transformer_groups(path, parts)
    return secateur.grouped(groups, 0.5, scope="tensor", align=1)
