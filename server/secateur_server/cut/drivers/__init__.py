"""Where the pieces of the tensors live, and how work on them runs: one file for each kind.

The search for a cut (observe.py, search.py, select.py, mark.py) reads pieces through a driver only.
app.py chooses the driver. Scores are computed before the search, in the process that has the
tensors. There small.py, plan_small.py and select_each.py also prune many small tensors in batches.
"""

import torch

from secateur_server.cut.drivers.local import Local
from secateur_server.cut.drivers.protocol import Cluster, Driver, Task
from secateur_server.runtime.context import RequestContext

__all__ = ["Cluster", "Driver", "Local", "Task", "driver_for"]


def driver_for(context: RequestContext, device: torch.device) -> Driver:
    """Returns the driver of a request's tensors on a device."""
    return (context.driver or Local.on)(device)
