"""Watches the layers of stacks, and experts. Imported with torch only."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from inspect import Signature, signature
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import Module

from secateur.calibration.masks import Kept
from secateur.calibration.sums import pieces
from secateur.calibration.targets import bare_paths
from secateur.calibration.unit_statistics import UnitStatistics
from secateur.checks import patterns
from secateur.errors import InvalidSpec, InvalidStatistics

Blocks = str | Sequence[str] | Literal[False] | None

# What the forward of experts takes, in transformers from 5.0.
_OF_EXPERTS = {"hidden_states", "top_k_index", "top_k_weights"}


class Tally:
    """Sums over tokens for each unit of one name.

    Args:
        name: Of the units, for errors.
        units: How many there are.
    """

    def __init__(self, name: str, units: int) -> None:
        self._name = name
        self._sums = torch.zeros(units, dtype=torch.float64)
        self._counts = torch.zeros(units, dtype=torch.int64)

    @property
    def is_empty(self) -> bool:
        """Whether no token reached any unit."""
        return not bool(self._counts.any())

    def add(self, units: Tensor, values: Tensor) -> None:
        """Adds a value of each token to that of its unit.

        Raises:
            InvalidStatistics: A value is NaN or infinite.
        """
        units, values = units.cpu(), values.cpu()
        wrong = ~values.isfinite()
        if bool(wrong.any()):
            raise InvalidStatistics(
                f"{self._name}: unit {int(units[wrong][0])} has inputs or outputs that are NaN or "
                "infinite"
            )
        self._sums.index_add_(0, units, values)
        self._counts += torch.bincount(units, minlength=len(self._counts))

    def result(self) -> UnitStatistics:
        """Returns the sums so far."""
        return UnitStatistics(self._sums.numpy().copy(), self._counts.numpy().copy())


class Stacks:
    """The influence of the layers of stacks: 1 - the cosine of a token before and after a layer.

    Args:
        module: The module.
        blocks: See `calibrate`.
    """

    def __init__(self, module: Module, blocks: Blocks) -> None:
        self._is_asked = blocks is not None
        self._stacks = _stacks(module, blocks)
        self._tallies = {name: Tally(name, len(stack)) for name, stack in self._stacks.items()}

    @contextmanager
    def hooked(self, kept: Callable[[], Kept]) -> Iterator[None]:
        """Sees the layers during the block.

        Args:
            kept: Returns the tokens of the batch that count.
        """
        with ExitStack() as exits:
            for name, stack in self._stacks.items():
                for index, layer in enumerate(stack):
                    for handle in self._watch(name, index, layer, kept):
                        exits.callback(handle.remove)
            yield

    def _watch(self, name: str, index: int, layer: Module, kept: Callable[[], Kept]) -> list[Any]:
        inputs: list[Tensor | None] = []  # of the calls in progress

        def enter(module: Any, args: Any, keywords: Any) -> None:
            given = _first_tensor((*args, *keywords.values()))
            if given is not None and name in self._tallies:
                given = given.clone()  # a layer may write into it
            inputs.append(given)

        def leave(module: Any, args: Any, keywords: Any, output: Any) -> None:
            before = inputs.pop()
            after = _first_tensor(output if isinstance(output, tuple | list) else (output,))
            self._add(name, index, before, after, kept())

        return [
            layer.register_forward_pre_hook(enter, with_kwargs=True),
            layer.register_forward_hook(leave, with_kwargs=True),
        ]

    def _add(
        self, name: str, index: int, before: Tensor | None, after: Tensor | None, kept: Kept
    ) -> None:
        if name not in self._tallies:
            return
        if before is None or after is None or before.shape != after.shape or before.dim() > 3:
            if self._is_asked:
                raise InvalidSpec(
                    f"blocks: {name}.{index} does not map hidden states, [batch, tokens, channels],"
                    " to hidden states of the same shape"
                )
            del self._tallies[name]  # its layers map no hidden states
            return
        distances = 1 - _cosines(before, after.to(before.device))
        values = kept.of(distances, distances.dim()).flatten()
        self._tallies[name].add(torch.full(values.shape, index), values)

    def result(self) -> dict[str, UnitStatistics]:
        """Returns the sums of each stack that ran."""
        return {name: t.result() for name, t in self._tallies.items() if not t.is_empty}


def _stacks(module: Module, blocks: Blocks) -> dict[str, Any]:
    """The stacks by their names in the state_dict."""
    if blocks is False:
        return {}
    bare = bare_paths(module)
    parts = {bare[path]: part for path, part in module.named_modules() if bare[path]}
    lists = {name: part for name, part in parts.items() if isinstance(part, nn.ModuleList)}
    if blocks is None:
        return {
            name: part
            for name, part in lists.items()
            if len(part) > 1 and not any(name.startswith(f"{other}.") for other in lists)
        }
    for name in (names := patterns(blocks, "blocks")):
        if not isinstance(parts.get(name), nn.ModuleList | nn.Sequential):
            known = ", ".join(lists) or "none"
            raise InvalidSpec(f"blocks: {name!r} is not a ModuleList; the module has {known}")
    return {name: parts[name] for name in names}


def _first_tensor(values: Sequence[Any]) -> Tensor | None:
    """The first floating tensor with a dimension of tokens and one of channels."""
    tensors = (value for value in values if isinstance(value, Tensor) and value.dim() > 1)
    return next((tensor for tensor in tensors if tensor.is_floating_point()), None)


def _cosines(one: Tensor, other: Tensor) -> Tensor:
    """The cosine of each vector along the last dimension, in float64; 0 for a vector of zeros."""
    size = one.shape[-1]
    found = []
    both = zip(pieces(one.reshape(-1, size)), pieces(other.reshape(-1, size)), strict=True)
    for a, b in both:
        x, y = _doubles(a), _doubles(b)
        norms = x.norm(dim=1) * y.norm(dim=1)
        found.append((x * y).sum(1) / norms.where(norms != 0, 1))
    return torch.cat(found).view(one.shape[:-1]) if found else _doubles(one)[..., 0]


def _doubles(values: Tensor) -> Tensor:
    return (values.cpu() if values.device.type == "mps" else values).double()  # MPS has none


class Experts:
    """Outputs of experts times their weights, for each expert: see secateur.reap.

    Args:
        module: The module.
        is_asked: Whether to watch them.
    """

    def __init__(self, module: Module, is_asked: bool) -> None:
        bare = bare_paths(module)
        parts = module.named_modules() if is_asked else ()
        self._modules: dict[str, Any] = {bare[p]: part for p, part in parts if _is_experts(part)}
        self._tallies = {
            name: Tally(name, part.num_experts) for name, part in self._modules.items()
        }

    @contextmanager
    def hooked(self, kept: Callable[[], Kept]) -> Iterator[None]:
        """Sees the experts during the block; see Stacks.hooked."""
        with ExitStack() as exits:
            for name, part in self._modules.items():
                watch = self._watch(name, signature(part.forward), kept)
                exits.callback(part.register_forward_pre_hook(watch, with_kwargs=True).remove)
            yield

    def _watch(self, name: str, forward: Signature, kept: Callable[[], Kept]) -> Any:
        def enter(module: Any, args: Any, keywords: Any) -> None:
            given = forward.bind(*args, **keywords).arguments
            index, weights = given["top_k_index"], given["top_k_weights"]
            states = given["hidden_states"]
            states = states.reshape(-1, states.shape[-1])
            index, weights = (each.reshape(len(states), -1) for each in (index, weights))
            for slot in range(index.shape[1]):
                chosen = index[:, slot : slot + 1]
                # The outputs before they are weighted: one expert a token, with a weight of 1. Not
                # by a call of the module, which would run this hook.
                outputs = module.forward(states, chosen, torch.ones_like(weights[:, :1]))
                scores = _doubles(outputs).norm(dim=1) * _doubles(weights[:, slot])
                self._add(name, kept(), chosen[:, 0], scores)

        return enter

    def _add(self, name: str, kept: Kept, chosen: Tensor, scores: Tensor) -> None:
        chosen, scores = kept.of(chosen, 1).cpu(), kept.of(scores, 1).cpu()
        is_here = chosen < self._modules[name].num_experts  # others mean none
        self._tallies[name].add(chosen[is_here], scores[is_here])

    def result(self) -> dict[str, UnitStatistics]:
        """Returns the sums of each module of experts that ran."""
        return {name: t.result() for name, t in self._tallies.items() if not t.is_empty}


def _is_experts(part: Module) -> bool:
    if not isinstance(getattr(part, "num_experts", None), int):
        return False
    return signature(part.forward).parameters.keys() >= _OF_EXPERTS
