"""Explains why tensors of torch without plain values in memory cannot be sent.

Nothing here imports torch: only a caller that imported it has such tensors.
"""

from typing import Any


def problem_of(torch: Any, tensor: Any) -> str | None:
    """Returns why a tensor cannot be sent, and what to do; None if it can.

    Args:
        torch: The module.
        tensor: A torch.Tensor of any kind.
    """
    if _is_plain(torch, tensor):
        return _freed(torch, tensor)
    for is_kind, advice in _KINDS:
        if is_kind(torch, tensor):
            return advice.replace("KIND", type(tensor).__name__)
    return _freed(torch, tensor)


def _is_plain(torch: Any, tensor: Any) -> bool:
    """Whether a tensor is of none of the kinds below; this is faster than to test each."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.is_cpu
        and not tensor.is_nested
        and not _is_transformed(torch, tensor)
    )


def _is_lazy(torch: Any, tensor: Any) -> bool:
    return isinstance(tensor, torch.nn.parameter.UninitializedTensorMixin)


def _is_transformed(torch: Any, tensor: Any) -> bool:
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def _is_distributed(torch: Any, tensor: Any) -> bool:
    return _has_own_dispatch(torch, tensor) and hasattr(tensor, "full_tensor")


def _is_fake(torch: Any, tensor: Any) -> bool:
    return isinstance(tensor, torch._subclasses.fake_tensor.FakeTensor)


def _has_own_dispatch(torch: Any, tensor: Any) -> bool:
    """Whether a subclass of Tensor handles operators itself: then its storage is not its values."""
    return type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


# The first that fits counts: later tests may fail on the kinds before them.
_KINDS: tuple[tuple[Any, str], ...] = (
    (_is_lazy, "has no shape yet: run the lazy module on a batch first"),
    (_is_transformed, "is inside vmap, grad or another transform of torch.func: call outside it"),
    (
        lambda torch, tensor: tensor.is_nested,
        "is a nested tensor: give its parts, tensor.unbind(), under names of their own",
    ),
    (
        _is_distributed,
        "is a KIND, and each process may have a part of it: give tensor.full_tensor()",
    ),
    (_is_fake, "is a KIND and has no values: call outside FakeTensorMode"),
    (
        _has_own_dispatch,
        "is a KIND, which keeps its values in other tensors: give a plain torch.Tensor",
    ),
    (
        lambda torch, tensor: tensor.device.type == "meta",
        "is on the device meta and has no values: load the weights first",
    ),
)


def _freed(torch: Any, tensor: Any) -> str | None:
    if tensor.layout != torch.strided or tensor.is_quantized or not tensor.numel():
        return None
    if tensor.is_contiguous():
        last = tensor.numel() - 1
    else:
        last = sum(
            (size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)
        )
    end = (tensor.storage_offset() + last + 1) * tensor.element_size()
    if end <= tensor.untyped_storage().nbytes():
        return None
    return "has no values: its storage was freed; gather sharded weights first"
