"""Folders of tiny models."""

from pathlib import Path

import pytest

from tests.shrinking.folders import Folder
from tests.shrinking.tiny_transformers import saved


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Makes the folder of a tiny model once, and returns it with the model's class."""
    made: dict[str, tuple[Path, type]] = {}

    def make(name: str) -> tuple[Path, type]:
        if name not in made:
            path = tmp_path_factory.mktemp("model") / "model"
            made[name] = path, type(saved(name, path))
            (path / "tokenizer.json").write_text("{}")
            (path / "README.md").write_text("# Tiny\n")
        return made[name]

    return make
