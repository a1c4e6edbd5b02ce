"""Tasks that lose their process, or take long."""

import os
import signal
import threading
from pathlib import Path

import torch

from secateur_server.backends.protocol import Backend
from secateur_server.errors import NanScores, QueueFull
from secateur_server.runtime.context import RequestContext


def square(context: RequestContext, backend: Backend, number: int) -> int:
    return number * number


def fail(context: RequestContext, backend: Backend, number: int) -> int:
    """Fails for odd numbers, the higher ones first."""
    if number % 2:
        threading.Event().wait((10 - number) / 10)
        raise NanScores("data", f"piece {number}")
    return number


def refuse(context: RequestContext, backend: Backend, number: int) -> int:
    raise QueueFull("call", "full", 7.0)


def run_out(context: RequestContext, backend: Backend, number: int) -> int:
    """Allocates more than there is, in Python or in torch."""
    return len(b"\0" * (1 << 55)) if number else len(torch.empty(1 << 55, dtype=torch.uint8))


def die_first(context: RequestContext, backend: Backend, folder: Path) -> int:
    """Kills its process the first time."""
    return _die(folder, 1)


def die_always(context: RequestContext, backend: Backend, folder: Path) -> int:
    return _die(folder, 100)


def _die(folder: Path, times: int) -> int:
    deaths = len(list(folder.iterdir()))
    if deaths < times:
        (folder / str(os.getpid())).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return deaths


def hang(context: RequestContext, backend: Backend, folder: Path) -> None:
    """Notes its process, and takes an hour, in which it can be interrupted."""
    mine = folder / str(os.getpid())
    mine.touch()
    try:
        while True:
            context.check()
            threading.Event().wait(0.02)
    finally:
        mine.unlink()


def hang_deeply(context: RequestContext, backend: Backend, folder: Path) -> None:
    """Notes its process, and takes an hour, in which only the end of its process ends it."""
    (folder / str(os.getpid())).touch()
    threading.Event().wait(3600)


def hang_at(context: RequestContext, backend: Backend, piece: tuple[Path, str]) -> str:
    """Takes an hour on one node, and names any other. On these it waits until the one is busy."""
    import ray

    folder, wanted = piece
    node = str(ray.get_runtime_context().get_node_id())
    if node == wanted:
        (folder / node).touch()
        threading.Event().wait(3600)
    while not (folder / wanted).exists():
        threading.Event().wait(0.05)
    return node
