"""Prunes a model by a schedule while it trains, and keeps pruned weights at zero.

    pruning = secateur.callbacks.start(client, model, spec, end_step=1000, optimizer=optimizer)
    for inputs, labels in batches:
        loss(model(inputs), labels).backward()
        optimizer.step()
        secateur.callbacks.step(pruning)
        optimizer.zero_grad()
    secateur.callbacks.finish(pruning)

`TransformersPruning` does that in `transformers.Trainer`, and `LightningPruning` in Lightning. The
weights stay plain parameters under their own names: a pruned one is zero.
"""

from typing import TYPE_CHECKING, Any

from secateur.callbacks.loop import Pruning, finish, start, step

if TYPE_CHECKING:
    from secateur.callbacks.for_lightning import LightningPruning
    from secateur.callbacks.for_transformers import TransformersPruning

__all__ = ["LightningPruning", "Pruning", "TransformersPruning", "finish", "start", "step"]

_LIBRARIES = {"LightningPruning": "lightning", "TransformersPruning": "transformers"}


def __getattr__(name: str) -> Any:
    """Imports a library when its callback is needed.

    Raises:
        SecateurError: It is not installed.
    """
    if (library := _LIBRARIES.get(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    from secateur.errors import SecateurError

    try:
        return getattr(import_module(f"secateur.callbacks.for_{library}"), name)
    except ImportError as error:
        raise SecateurError(
            f"{name} needs {library}: {error}; pip install 'secateur[{library}]'"
        ) from None
