"""A bar for uploads."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

from secateur.errors import SecateurError

# None: a bar where stderr is a terminal and tqdm is installed. A function gets bytes sent, total.
Progress = bool | None | Callable[[int, int], None]


@contextmanager
def show_progress(progress: Progress, total: int) -> Iterator[Callable[[int], None]]:
    """Shows an upload of `total` bytes. Yields what to call with the bytes of each step."""
    if callable(progress):
        yield _accumulated(progress, total)
        return
    has_tqdm = importlib.util.find_spec("tqdm") is not None
    if progress and not has_tqdm:
        raise SecateurError("progress=True needs tqdm: pip install 'secateur[cli]'")
    if progress or (progress is None and has_tqdm and sys.stderr.isatty()):
        from tqdm import tqdm

        with tqdm(total=total, unit="B", unit_scale=True, desc="upload", leave=False) as bar:
            yield cast(Callable[[int], None], bar.update)
    else:
        yield lambda count: None


def _accumulated(progress: Callable[[int, int], None], total: int) -> Callable[[int], None]:
    done = 0

    def update(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    return update
