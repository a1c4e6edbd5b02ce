"""Results are those of the golden file: see tests/contract/golden.py."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import secateur
from tests.conftest import PATIENCE, inner_server, start_command, stop_server
from tests.contract.golden import FAMILIES, Digests, digests_of, read


def differences(expected: Digests, found: Digests) -> Iterator[str]:
    """Yields the differences: cases of only one side, and parts of a case."""
    for name in sorted(expected.keys() ^ found.keys()):
        yield f"{name!r} is only {'expected' if name in expected else 'found'}"
    for name in sorted(expected.keys() & found.keys()):
        before, after = expected[name], found[name]
        for part in sorted(before.keys() | after.keys()):
            if before.get(part) != after.get(part):
                yield f"{name!r}: {part} is {after.get(part)}, and was {before.get(part)}"


@pytest.fixture
def opening(tmp_path: Path) -> Iterator[secateur.Client]:
    """A client of a server that may open files in the folder of the test."""
    with (
        inner_server("--allow-path", str(tmp_path)) as server,
        secateur.Client(server.address, timeout=PATIENCE) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def without_numba() -> Iterator[secateur.Client]:
    """A client of a server that uses only torch's operations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUMBA_DISABLE_JIT", "1")
        server = start_command("--max-model-bytes", "1GiB")
    with secateur.Client(server.address, timeout=PATIENCE) as client:
        yield client
    stop_server(server)


def check(family: str, client: secateur.Client, folder: Path) -> None:
    found = list(differences(read()[family], digests_of(family, client, folder)))
    assert not found, "\n".join([f"{len(found)} differences in {family}:", *found])


def test_every_family_is_in_the_file() -> None:
    assert read().keys() == FAMILIES.keys()


families = pytest.mark.parametrize("family", [name for name in FAMILIES if name != "uris"])


@families
def test_results_are_golden(client: secateur.Client, tmp_path: Path, family: str) -> None:
    check(family, client, tmp_path)


def test_results_of_files_of_the_server_are_golden(
    opening: secateur.Client, tmp_path: Path
) -> None:
    check("uris", opening, tmp_path)


@pytest.mark.slow
@families
def test_results_are_golden_without_numba(
    without_numba: secateur.Client, tmp_path: Path, family: str
) -> None:
    check(family, without_numba, tmp_path)
