"""Collects statistics of the inputs of a module's layers."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from secateur.calibration.statistics import Statistics
from secateur.progress import Progress
from secateur.tensors import torch_for


def calibrate(
    module: Any,
    batches: Iterable[Any],
    gram: bool = False,
    layers: str | Sequence[str] | None = None,
    mask: str | Callable[[Any], Any] | Literal[False] | None = None,
    progress: Progress = None,
    blocks: str | Sequence[str] | Literal[False] | None = None,
    experts: bool = True,
) -> Statistics:
    """Runs a module on batches, and sums the inputs of its layers.

    The module runs in evaluation without gradients, and is left as it was. Memory does not grow
    with the number of batches: 24 bytes for each input channel, and with `gram` 8 bytes for each
    element of each matrix. How the data is cut into batches changes the sums by rounding only.
    Threads of a process run it one after another.

    Args:
        module: A torch.nn.Module. Its layers are Linear, convolutions, Embedding,
            MultiheadAttention, and Conv1D of transformers.
        batches: Any iterable of batches, such as a DataLoader. A batch is what forward takes: a
            tensor, a tuple of arguments, or a mapping of keywords, on the module's device.
        gram: Whether to collect X^T X too, for layers that are neither an embedding nor a grouped
            or transposed convolution.
        layers: Names or globs of weights or modules; None is all.
        mask: Which tokens count: the name of a keyword in the batch, or a function from the batch
            to bools of shape [batch, tokens]. It applies to inputs of shape [batch, tokens, ...] or
            [batch * tokens, ...]; others are summed whole, such as those of an expert. None is
            "attention_mask" if the batch has it, and False is no mask.
        progress: See `Client`.
        blocks: The names of lists of layers, such as "model.layers", that map hidden states of
            shape [batch, tokens, channels] to hidden states, whose influence is summed; see
            `least_influential`. None is every ModuleList that does so, and False is none.
        experts: Whether to sum what experts of transformers give, which computes them twice; see
            `reap`.

    Returns:
        The statistics, by the names of weights in the state_dict of the module without wrappers
        such as DataParallel. A tied weight has its first name, and the sums of all of its uses.

    Raises:
        InvalidStateDict: `module` is not a torch.nn.Module.
        InvalidSpec: An argument is wrong.
        InvalidStatistics: An input of a layer is NaN or infinite.
        SecateurError: torch is not installed.

    Warns:
        NotCalibrated: Some layers had no input. They are absent from the result.
    """
    torch_for("calibrate")
    from secateur.calibration.collecting import collect

    return collect(module, batches, gram, layers, mask, progress, blocks, experts)
