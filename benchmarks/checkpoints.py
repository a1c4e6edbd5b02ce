"""What is on the server already, or opened by it, beside what is uploaded with each call."""

import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

import secateur
from common import SPEC, Model, digest, make_model, running_server, timed

MILLIONS = 100
ROUNDS = 9

COLUMNS = (f"{MILLIONS} M parameters", "seconds", "beside", "ratio")


def compare() -> dict[str, Any]:
    """Medians of calls that take turns, in seconds; and the bytes of the model."""
    model = make_model(MILLIONS)
    folder = Path(tempfile.mkdtemp(prefix="secateur-bench-"))
    file = folder / "model.safetensors"
    save_file(model, file)
    try:
        with (
            running_server("--allow-path", str(folder)) as server,
            secateur.Client(server.address) as client,
        ):
            return {"bytes": file.stat().st_size, **_measure(client, model, file)}
    finally:
        shutil.rmtree(folder)


def _measure(client: secateur.Client, model: Model, file: Path) -> dict[str, float]:
    first_kept, _ = timed(lambda: _kept(client, model))
    first_upload, checkpoint = timed(lambda: client.upload(model, progress=False))
    uri = f"file://{file}"
    calls: dict[str, Callable[[], Any]] = {
        "prune, uploaded": lambda: client.prune(model, SPEC, progress=False).masks,
        "prune by handle": lambda: client.prune(checkpoint, SPEC, progress=False).masks,
        "prune and keep, by digest": lambda: _kept(client, model),
        # As bits, which is what crosses the wire: cat unpacks nothing either.
        "prune a file://, masks as bits": lambda: client.prune(uri, SPEC, progress=False),
        "report by handle": lambda: client.report(checkpoint),
        "upload again": lambda: client.delete(client.upload(model, progress=False)),
        "cat to /dev/null": lambda: _cat(file),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    masks: set[str] = set()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            took, found = timed(call)
            seconds[name].append(took)
            if isinstance(found, secateur.PruneResult):
                found = found.masks
            if isinstance(found, dict):
                masks.add(digest(found))
    assert len(masks) == 1, "a mask differs"
    medians = {name: statistics.median(took) for name, took in seconds.items()}
    return {"upload": first_upload, "prune and keep, first": first_kept, **medians}


def _kept(client: secateur.Client, model: Model) -> Any:
    """A call whose result is kept; it goes again, so that all rounds are alike."""
    result = client.prune(model, SPEC, progress=False, keep=True)
    assert result.checkpoint is not None
    client.delete(result.checkpoint)
    return result.masks


def _cat(file: Path) -> None:
    with open(os.devnull, "wb") as sink:
        subprocess.run(["cat", file], stdout=sink, check=True)


def rows(found: dict[str, Any]) -> Sequence[tuple[str, ...]]:
    """The lines of the table."""
    beside = {
        "prune by handle": "prune, uploaded",
        "prune and keep, by digest": "prune and keep, first",
        "prune a file://, masks as bits": "cat to /dev/null",
        "upload again": "upload",
    }
    lines = []
    for name, took in found.items():
        if name == "bytes":
            continue
        other = beside.get(name, "")
        ratio = f"{took / found[other]:.2f}" if other else ""
        lines.append((name, f"{took:.3f}", other, ratio))
    rate = found["bytes"] / found["report by handle"] / len(os.sched_getaffinity(0)) / 1e9
    return [*lines, ("report, GB/s a core", f"{rate:.2f}", "", "")]
