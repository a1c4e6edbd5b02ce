"""Pieces in the memory of this process, or of its GPU."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from secateur_server.backends import backend_for
from secateur_server.backends.protocol import Backend
from secateur_server.cut.drivers.protocol import Task
from secateur_server.runtime.context import Found, Item, RequestContext


@dataclass(frozen=True)
class Local:
    """Works in the threads of a backend."""

    backend: Backend

    @classmethod
    def on(cls, device: torch.device) -> "Local":
        """Makes the driver of tensors on a device."""
        return cls(backend_for(device))

    @property
    def threads(self) -> int:
        return self.backend.threads

    def map(
        self, context: RequestContext, task: Task[Item, Found], pieces: Iterable[Item]
    ) -> list[Found]:
        backend = self.backend
        return backend.map(context, lambda piece: task(context, backend, piece), pieces)
