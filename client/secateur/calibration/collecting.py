"""Runs a module on batches with hooks on its layers. Imported with torch only."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from operator import length_hint
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Module, MultiheadAttention

from secateur.calibration.attention import attention_inputs, watching_outputs
from secateur.calibration.grams import Gram, Uses
from secateur.calibration.layer import LayerStatistics
from secateur.calibration.masks import Kept, Mask, kept_of
from secateur.calibration.statistics import Statistics
from secateur.calibration.sums import Sums, first_infinite
from secateur.calibration.targets import Target, targets_of
from secateur.calibration.triangle import Triangle
from secateur.calibration.unit_sums import Blocks, Experts, Stacks
from secateur.checks import flag, shown
from secateur.errors import (
    InvalidSpec,
    InvalidStateDict,
    InvalidStatistics,
    NotCalibrated,
    SecateurError,
)
from secateur.evaluation import arguments_of, in_evaluation, uncompiled
from secateur.progress import Progress, show_progress
from secateur.tables import listed

_MOST_SHOWN = 5
_LABELS = "; leave out labels: (inputs for inputs, labels in loader)"
_LOCK = RLock()


def collect(
    module: Any,
    batches: Iterable[Any],
    gram: bool,
    layers: str | Sequence[str] | None,
    mask: Mask,
    progress: Progress,
    blocks: Blocks,
    experts: bool,
) -> Statistics:
    """Returns the statistics of a module: see secateur.calibrate."""
    if not isinstance(module, Module):
        raise InvalidStateDict(f"a torch.nn.Module is needed, not {type(module).__name__}")
    _check_batches(batches)
    targets = targets_of(module, layers)
    collector = _Collector(targets, flag("gram", gram))
    stacks, mixtures = Stacks(module, blocks), Experts(module, flag("experts", experts))
    length = length_hint(batches, 0)
    with (
        show_progress(progress, length, "calibrate", " batches") as advance,
        _quiet(module),
        collector.hooked(module),
        stacks.hooked(lambda: collector.kept),
        mixtures.hooked(lambda: collector.kept),
    ):
        for index, batch in enumerate(batches):
            kept = kept_of(mask, batch)
            collector.run(module, index, batch, kept)
            if mask is not None or layers is None:  # the default may fit none of a few layers
                kept.check_used()
            advance(1)
    if collector.batches == 0:
        raise InvalidSpec("batches: has no batch")
    return Statistics(collector.result(), stacks.result(), mixtures.result())


def _check_batches(batches: Any) -> None:
    is_one = isinstance(batches, Tensor | Mapping | str)
    if is_one or not isinstance(batches, Iterable):
        advice = "; give one batch as [batch]" if is_one else ""
        raise InvalidSpec(f"batches: {type(batches).__name__} is not a list of batches{advice}")


@contextmanager
def _quiet(module: Module) -> Iterator[None]:
    """Puts a module in evaluation, so that it runs layer by layer on one device.

    This and the block change settings of the process, so one thread at a time runs it.
    """
    parallel = [part for part in module.modules() if isinstance(part, nn.DataParallel)]
    devices = [part.device_ids for part in parallel]
    try:
        for part in parallel:
            part.device_ids = part.device_ids[:1]
        with _LOCK, in_evaluation(module), torch.no_grad(), uncompiled():
            yield
    finally:
        for part, ids in zip(parallel, devices, strict=True):
            part.device_ids = ids


class _Collector:
    """The sums of all batches so far.

    Attributes:
        batches: How many there were, with the current one.
        kept: The tokens of the current batch that count.
    """

    def __init__(self, targets: list[Target], has_grams: bool) -> None:
        self._targets = targets
        self._sums: dict[str, Sums] = {}
        self.batches = 0
        self.kept, self._uses = Kept(None), Uses()
        views = {target.name: target.kind.view(target.module) for target in targets}
        empty = Gram()
        self._grams = {n: empty for n, view in views.items() if has_grams and view is not None}
        empty.holders = len(self._grams)

    @contextmanager
    def hooked(self, module: Module) -> Iterator[None]:
        """Sees the inputs of the layers during the block."""
        linear = {id(t.module): t for t in self._targets if not t.inputs}
        attentions = [part for part in module.modules() if isinstance(part, MultiheadAttention)]

        def see(part: Any, value: Tensor) -> None:
            if id(part) in linear:
                self._see(linear[id(part)], value)

        with watching_outputs(attentions, see), ExitStack() as stack:
            for target in self._targets:
                handle = target.module.register_forward_pre_hook(
                    self._hook(target), with_kwargs=True
                )
                stack.callback(handle.remove)
            yield

    def run(self, module: Module, index: int, batch: Any, kept: Kept) -> None:
        """Runs the module on a batch; an error of the module gets a note with its index."""
        self.batches, self.kept = index + 1, kept
        self._uses.forget()
        args, keywords = arguments_of(batch)
        try:
            module(*args, **keywords)
        except SecateurError:
            raise
        except Exception as error:
            error.add_note(
                f"secateur.calibrate ran the module on batch {index}, {_described(batch)}; a batch "
                "is what forward takes: a tensor, a tuple of arguments, or a mapping of keywords"
                f"{_LABELS if isinstance(batch, tuple | list) else ''}"
            )
            raise

    def _hook(self, target: Target) -> Any:
        def see(module: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            if not target.inputs:
                self._see(target, args[0] if args else next(iter(keywords.values())))
                return
            given = attention_inputs(args, keywords)
            for value in {id(given[index]): given[index] for index in target.inputs}.values():
                self._see(target, value)

        return see

    def _see(self, target: Target, value: Tensor) -> None:
        name, kind, module = target.name, target.kind, target.module
        sums = kind.sums(module, value, self.kept)
        if not sums.count:
            return
        if (channel := first_infinite(sums.totals)) is not None:
            raise InvalidStatistics(
                f"{name}: batch {self.batches - 1}: channel {channel} of its input has NaN, "
                "infinity, or values whose squares are"
            )
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums
        if name in self._grams:
            use = self._uses.of(value, kind.view(module) or ())
            rows = kind.rows(module, value, self.kept)
            self._grams[name] = self._grams[name].moved(use, rows)

    def result(self) -> dict[str, LayerStatistics]:
        """Returns the statistics, and warns of layers without any."""
        dims = {target.name: target.kind.input_dim for target in self._targets}
        if missing := [name for name in dims if name not in self._sums]:
            text = f"no input reached {listed(missing, _MOST_SHOWN)}: not in the statistics"
            warnings.warn(text, NotCalibrated, stacklevel=4)
        triangles = self._triangles()
        return {
            name: _statistics(self._sums[name], dim, triangles.get(name))
            for name, dim in dims.items()
            if name in self._sums
        }

    def _triangles(self) -> dict[str, Triangle | None]:
        """One triangle for all layers that share a gram."""
        made: dict[int, Triangle | None] = {}
        for gram in self._grams.values():
            if id(gram) not in made:
                made[id(gram)] = gram.triangle()
        return {name: made[id(gram)] for name, gram in self._grams.items()}


def _described(batch: Any) -> str:
    """Says what a batch consists of."""
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} with {', '.join(map(shown, batch)) or 'nothing'}"
    if not isinstance(batch, tuple | list):
        return f"a {type(batch).__name__}"
    parts = [type(part).__name__ for part in batch[:_MOST_SHOWN]]
    more = ["..."] if len(batch) > _MOST_SHOWN else []
    return f"a {type(batch).__name__} of {len(batch)}: {', '.join(parts + more)}"


def _statistics(sums: Sums, dim: int, triangle: Triangle | None) -> LayerStatistics:
    total, squares, absolute = sums.totals.cpu().numpy().copy()
    return LayerStatistics(sums.count, squares, total, absolute, dim, triangle)
