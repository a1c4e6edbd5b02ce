"""The passes on a GPU: torch's operations, fed from pinned memory on a side stream."""

import numpy as np
import torch
from torch import Tensor

from secateur_server.backends.protocol import Backend

# Bytes of a staging buffer, and how many: what is copied while the next bytes arrive.
STAGE_BYTES, STAGES = 4 << 20, 4


class CudaBackend(Backend):
    """Selection, masks and their bits stay on the device; what it sends back are bits."""

    # A launch takes as long as millions of elements do; the temporaries of a piece are up to 32
    # bytes for each.
    piece = ranked = 1 << 24

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._side: torch.cuda.Stream | None = None
        self._stages: list[tuple[Tensor, torch.cuda.Event]] = []

    def receive(self, data: memoryview, target: Tensor) -> None:
        """As Backend.land: by way of pinned memory, while the host goes on."""
        with torch.cuda.device(self.device):
            if self._side is None:
                self._side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            # What used the memory of `target` before has to have ended.
            self._side.wait_stream(torch.cuda.current_stream())
            for begin in range(0, len(data), STAGE_BYTES):
                part = data[begin : begin + STAGE_BYTES]
                self._copy(part, target[begin : begin + len(part)], self._side)
            torch.cuda.current_stream().wait_stream(self._side)

    def _copy(self, data: memoryview, target: Tensor, side: torch.cuda.Stream) -> None:
        if len(self._stages) < STAGES:
            pinned = torch.empty(STAGE_BYTES, dtype=torch.uint8, pin_memory=True)
            stage, done = pinned, torch.cuda.Event()  # type: ignore[no-untyped-call]
        else:
            stage, done = self._stages.pop(0)
            done.synchronize()  # it may still be read from
        np.copyto(stage.numpy()[: len(data)], np.frombuffer(data, np.uint8))
        with torch.cuda.stream(side):
            target.copy_(stage[: len(data)], non_blocking=True)
            done.record(side)
        self._stages.append((stage, done))

    def kth(self, keys: Tensor, place: int) -> int:
        """As Backend.kth: torch's own looks for it on one of a hundred multiprocessors."""
        return int(self.ascending(keys)[place - 1])
