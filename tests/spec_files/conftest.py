from pathlib import Path

import pytest

from tests.spec_files.rules import save_files


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The paths of the files of tests/spec_files/rules.py, by argument."""
    folder: Path = tmp_path_factory.mktemp("files")
    return save_files(folder)
