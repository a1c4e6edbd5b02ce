"""The weights of a module whose inputs are summed. Imported with torch only."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn
from torch.nn import Module, MultiheadAttention
from torch.nn.parallel import DistributedDataParallel

from secateur.calibration.kinds import LINEAR, Kind, kind_of
from secateur.checks import patterns
from secateur.errors import InvalidSpec

WRAPPERS = (nn.DataParallel, DistributedDataParallel)
_PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class Target(NamedTuple):
    """A weight in a module.

    Attributes:
        name: In the state_dict of the module without wrappers; the first one of a tied weight.
        module: The layer.
        kind: How the layer sees its input.
        inputs: Which arguments of a MultiheadAttention are the weight's inputs; empty for others.
    """

    name: str
    module: Any
    kind: Kind
    inputs: tuple[int, ...] = ()


def targets_of(module: Module, layers: str | Sequence[str] | None) -> list[Target]:
    """Finds the weights of a module, in the order of its state_dict.

    Args:
        module: The module.
        layers: See `calibrate`.

    Raises:
        InvalidSpec: It has none, or one of `layers` is not the name of one.
    """
    found = _of_one_use(list(_all(module)))
    if not found:
        raise InvalidSpec(
            "module: has no Linear, convolution, Embedding or MultiheadAttention; "
            "those in a ScriptModule are not seen"
        )
    if layers is None:
        return found
    chosen: set[str] = set()
    for pattern in patterns(layers, "layers"):
        names = {target.name for target in found if _is_named(target.name, pattern)}
        if not names:
            raise InvalidSpec(
                f"layers: {pattern!r} names no weight and no module that has statistics; "
                f"a weight is {found[0].name!r}"
            )
        chosen |= names
    return [target for target in found if target.name in chosen]


def _is_named(name: str, pattern: str) -> bool:
    """Whether a pattern names a weight, or a module that has it."""
    parts = name.split(".")
    places = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return any(fnmatchcase(place, pattern) for place in places)


def _all(module: Module) -> Iterator[Target]:
    bare, first = bare_paths(module), _first_names(module)
    for path, part in module.named_modules():
        for weight, kind, inputs in _weights(part):
            parameter = part._parameters.get(weight, part._parameters.get(f"{weight}_orig"))
            name = ".".join(filter(None, (bare[path], weight)))
            yield Target(first.get(id(parameter), name), part, kind, inputs)


def _weights(part: Any) -> Iterator[tuple[str, Kind, tuple[int, ...]]]:
    if isinstance(part, MultiheadAttention):
        if part.in_proj_weight is not None:
            yield "in_proj_weight", LINEAR, (0, 1, 2)
        else:
            yield from ((name, LINEAR, (index,)) for index, name in enumerate(_PROJECTIONS))
    elif (kind := kind_of(part)) is not None:
        yield "weight", kind, ()


def bare_paths(module: Module) -> dict[str, str]:
    """Maps the path of each part to the one without the names that wrappers add."""
    parts = dict(module.named_modules(remove_duplicate=False))
    bare: dict[str, str] = {}
    for path in parts:
        above, _, leaf = path.rpartition(".")
        is_wrapped = leaf == "_orig_mod" or (
            leaf == "module" and isinstance(parts[above], WRAPPERS)
        )
        names = (bare.get(above, ""), "" if is_wrapped else leaf)
        bare[path] = ".".join(filter(None, names))
    return bare


def _first_names(module: Module) -> dict[int, str]:
    """From the id of each parameter to its first name; X for X_orig of torch.nn.utils.prune."""
    bare, buffers = bare_paths(module), dict(module.named_buffers(remove_duplicate=False))
    names: dict[int, str] = {}
    for full, parameter in module.named_parameters(remove_duplicate=False):
        path, _, leaf = full.rpartition(".")
        name = ".".join(filter(None, (bare[path], leaf)))
        is_pair = leaf.endswith("_orig") and f"{full.removesuffix('_orig')}_mask" in buffers
        names.setdefault(id(parameter), name.removesuffix("_orig") if is_pair else name)
    return names


def _of_one_use(targets: list[Target]) -> list[Target]:
    """Leaves out uses of a tied weight along another dimension: that of a layer counts.

    A table of embeddings that is the weight of the last layer too is pruned by that layer's inputs.
    """
    dims: dict[str, int] = {}
    for target in sorted(targets, key=lambda target: target.kind.input_dim != 1):
        dims.setdefault(target.name, target.kind.input_dim)
    kept = [target for target in targets if target.kind.input_dim == dims[target.name]]
    order = {name: place for place, name in enumerate(dict.fromkeys(t.name for t in targets))}
    return sorted(kept, key=lambda target: order[target.name])
