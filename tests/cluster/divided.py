"""A cluster in this process, models in files, and what a server makes of them."""

import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import secateur
from secateur_server.backends import backend_for
from secateur_server.cut.drivers import Task
from secateur_server.cut.drivers.packets import pickled, work
from secateur_server.errors import RequestError
from secateur_server.runtime.context import Found, Item, RequestContext
from tests.contract.golden_digests import plain_report

INDEX = "model.safetensors.index.json"
WORK_MEMORY = 64 << 20


class InProcess:
    """Sends bytes, as Ray does, and does the tasks in this process, the last one first."""

    threads = 2

    def __init__(self) -> None:
        self.backend = backend_for(torch.device("cpu"))
        self.tasks: list[str] = []
        self.crossed: list[tuple[str, int]] = []  # the bytes of each task and its result

    def close(self) -> None:
        pass

    def map(
        self, context: RequestContext, task: Task[Item, Found], pieces: Iterable[Item]
    ) -> list[Found]:
        found = dict(self.as_finished(context, task, list(pieces)))
        return [found[index] for index in range(len(found))]

    def as_finished(
        self, context: RequestContext, task: Task[Item, Found], pieces: list[Item]
    ) -> Iterator[tuple[int, Found]]:
        self.tasks.append(getattr(task, "func", task).__name__)
        sent = [pickled((task, piece, None, WORK_MEMORY)) for piece in pieces]
        received = [work(data) for data in reversed(sent)][::-1]
        self.crossed += [
            (self.tasks[-1], len(there) + len(back))
            for there, back in zip(sent, received, strict=True)
        ]
        found = [pickle.loads(data) for data in received]
        failed = [one for one in found if isinstance(one, RequestError)]
        if failed:
            raise failed[0]
        yield from reversed(list(enumerate(found)))


def write_files(folder: Path, files: Sequence[dict[str, Tensor]]) -> str:
    """Writes files and their index. Returns the URI of the index."""
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(files):
        name = f"model-{number}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return f"{folder.as_uri()}/{INDEX}"


def split(tensors: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Deals tensors to at most so many files, none of them empty."""
    names = list(tensors)
    files = [{n: tensors[n] for n in names[i::count]} for i in range(count)]
    return [file for file in files if file]


def outcome(
    client: secateur.Client, uri: str, spec: secateur.Spec, output: Any, folder: Path, **more: Any
) -> dict[str, Any]:
    """Everything that a Prune gives, or the error."""
    prune = partial(client.prune, uri, spec, output, **more)
    return _outcome(prune, uri, output, folder)


def finalized(
    client: secateur.Client, uri: str, output: Any, folder: Path, **more: Any
) -> dict[str, Any]:
    """Everything that a Finalize gives, or the error."""
    finalize = partial(client.finalize, uri, output=output, **more)
    return _outcome(finalize, uri, output, folder)


def _outcome(call: Callable[..., Any], uri: str, output: str, folder: Path) -> dict[str, Any]:
    target = folder / output
    name = "masks.safetensors" if output == "masks" else uri.rpartition("/")[2]
    to: dict[str, Any] = {}
    if output != "none":
        target.mkdir(parents=True)
        to = {"destination": f"{target.as_uri()}/{name}"}
    try:
        result = call(**to)
    except secateur.SecateurError as error:
        assert not target.exists() or not list(target.iterdir())
        return {"error": str(error)}
    written = {path.name: path.read_bytes() for path in target.iterdir()} if to else {}
    return {
        "report": plain_report(result.report),
        "warnings": [str(w) for w in result.report.warnings],
        "digest": result.report.output_blake3,
        "written": written,
    }
