"""Shows how far an upload, a download or the server is."""

import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from secateur.checks import shown
from secateur.errors import DeadlineExceeded, SecateurError
from secateur_proto.checkpoint_pb2 import PHASE_WAIT

# None: a bar on a terminal or in a notebook, if tqdm is installed. A function gets done and total.
Progress = bool | None | Callable[[int, int], None]


@contextmanager
def show_progress(
    progress: Progress, total: int, what: str = "upload", unit: str = "B"
) -> Iterator[Callable[[int], None]]:
    """Shows progress.

    Args:
        progress: See `Client`.
        total: The size of all work; 0 if it is unknown.
        what: The name of the work, for the bar.
        unit: The unit of the sizes.

    Yields:
        A function to call with the size of each step.
    """
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise SecateurError(f"progress: {shown(progress)} is not True, False, None or a function")
    if callable(progress):
        yield _accumulated(progress, total)
        return
    has_tqdm = importlib.util.find_spec("tqdm") is not None
    if progress and not has_tqdm:
        raise SecateurError("progress=True needs tqdm: pip install 'secateur[cli]'")
    is_here = has_tqdm and (sys.stderr.isatty() or is_in_notebook())
    if progress or (progress is None and is_here):
        # A notebook keeps a place for each widget, so short calls show none unasked.
        delay = NOTEBOOK_DELAY if progress is None and is_in_notebook() else 0
        with _tqdm()(
            total=total or None, unit=unit, unit_scale=True, desc=what, leave=False, delay=delay
        ) as bar:
            yield cast(Callable[[int], None], bar.update)
    else:
        yield lambda count: None


# Seconds before a call in a notebook shows a bar.
NOTEBOOK_DELAY = 0.5


def is_in_notebook() -> bool:
    """Returns whether the process is the kernel of a notebook, as tqdm finds it."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and "IPKernelApp" in shell.config


def _tqdm() -> Any:
    """The class of bars: a widget in a notebook with ipywidgets, else text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tqdm, where ipywidgets is not installed
        from tqdm.auto import tqdm
    return tqdm


# The number of parts in which the server's work is shown.
PARTS = 1000


@contextmanager
def show_work(progress: Progress) -> Iterator[Callable[[Any], None]]:
    """Shows how far the server is.

    Yields:
        A function to call with each progress message.
    """
    shown = 0
    with show_progress(progress, PARTS, "server", "") as advance:

        def working(message: Any) -> None:
            nonlocal shown
            parts = round(message.share * PARTS)
            if parts > shown:
                advance(parts - shown)
                shown = parts

        yield working
        if shown < PARTS:
            advance(PARTS - shown)


@contextmanager
def noting_waits(working: Callable[[Any], None]) -> Iterator[Callable[[Any], None]]:
    """Adds to the error of a call whose deadline is exceeded that it waited, if it did to the end.

    Args:
        working: Called with each progress message.

    Yields:
        A function to call with each progress message.
    """
    is_waiting = False

    def note(message: Any) -> None:
        nonlocal is_waiting
        is_waiting = message.phase == PHASE_WAIT
        working(message)

    try:
        yield note
    except DeadlineExceeded as error:
        if not is_waiting or error.request_id is not None:  # the server answered
            raise
        raise DeadlineExceeded(f"{error}; {_WAITED}") from error


_WAITED = "until then the call waited for memory or cores of the server, which other calls held"


def _accumulated(progress: Callable[[int, int], None], total: int) -> Callable[[int], None]:
    done = 0

    def update(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    return update
