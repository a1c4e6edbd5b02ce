"""Tasks and results as bytes, and how another process does a task."""

import io
import pickle
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from secateur_server.backends import backend_for
from secateur_server.backends.cores import on_this_thread
from secateur_server.errors import OutOfMemory, RequestError
from secateur_server.runtime.context import RequestContext
from secateur_server.runtime.memory import is_out_of_memory


def work(data: bytes) -> bytes:
    """Does a task in a process of the cluster. Returns its result, or its RequestError."""
    try:
        task, piece, seconds, work_memory = pickle.loads(data)
        context = RequestContext(
            deadline=None if seconds is None else time.monotonic() + seconds,
            work_memory=work_memory,
            scratch=Path(tempfile.gettempdir()),
        )
        with on_this_thread():
            return pickled(task(context, backend_for(torch.device("cpu")), piece))
    except RequestError as error:
        return pickled(error)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return pickled(
            OutOfMemory("call", "a task of the Ray cluster is out of memory; retry later")
        )


class _Pickler(pickle.Pickler):
    """Pickles the elements of a tensor, and not all of its storage."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return _tensor, (data, value.dtype, tuple(value.shape))


def _tensor(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.view(shape)


def pickled(value: Any) -> bytes:
    """Pickles a task with its piece, or a result."""
    into = io.BytesIO()
    _Pickler(into, pickle.HIGHEST_PROTOCOL).dump(value)
    return into.getvalue()
