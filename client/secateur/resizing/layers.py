"""Fits the attributes of layers to the shapes of their tensors. Imported with torch only."""

from collections.abc import Callable, Mapping
from typing import Any

from torch.nn import Module
from torch.nn.modules.conv import _ConvNd

from secateur.errors import InvalidStateDict
from secateur.resizing.attention import fit_attention
from secateur.resizing.misfit import Misfit, expect
from secateur.resizing.recurrent import fit_cell, fit_recurrent


def fit_layers(module: Module, made: Module, groups: Mapping[str, int]) -> dict[str, str]:
    """Sets the sizes of the layers of a copy, and checks each layer's tensors against each other.

    Args:
        module: With the sizes before.
        made: Its copy, with the tensors of the new shapes.
        groups: How many groups grouped convolutions have now, by path and `.groups`.

    Returns:
        What cannot be known from the shapes, by the paths of layers.

    Raises:
        InvalidStateDict: A tensor does not fit; the message names the layer.
    """
    doubts = {}
    known = dict(groups)
    for (path, old), new in zip(module.named_modules(), made.modules(), strict=True):
        try:
            if isinstance(new, _ConvNd):
                new.groups = _groups(new, old, known.pop(f"{path}.groups" if path else "groups", 0))
            _fit_experts(new, old)
            if fit := fit_of(new):
                fit(new, old)
            elif doubt := fit_attention(new, old):
                doubts[path] = doubt
        except Misfit as error:
            raise Misfit(f"{path or 'the module'}: {error.fact}", error.advice) from None
    if known:
        raise InvalidStateDict(f"{next(iter(known))}: the module has no such convolution")
    return doubts


def fit_of(layer: Module) -> Callable[[Any, Any], None] | None:
    """The function of the nearest class that has one."""
    for kind in type(layer).__mro__:
        if (
            kind.__module__.partition(".")[0] in ("torch", "transformers")
            and kind.__name__ in _FITS
        ):
            return _FITS[kind.__name__]
    return None


def _fit_experts(new: Any, old: Any) -> None:
    """Fits the count of experts of a layer with one parameter for all, or of its router."""
    if not isinstance(getattr(old, "num_experts", None), int):
        return
    found = {
        tensor.shape[0]
        for name, tensor in new._parameters.items()
        if tensor is not None and old._parameters[name].shape[:1] == (old.num_experts,)
    }
    if len(found) > 1:
        raise Misfit(f"its parameters are for {min(found)} and for {max(found)} experts")
    if found:
        new.num_experts = found.pop()
        if getattr(new, "top_k", 0) > new.num_experts:
            raise Misfit(f"keeps {new.num_experts} experts, and chooses {new.top_k} for a token")


def _linear(new: Any, old: Any) -> None:
    new.out_features, new.in_features = new.weight.shape
    expect(new, "bias", [new.out_features])


def _conv1d_of_transformers(new: Any, old: Any) -> None:
    new.nx, new.nf = new.weight.shape
    expect(new, "bias", [new.nf])


def _bilinear(new: Any, old: Any) -> None:
    new.out_features, new.in1_features, new.in2_features = new.weight.shape
    expect(new, "bias", [new.out_features])


def _conv(new: Any, old: Any) -> None:
    new.out_channels, each = new.weight.shape[:2]
    new.in_channels = each * new.groups
    expect(new, "bias", [new.out_channels])


def _transposed_conv(new: Any, old: Any) -> None:
    new.in_channels, each = new.weight.shape[:2]
    new.out_channels = each * new.groups
    expect(new, "bias", [new.out_channels])


def _groups(new: Any, old: Any, known: int) -> int:
    """The groups of a convolution: `known`, or else (0) the only number that its rows allow."""
    rows, before = new.weight.shape[0], old.weight.shape[0]
    if rows == before:
        return int(old.groups)
    each = before // old.groups
    choices = {old.groups} if rows % old.groups == 0 else set()
    choices |= {rows // each} if rows % each == 0 else set()
    of = f"weight keeps {rows} of {before} rows"
    if not choices:
        raise Misfit(
            f"{of}, which are neither whole ones of its {old.groups} convolution groups, nor as "
            "many of each"
        )
    if known and known not in choices:
        raise Misfit(f"{of}, which are not those of {known} convolution groups")
    if not known and len(choices) > 1:
        raise Misfit(
            f"{of}: of {min(choices)} or of {max(choices)} convolution groups; add `.groups` of "
            "this layer to the sizes, as secateur.sizes does"
        )
    return known or int(choices.pop())


def _norm(new: Any, old: Any) -> None:
    """Batch norms, instance norms."""
    tensors = ("weight", "bias", "running_mean", "running_var")
    first = next((name for name in tensors if getattr(new, name, None) is not None), None)
    if first is not None:
        new.num_features = len(getattr(new, first))
        for name in tensors:
            expect(new, name, [new.num_features])


def _layer_norm(new: Any, old: Any) -> None:
    if new.weight is not None:
        new.normalized_shape = tuple(new.weight.shape)
        expect(new, "bias", list(new.weight.shape))


def _group_norm(new: Any, old: Any) -> None:
    if new.weight is None:
        return
    channels, each = len(new.weight), old.num_channels // old.num_groups
    if channels % each:
        raise Misfit(f"weight keeps {channels} channels, which are not whole groups of {each}")
    new.num_channels, new.num_groups = channels, channels // each
    expect(new, "bias", [channels])


def _embedding(new: Any, old: Any) -> None:
    new.num_embeddings, new.embedding_dim = new.weight.shape
    if new.num_embeddings != old.num_embeddings:
        new.padding_idx = None  # the row of padding has another index, or is removed


def _prelu(new: Any, old: Any) -> None:
    new.num_parameters = new.weight.numel()


def _multihead_attention(new: Any, old: Any) -> None:
    width = new.out_proj.weight.shape[0]
    rows = [new.out_proj.weight.shape[1]]
    if new.in_proj_weight is None:
        rows += [weight.shape[0] for weight in (new.q_proj_weight, new.k_proj_weight)]
        new.kdim, new.vdim = new.k_proj_weight.shape[1], new.v_proj_weight.shape[1]
        rows += [new.v_proj_weight.shape[0], new.q_proj_weight.shape[1]]
    else:
        rows += [new.in_proj_weight.shape[0] // 3, new.in_proj_weight.shape[1]]
        new.kdim = new.vdim = width
    if set(rows) != {width}:
        raise Misfit(
            f"its width is {width} and its heads have {min(rows)} rows, which "
            "torch.nn.MultiheadAttention cannot compute; keep its heads, or use an attention "
            "layer with separate projections"
        )
    if width % old.head_dim:
        raise Misfit(f"its width {width} is not a multiple of head_dim {old.head_dim}")
    new.embed_dim, new.num_heads = width, width // old.head_dim
    expect(new, "in_proj_bias", [3 * width])
    for name in ("bias_k", "bias_v"):
        expect(new, name, [1, 1, width])


_FITS: dict[str, Callable[[Any, Any], None]] = {
    "Bilinear": _bilinear,
    "Conv1D": _conv1d_of_transformers,
    "Embedding": _embedding,
    "GroupNorm": _group_norm,
    "LayerNorm": _layer_norm,
    "Linear": _linear,
    "MultiheadAttention": _multihead_attention,
    "PReLU": _prelu,
    "RMSNorm": _layer_norm,
    "RNNBase": fit_recurrent,
    "RNNCellBase": fit_cell,
    "_ConvNd": _conv,
    "_ConvTransposeNd": _transposed_conv,
    "_NormBase": _norm,
}
