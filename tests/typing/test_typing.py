"""Types that a user's type checker sees."""

import os
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, get_args

import pytest

import secateur
from secateur import forms, literals, selections, solving
from secateur.calls.measuring import PRIORS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("kind", "known"),
    [
        (literals.Allocation, selections.ALLOCATIONS),
        (literals.Combination, selections.COMBINATIONS),
        (literals.Normalization, selections.NORMALIZATIONS),
        (literals.Scope, selections.SCOPES),
        (literals.RowScope, solving._SCOPES),
        (literals.Prior, PRIORS),
        (literals.Output, forms.OUTPUTS),
        (literals.Form, forms.FORMS),
        (literals.Masked, [name for name, form in forms.FORMS.items() if form.to_masks]),
    ],
)
def test_a_type_has_the_texts_that_the_client_takes(kind: Any, known: Collection[str]) -> None:
    assert set(get_args(kind)) == set(known)


@pytest.mark.slow
def test_mypy_agrees_outside_of_this_repository(tmp_path: Path) -> None:
    """`make lint` checks the file too, with the settings of this repository."""
    shutil.copy(ROOT / "tests" / "typing" / "user.py", tmp_path)
    package = Path(str(secateur.__file__)).parents[1]
    ended = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "user.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": f"{package}:{ROOT / 'protos'}"},
        capture_output=True,
        text=True,
    )
    found = [line for line in ended.stdout.splitlines() if line.startswith("user.py")]
    assert (found, ended.stderr) == ([], "")
    assert "1 source file" in ended.stdout
