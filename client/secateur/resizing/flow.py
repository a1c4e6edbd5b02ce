"""Checks the sizes of layers against those that come before them. Imported with torch only.

torch.fx traces modules without branches on data. Along its graph this follows the number of
channels or features, through what it knows to keep them; everything else ends the check there.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from secateur.resizing.copying import deep_copy
from secateur.resizing.misfit import Misfit

_ADVICE = "put both in one group"


class Width(NamedTuple):
    """The size of a dimension of a tensor.

    Attributes:
        kind: "channels" are dimension 1, "features" the last one, "flat" are channels and all
            behind them as one.
        before: Channels or features in the module before.
        now: Those in the copy.
        maker: The path of the layer that makes them.
    """

    kind: str
    before: int
    now: int
    maker: str

    @property
    def makes(self) -> str:
        """The start of a sentence on its size."""
        return f"{self.maker} {'make' if ' and ' in self.maker else 'makes'}"


def fit_flow(module: nn.Module, made: nn.Module) -> Misfit | None:
    """Fits layers without tensors to what comes before them, and checks the others.

    Returns:
        Why the first layer does not fit that does not.
    """
    try:
        _follow(module, made)
    except Misfit as error:
        return error
    return None


def _follow(module: nn.Module, made: nn.Module) -> None:
    """Follows the graph in its order.  Raises: Misfit."""
    graph = _graph(made)  # which has no masks of torch, so that it can be copied
    widths: dict[fx.Node, Width | None] = {}
    for node in graph.nodes if graph else ():
        given = [widths.get(arg) if isinstance(arg, fx.Node) else None for arg in node.args]
        first = given[0] if given else None
        if node.op == "call_module":
            path = str(node.target)
            pair = module.get_submodule(path), made.get_submodule(path)
            widths[node] = _layer(path, *pair, first)
        elif node.op in ("call_function", "call_method"):
            name = getattr(node.target, "__name__", str(node.target))
            widths[node] = _function(name, node, widths, first)


def _graph(module: nn.Module) -> fx.Graph | None:
    tensors = (*module.parameters(), *module.buffers())
    try:  # of a copy: the forward method may set attributes
        traced = deep_copy(module, {id(tensor): tensor for tensor in tensors})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fx.Tracer().trace(traced)
    except Exception:  # torch.fx does not know branches on data, and much else
        return None


def _layer(path: str, old: nn.Module, new: nn.Module, given: Width | None) -> Width | None:
    for kind, reads, counts, makes in _LAYERS:
        if isinstance(old, kind):
            before, now = counts(old), counts(new)
            if given and given.kind in reads and before and not _fits(given, before, now):
                raise Misfit(
                    f"{path}: takes {now} inputs, and {given.makes} {_expected(given, before)}",
                    _ADVICE,
                )
            return makes(path, old, new, given)
    return _kept(type(old).__name__, given)


def _kept(name: str, given: Width | None) -> Width | None:
    """What a layer or a function of a name makes of what it is given, if it keeps its size."""
    is_kept = name in _KEEPING or (name in _KEEPING_CHANNELS and given and given.kind == "channels")
    return given if is_kept else None


def _fits(given: Width, before: int, now: int) -> bool:
    """Whether a layer that took `before` inputs takes what it is given; True if not known."""
    if given.kind == "flat":
        return before % given.before != 0 or now == _expected(given, before)
    return before != given.before or now == given.now


def _expected(given: Width, before: int) -> int:
    return before // given.before * given.now if given.kind == "flat" else given.now


def _unflattened(path: str, old: Any, new: Any, given: Width | None) -> Width | None:
    sizes = old.unflattened_size
    if not given or given.kind != "features" or old.dim not in (1, -1):
        return None
    if not all(type(size) is int for size in sizes) or math.prod(sizes) != given.before:
        return None
    each = given.before // sizes[0]
    if given.now % each:
        raise Misfit(
            f"{path}: {given.makes} {given.now} features, which are not whole channels of {each}"
        )
    new.unflattened_size = (given.now // each, *sizes[1:])
    return Width("channels", sizes[0], given.now // each, given.maker)


def _function(
    name: str, node: fx.Node, widths: dict[fx.Node, Width | None], first: Width | None
) -> Width | None:
    if name == "cat":
        return _joined(node, widths)
    if name in ("add", "iadd", "mul", "imul", "sub"):
        return _added(node, widths)
    if first and first.kind == "channels":
        shape = node.args[1:]
        if name == "flatten" and shape == (1,):
            return first._replace(kind="flat")
        if name in ("view", "reshape") and len(shape) == 2 and shape[1] == -1:
            return first._replace(kind="flat")
        if name == "mean" and shape and shape[0] in ((2, 3), (-2, -1), [2, 3], [-2, -1]):
            return first._replace(kind="features")
    return _kept(name, first)


def _joined(node: fx.Node, widths: dict[fx.Node, Width | None]) -> Width | None:
    """The channels of tensors that are concatenated along dimension 1."""
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    parts = node.args[0] if node.args and isinstance(node.args[0], list | tuple) else ()
    found = [widths.get(part) if isinstance(part, fx.Node) else None for part in parts]
    if dim != 1 or not found or not all(one and one.kind == "channels" for one in found):
        return None
    before, now = (sum(getattr(one, side) for one in found) for side in ("before", "now"))
    return Width("channels", before, now, " and ".join(one.maker for one in found if one))


def _added(node: fx.Node, widths: dict[fx.Node, Width | None]) -> Width | None:
    """The channels of two tensors that are added."""
    parts = [widths.get(arg) for arg in node.args if isinstance(arg, fx.Node)]
    if len(node.args) != 2 or not parts or None in parts:
        return None
    one, other = parts[0], parts[-1]
    assert one is not None
    assert other is not None
    if one[:2] != other[:2]:
        return None
    if one.now != other.now:
        raise Misfit(
            f"{other.maker}: makes {other.now} of {other.before} {other.kind}, and {one.maker}, "
            f"with which they are added, {one.now}",
            _ADVICE,
        )
    return one


def _same(path: str, old: Any, new: Any, given: Width | None) -> Width | None:
    return given


def _flattened(path: str, old: Any, new: Any, given: Width | None) -> Width | None:
    is_known = given and given.kind == "channels" and (old.start_dim, old.end_dim) == (1, -1)
    return given._replace(kind="flat") if given and is_known else None


def _made(kind: str, attribute: str) -> Callable[[str, Any, Any, Width | None], Width]:
    def made(path: str, old: Any, new: Any, given: Width | None) -> Width:
        return Width(kind, getattr(old, attribute), getattr(new, attribute), path)

    return made


def _nothing(layer: Any) -> int:
    return 0


def _normalized(layer: Any) -> int:
    """The channels of a batch norm, unless it has no tensors."""
    has_tensors = layer.weight is not None or layer.running_mean is not None
    return int(layer.num_features) if has_tensors else 0


_Layer = tuple[
    type[nn.Module] | tuple[type[nn.Module], ...],
    tuple[str, ...],
    Callable[[Any], int],
    Callable[[str, Any, Any, Width | None], Width | None],
]

# Layers and functions that keep channels and features, and those that keep channels alone.
_NAMES = """
Dropout Dropout1d Dropout2d ELU GELU Hardsigmoid Hardswish Identity LeakyReLU Mish PReLU ReLU ReLU6
SELU SiLU Sigmoid Softplus Tanh contiguous dropout dropout2d elu gelu hardsigmoid hardswish
leaky_relu mish relu relu6 relu_ selu sigmoid silu softplus tanh
"""
_NAMES_FOR_CHANNELS = """
AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveMaxPool1d AdaptiveMaxPool2d AvgPool1d AvgPool2d
MaxPool1d MaxPool2d Upsample adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool1d
adaptive_max_pool2d avg_pool1d avg_pool2d interpolate max_pool1d max_pool2d
"""
_KEEPING = frozenset(_NAMES.split())
_KEEPING_CHANNELS = frozenset(_NAMES_FOR_CHANNELS.split())

# The class, the kinds of widths it reads and how many, and what it makes.
_LAYERS: list[_Layer] = [
    (
        nn.Linear,
        ("features", "flat"),
        lambda layer: int(layer.in_features),
        _made("features", "out_features"),
    ),
    (
        _ConvNd,
        ("channels",),
        lambda layer: int(layer.in_channels),
        _made("channels", "out_channels"),
    ),
    (_NormBase, ("channels",), _normalized, _same),
    (nn.GroupNorm, ("channels",), lambda layer: int(layer.num_channels), _same),
    (nn.LayerNorm, ("features",), lambda layer: int(layer.normalized_shape[-1]), _same),
    (nn.Flatten, (), _nothing, _flattened),
    (nn.Unflatten, (), _nothing, _unflattened),
]
