"""Keeps pruned weights of a module in training at zero. Imported with torch only."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import prune
from torch.utils.hooks import unserializable_hook

from secateur.errors import InvalidStateDict
from secateur.module import check_hooks
from secateur.names import bare_names


class Masks:
    """The pruned weights of a module: a bool for each element of the parameters that have some.

    Gradients of pruned weights are zeroed too. So they are no part of a norm that clips gradients,
    nor of an optimizer's momentum.

    Attributes:
        parameters: By their names, without the prefixes of wrappers.
        pruned: True is pruned, by the names of the parameters that have a mask.
        counts: How many weights are pruned, by the same names.
    """

    def __init__(self, module: Module, optimizers: Sequence[Any] = ()) -> None:
        """Takes over the masks of torch.nn.utils.prune in a module.

        Args:
            module: Its pairs X_orig, X_mask become X.
            optimizers: Their state of pruned weights is zeroed.

        Raises:
            InvalidStateDict: The module's pruning hooks are broken.
        """
        pairs = {name: module.get_buffer(f"{name}_mask") == 0 for name in check_hooks(module)}
        for name in pairs:
            path, _, leaf = name.rpartition(".")
            prune.remove(module.get_submodule(path), leaf)  # type: ignore[no-untyped-call]
        parameters = dict(module.named_parameters(remove_duplicate=False))
        bare = bare_names(parameters)
        self.parameters = {bare[name]: parameter for name, parameter in parameters.items()}
        self.pruned: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self._optimizers = optimizers
        self._hooks: dict[int, Any] = {}  # a tied parameter has one
        self.add({bare[name]: ~mask for name, mask in pairs.items()})

    def add(self, kept: Mapping[str, Tensor]) -> None:
        """Prunes weights; what is pruned already remains pruned.

        Args:
            kept: Bool by parameter name, False is pruned.
        """
        for name, mask in kept.items():
            parameter = self.parameters[name]
            pruned = ~mask.to(parameter.device)
            if name in self.pruned:
                pruned |= self.pruned[name]
            self.pruned[name], self.counts[name] = pruned, int(pruned.sum())
            if id(parameter) not in self._hooks:
                self._hooks[id(parameter)] = parameter.register_hook(  # type: ignore[no-untyped-call]
                    _grad_hook(name, self.pruned)
                )
            self._zero_state(parameter, pruned)
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Zeroes the pruned weights."""
        for name, pruned in self.pruned.items():
            parameter = self.parameters[name]
            parameter.masked_fill_(pruned.to(parameter.device), 0)

    @torch.no_grad()
    def _zero_state(self, parameter: Tensor, pruned: Tensor) -> None:
        """Zeroes what an optimizer remembers of pruned weights, and gradients that wait for it."""
        states = (optimizer.state.get(parameter, {}) for optimizer in self._optimizers)
        for value in (parameter.grad, *(value for state in states for value in state.values())):
            is_dense = isinstance(value, Tensor) and value.layout == torch.strided
            if is_dense and value.shape == pruned.shape and value.dim():
                value.masked_fill_(pruned.to(value.device), 0)

    def source(self) -> dict[str, Tensor]:
        """Returns the parameters; one with a mask is the pair X_orig, X_mask."""
        source: dict[str, Tensor] = {}
        masks: dict[int, Tensor] = {}
        for name, parameter in self.parameters.items():
            if name not in self.pruned:
                source[name] = parameter
                continue
            source[f"{name}_orig"] = parameter
            # A tied parameter has one mask, as it has one memory.
            source[f"{name}_mask"] = masks.setdefault(id(parameter), ~self.pruned[name])
        return source

    def hold(self) -> bool:
        """Whether all pruned weights are zero."""
        return not any(
            bool(self.parameters[name].detach()[pruned].any())
            for name, pruned in self.pruned.items()
        )

    def restore(self, counts: Mapping[str, int]) -> None:
        """Prunes the zeros of parameters that were pruned before.

        Args:
            counts: The `counts` of that time.

        Raises:
            InvalidStateDict: The module does not have the weights of that time.
        """
        for name, count in counts.items():
            parameter = self.parameters.get(name)
            zeros = 0 if parameter is None else int((parameter == 0).sum())
            if zeros < count:
                raise InvalidStateDict(
                    f"state: {name} has {zeros} zeros, and {count} of its weights were pruned; "
                    "load the weights of the same checkpoint first"
                )
        self.add({name: self.parameters[name].detach() != 0 for name in counts})

    def release(self) -> None:
        """Removes the hooks of gradients."""
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()


def _grad_hook(name: str, pruned: Mapping[str, Tensor]) -> Any:
    """Zeroes gradients before they are accumulated, scaled ones and infinite ones too."""

    def zero(grad: Tensor) -> Tensor:
        if grad.layout != torch.strided:  # of a sparse embedding; `apply` zeroes its weights
            return grad
        return grad.masked_fill(pruned[name].to(grad.device), 0)

    return unserializable_hook(zero)  # type: ignore[no-untyped-call]  # torch.save else warns of it
