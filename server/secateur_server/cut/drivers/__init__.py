"""Where the pieces of the tensors live, and how work on them runs.

One file for each kind. The search for a cut (observe.py, search.py, mark.py) reads and marks pieces
through a driver only. There is no driver but the local one yet: the functions that `map` is given
refer to the request, and write the bits of masks in place.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

import torch

from secateur_server.backends import backend_for
from secateur_server.backends.protocol import Backend
from secateur_server.cut.drivers.local import Local
from secateur_server.runtime.context import Found, Item, RequestContext


class Driver(Protocol):
    """Runs functions where the pieces live."""

    @property
    def backend(self) -> Backend:
        """The array operations on the pieces."""

    def map(
        self, context: RequestContext, function: Callable[[Item], Found], pieces: Iterable[Item]
    ) -> list[Found]:
        """Applies a function to each piece.

        Returns:
            The results, in order.

        Raises:
            Cancelled, DeadlineExceeded: The request is to end.
        """


def driver_for(context: RequestContext, device: torch.device) -> Driver:
    """Returns the driver of a request's tensors on a device."""
    return Local(backend_for(device))
