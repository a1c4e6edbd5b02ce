"""Work on pieces of a weight's rows, one piece a core."""

from collections.abc import Callable

from torch import Tensor

from secateur_server.backends import spans
from secateur_server.backends.cores import map_on_cores
from secateur_server.runtime.context import RequestContext

# The same for any number of cores, so that this number does not show in the sums. Fewer rows make
# the products of matrices slower, and more rows leave cores without work.
ROWS = 256


def map_rows(context: RequestContext, function: Callable[..., None], *tensors: Tensor) -> None:
    """Calls a function with the same rows of each tensor, for all rows.

    torch uses one thread in each call: it would wait at the end of every operation for threads that
    other work delays.

    Raises:
        Cancelled: The request has been cancelled.
    """
    pieces = [tuple(t[a:b] for t in tensors) for a, b in spans(len(tensors[0]), ROWS)]
    map_on_cores(context, lambda piece: function(*piece), pieces)
