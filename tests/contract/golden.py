"""The golden file: digests of the results of hundreds of requests.

A change that must keep every result must keep this file. A change that intends other results writes
the file again, and its commit says which cases changed and why:

    python -m tests.contract.golden

`golden.json` maps each family to its cases, and each case to digests, which golden_digests.py
defines. No figure is rounded. Norms, sums of squares and LAMP scores are added up in an order that
depends only on the request (see norms.py and pieces.py in backends). They are the same with and
without numba, and with any number of threads.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import secateur
from tests.conftest import PATIENCE, inner_server
from tests.contract import golden_activations, golden_details, golden_sources, golden_specs
from tests.contract.golden_digests import Case, Parts

FILE = Path(__file__).with_name("golden.json")

FAMILIES: Mapping[str, Callable[[], dict[str, Case]]] = {
    make.__name__: make
    for make in (
        golden_specs.methods,
        golden_specs.norms,
        golden_specs.granularities,
        golden_specs.amounts,
        golden_specs.allocations,
        golden_specs.guard_rails,
        golden_specs.normalizations,
        golden_specs.groups,
        golden_specs.scores,
        golden_activations.activation,
        golden_activations.row_dims,
        golden_details.details,
        golden_sources.dtypes,
        golden_sources.priors,
        golden_sources.many,
        golden_sources.mixed,
        golden_sources.alike,
        golden_sources.shrunk,
        golden_sources.crowds,
        golden_sources.medium,
        golden_sources.pieces,
        golden_sources.large,
        golden_sources.edges,
        golden_sources.outputs,
        golden_sources.packed,
        golden_sources.plans,
        golden_sources.crepe,
        golden_sources.checkpoints,
        golden_sources.uris,
    )
}

Digests = dict[str, Parts]


def digests_of(family: str, client: secateur.Client, folder: Path) -> Digests:
    """Computes the digests of a family.

    Args:
        family: A key of FAMILIES.
        client: For the family `uris` its server must be allowed to read and write `folder`.
        folder: An empty folder.
    """
    found: Digests = {}
    for number, (name, case) in enumerate(FAMILIES[family]().items()):
        own = folder / str(number)
        own.mkdir()
        try:
            found[name] = case(client, own)
        except Exception as error:
            error.add_note(f"in the case {name!r} of {family}")
            raise
    return found


def read() -> dict[str, Digests]:
    golden: dict[str, Digests] = json.loads(FILE.read_text())
    return golden


def write() -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        inner_server("--allow-path", folder) as server,
        secateur.Client(server.address, timeout=PATIENCE) as client,
    ):
        found = {}
        for family in FAMILIES:
            own = Path(folder) / family
            own.mkdir()
            found[family] = digests_of(family, client, own)
            print(f"{family}: {len(found[family])} cases", file=sys.stderr)
    FILE.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    write()
