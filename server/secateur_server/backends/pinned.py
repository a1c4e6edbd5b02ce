"""Copies from the host to a GPU by way of pinned memory, while the host receives the next bytes."""

import numpy as np
import torch
from torch import Tensor

# Bytes of a staging buffer, and how many: what is copied while the next bytes arrive.
STAGE_BYTES, STAGES = 4 << 20, 4


class PinnedCopies:
    """The staging buffers of a GPU, and the stream that copies from them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side: torch.cuda.Stream | None = None
        self._stages: list[tuple[Tensor, torch.cuda.Event]] = []

    def copy(self, data: memoryview, target: Tensor) -> None:
        """As Backend.receive."""
        with torch.cuda.device(self._device):
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
