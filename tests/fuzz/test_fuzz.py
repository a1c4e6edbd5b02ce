"""Nearly valid inputs that hypothesis generates. `make fuzz` uses atheris, and runs for longer.

The targets themselves check what they read: see targets.py.
"""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import examples
from tests.fuzz.seeds import SEEDS
from tests.fuzz.strategies import EDITS, STRATEGIES, edited
from tests.fuzz.targets import TARGETS

targets = pytest.mark.parametrize("target", TARGETS)

# How many of the seeds of a target are accepted; the others are wrong on purpose.
VALID_SEEDS = {"safetensors_file": 15, "messages": 4, "index": 2, "spec": 16}


@targets
def test_valid_inputs_are_accepted(target: str) -> None:
    accepted = [TARGETS[target](seed) for seed in SEEDS[target]()]
    assert sum(accepted) == VALID_SEEDS[target]


# Findings of a fuzzer.
FOUND = [
    # A blank before the {, which the library accepts, against the format.
    ("safetensors_file", b"3\x00\xc3 {}"),
    # A duplicate name: the library does not see that the bytes of the first one do not fit.
    (
        "safetensors_file",
        b"*\x00\x01"
        b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,16]},'
        b'"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}\0\0',
    ),
]


@pytest.mark.parametrize(("target", "data"), FOUND)
def test_earlier_findings_are_refused(target: str, data: bytes) -> None:
    assert not TARGETS[target](data)


@targets
@examples(150)
@given(st.data())
def test_nearly_valid_inputs_are_accepted_or_refused(target: str, draw: st.DataObject) -> None:
    TARGETS[target](draw.draw(STRATEGIES[target]))


@targets
@examples(100)
@given(st.data())
def test_changed_valid_inputs_are_accepted_or_refused(target: str, draw: st.DataObject) -> None:
    seed = draw.draw(st.sampled_from(list(SEEDS[target]())))
    TARGETS[target](edited(seed, draw.draw(EDITS)))


@targets
@examples(100)
@given(st.binary(max_size=100))
def test_any_bytes_are_accepted_or_refused(target: str, data: bytes) -> None:
    TARGETS[target](data)


@pytest.fixture(scope="module")
def peaks() -> dict[str, list[int]]:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.memory"], stdout=subprocess.PIPE, check=True, timeout=300
    )
    found: dict[str, list[int]] = json.loads(ran.stdout)
    return found


BASE = 8 << 20


@pytest.mark.parametrize(
    ("factor", "kinds"),
    [
        pytest.param(1, ["a tensor"], id="data"),
        pytest.param(3, ["lists", "maps", "numbers", "entries", "deep"], id="what no header has"),
        pytest.param(9, ["texts", "a text", "a name"], id="text"),
        pytest.param(16, ["tiny tensors"], id="objects of tensors without elements"),
        pytest.param(18, ["a wide name"], id="4 bytes for every character because one needs them"),
    ],
)
def test_reading_takes_memory_in_proportion_to_the_file(
    peaks: dict[str, list[int]], factor: int, kinds: list[str]
) -> None:
    """json.loads takes up to 30 times the size of a header."""
    for kind in kinds:
        announced, taken = peaks[kind]
        assert taken < factor * announced + BASE, kind
