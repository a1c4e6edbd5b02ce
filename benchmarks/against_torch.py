"""Pruning over the wire beside torch.nn.utils.prune.global_unstructured, size by size.

Both sides prune half of the same fp32 parameters by L1, ranked over all tensors, on the CPU. What
is timed is what a caller waits for: client.prune(...).masks against a secateur-server in a process
of its own (upload, selection, masks back, unpacked), and torch's call in the caller's process.
Each side and each size has fresh processes, so that a peak of memory is its own: it is what RSS
grew to above what it was before the first timed call, with the model there and the libraries warm.
"""

import os
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

import secateur
from bounds import raw_upload
from common import (
    SPEC,
    Memory,
    Model,
    Server,
    digest,
    in_fresh_process,
    make_lenet,
    make_model,
    prune_by_torch,
    prune_over_the_wire,
    running_server,
)


@dataclass(frozen=True)
class Side:
    """What one side took: seconds of each call, peaks in bytes; BLAKE2b of the masks.

    raw_seconds: of raw uploads of as many bytes, each behind one of the calls.
    peak_of_call: the client's, before the masks are unpacked to a byte an element.
    """

    seconds: list[float]
    peak_bytes: int
    masks: str
    server_peak_bytes: int = 0
    raw_seconds: tuple[float, ...] = ()
    peak_of_call: int = 0

    @property
    def median(self) -> float:
        """The median call, in seconds."""
        return statistics.median(self.seconds)


def compare(millions: int) -> dict[str, Any]:
    """Measures both sides at one size.  Fails where the masks differ in a single bit."""
    with running_server() as server:
        wire = in_fresh_process(wire_side, millions, server)
    local = in_fresh_process(torch_side, millions)
    assert wire.masks == local.masks, f"the masks of {millions} M parameters differ"
    raw = statistics.median(wire.raw_seconds)
    return {
        "parameters": millions * 1_000_000,
        "model_bytes": millions * 4_000_000,
        "torch": asdict(local) | {"median": local.median},
        "secateur": asdict(wire) | {"median": wire.median},
        "raw_upload_median": raw,
        "torch_to_secateur": local.median / wire.median,
        "secateur_to_raw": wire.median / raw,
    }


def wire_side(millions: int, server: Server) -> Side:
    """Prunes over the wire."""
    model = make_model(millions)
    raw: list[float] = []
    as_bytes = np.ones(millions * 4_000_000, np.uint8).data
    with secateur.Client(server.address) as client, raw_upload() as upload:
        warm_up(client, model)
        ours, theirs = Memory(os.getpid()), Memory(server.pid)
        client.prune(model, SPEC, progress=False)
        peak_of_call = ours.growth()

        def both() -> tuple[float, Model]:
            raw.append(upload(as_bytes))
            return prune_over_the_wire(client, model)

        seconds, masks = repeat(both, 15)
        peaks = ours.growth(), theirs.growth()
    return Side(seconds, peaks[0], digest(masks), peaks[1], tuple(raw), peak_of_call)


def warm_up(client: secateur.Client, model: Model) -> None:
    """Has the server load, and compile, what it needs: by a small part of the model."""
    prune_over_the_wire(client, make_lenet())
    prune_over_the_wire(client, {n: w[: 1 + 200_000 // w[0].numel()] for n, w in model.items()})


def torch_side(millions: int) -> Side:
    """Prunes by torch alone."""
    model = make_model(millions)
    prune_by_torch(make_lenet())
    memory = Memory(os.getpid())
    seconds, masks = repeat(lambda: prune_by_torch(model), 15 if millions <= 1 else 5)
    return Side(seconds, memory.growth(), digest(masks))


def repeat(call: Callable[[], tuple[float, Model]], calls: int) -> tuple[list[float], Model]:
    """The seconds of calls behind one that is not counted, and the masks of the last.

    A virtual machine is slow where it touches memory that it has never touched before.
    """
    call()
    seconds = []
    for _ in range(calls):
        masks: Model = {}  # those before are freed: one call's memory counts
        took, masks = call()
        seconds.append(took)
    return seconds, masks


def row(size: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table: walls, ratios, peaks."""
    ours, theirs = size["secateur"], size["torch"]

    def peak(of: int) -> str:
        return f"{of / 1e6:,.0f} ({of / size['model_bytes']:.2f})"

    return (
        f"{size['parameters']:,}",
        f"{theirs['median']:.3f} s",
        f"{ours['median']:.3f} s",
        f"{size['torch_to_secateur']:.1f}",
        f"{size['raw_upload_median']:.3f} s",
        f"{size['secateur_to_raw']:.1f}",
        *map(peak, (theirs["peak_bytes"], ours["server_peak_bytes"])),
        *map(peak, (ours["peak_of_call"], ours["peak_bytes"])),
    )


COLUMNS = (
    *("parameters", "torch", "secateur", "ratio", "raw upload", "to raw"),
    *("torch MB", "server MB", "client MB", "with masks"),
)
