"""The methods of a client on checkpoints: the service Checkpoints."""

import os
from collections.abc import Iterator
from typing import Any

from secateur.blocking import run
from secateur.calls.pruning import AsyncPrunerCalls
from secateur.checkpoint import Checkpoint
from secateur.literals import Form
from secateur.progress import Progress


class CheckpointCalls:
    """What `Client` does with checkpoints; several arguments are described there."""

    def __init__(self, calls: AsyncPrunerCalls) -> None:
        self._calls = calls

    def upload(self, source: Any, progress: Progress = None, key: str | None = None) -> Checkpoint:
        """Stores a model on the server until it is deleted, expires or is evicted.

        Skips files that this caller has already uploaded. An upload that breaks is resumed, within
        the timeout.

        Args:
            source: See `Client`; not a Checkpoint.
            progress: See `Client`.
            key: See `Client`.

        Raises:
            InvalidStateDict: The model has entries that a safetensors file cannot hold.
        """
        return run(self._calls.upload(source, progress, key))

    def download(
        self,
        checkpoint: Checkpoint | str,
        path: str | os.PathLike[str],
        output: Form = "dense",
        progress: Progress = None,
    ) -> None:
        """Writes a checkpoint to a file, or its shards to a folder.

        A download that breaks is resumed, within the timeout.

        Args:
            checkpoint: A checkpoint, or its name.
            path: A .safetensors file, or a folder.
            output: See `prune`; not "none". A model that was never pruned comes as it was
                uploaded.
            progress: See `Client`.
        """
        run(self._calls.download(checkpoint, path, output, progress))

    def checkpoint(self, name: str) -> Checkpoint:
        """Returns the checkpoint with a name.

        Args:
            name: checkpoints/...

        Raises:
            CheckpointNotFound: This caller has none of that name.
        """
        return run(self._calls.checkpoint(name))

    def checkpoints(self) -> Iterator[Checkpoint]:
        """Yields all checkpoints of this caller, the newest first, page by page."""
        token: str | None = ""
        while token is not None:
            page, following = run(self._calls._page(token))
            yield from page
            token = following or None

    def delete(self, checkpoint: Checkpoint | str) -> None:
        """Deletes a checkpoint; by its name also a damaged one.

        Args:
            checkpoint: A checkpoint, or its name.

        Raises:
            CheckpointNotFound: This caller has none of that name.
        """
        run(self._calls.delete(checkpoint))
