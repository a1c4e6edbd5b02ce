"""The inputs of torch's MultiheadAttention, which calls no layer. Imported with torch only."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import MultiheadAttention
from torch.nn import functional as F  # noqa: N812

_ARGUMENTS = ("query", "key", "value")

See = Callable[[Any, Tensor], None]


def attention_inputs(args: tuple[Any, ...], keywords: dict[str, Any]) -> list[Tensor]:
    """Returns query, key and value of a call of MultiheadAttention."""
    named = [keywords[name] for name in _ARGUMENTS if name in keywords]
    return [*args[:3], *named][:3]


@contextmanager
def watching_outputs(modules: Collection[MultiheadAttention], see: See) -> Iterator[None]:
    """Calls `see` with each out_proj and its input, with the dimensions of the query.

    MultiheadAttention passes out_proj.weight to torch.nn.functional.linear, so the block has a
    linear of its own there, and no fast path. Both are settings of the process.
    """
    if not modules:
        yield
        return
    shapes: dict[int, tuple[Any, torch.Size]] = {}

    def enter(module: Any, args: Any, keywords: Any) -> None:
        query = attention_inputs(args, keywords)[0]
        shapes[id(module.out_proj.weight)] = module, query.shape

    def watched(value: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if id(weight) in shapes:
            module, shape = shapes.pop(id(weight))
            see(module.out_proj, _as_query(value, shape, module.batch_first))
        return linear(value, weight, bias)

    with ExitStack() as stack:
        linear = F.linear
        stack.callback(setattr, F, "linear", linear)
        mha = torch.backends.mha
        stack.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
        mha.set_fastpath_enabled(False)
        F.linear = watched  # type: ignore[assignment]
        for module in modules:
            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        yield


def _as_query(value: Tensor, shape: torch.Size, is_batch_first: bool) -> Tensor:
    """The input of out_proj: its rows are [tokens, batch]."""
    if len(shape) == 3 and is_batch_first:
        return value.view(shape[1], shape[0], -1).transpose(0, 1)
    return value.view(*shape[:-1], -1)
