"""Counts of heads in attributes of any name: found by their values. Imported with torch only."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile

from torch.nn import Module

from secateur.resizing.layers import fit_of
from secateur.resizing.removal import Removed, RemovedSlices

Members = Sequence[tuple[str, RemovedSlices]]


def fit_heads(module: Module, made: Module, removed: Removed) -> dict[str, str]:
    """Sets the attributes that are as many as the heads that groups lost.

    Heads are units of several slices in each tensor. The attributes are those of the module that
    has the tensors, and of the ones between it and them, unless their names were known.

    Returns:
        By the paths of modules: which attribute was taken for a count, or why none was.
    """
    groups: dict[str, list[tuple[str, RemovedSlices]]] = defaultdict(list)
    for tensor, slices in removed.items():
        for one in slices:
            groups[one.group].append((tensor, one))
    doubts: dict[str, str] = {}
    for members in groups.values():
        each = [len(one.slices) // (one.units - one.kept) for _, one in members]
        owners = dict(_owners(module, members)) if min(each) > 1 else {}
        if any(
            numbers_of(old) != numbers_of(made.get_submodule(path)) for path, old in owners.items()
        ):
            continue
        queries = [count for count, (_, one) in zip(each, members, strict=True) if one.dim == 1]
        for per_unit in {1, max(queries, default=min(each)) // min(each)}:  # KV heads, and heads
            doubts |= _set(made, owners, members[0][1], per_unit)
    return doubts


def _owners(module: Module, members: Members) -> Iterator[tuple[str, Module]]:
    """The modules that have all tensors of a group, or some of them."""
    paths = [tensor.split(".")[:-1] for tensor, _ in members]
    steps = zip(*paths, strict=False)
    common = len(list(takewhile(lambda names: len(set(names)) == 1, steps)))
    for path in paths:
        for length in range(common, len(path) + 1):
            owner = ".".join(path[:length])
            yield owner, module.get_submodule(owner)


def numbers_of(owner: Module) -> dict[str, int]:
    """Returns the integer attributes of a module; none of a layer of torch."""
    if fit_of(owner) is not None or type(owner).__module__.partition(".")[0] == "torch":
        return {}
    return {name: n for name, n in vars(owner).items() if type(n) is int}


def _set(
    made: Module, owners: Mapping[str, Module], lost: RemovedSlices, per_unit: int
) -> dict[str, str]:
    """Sets the only attribute that has the count before, or all that have "head" in their names."""
    before, after = lost.units * per_unit, lost.kept * per_unit
    found = [
        (path, name)
        for path, owner in owners.items()
        for name, number in numbers_of(owner).items()
        if number == before and "dim" not in name and "size" not in name
    ]
    heads = [(path, name) for path, name in found if "head" in name]
    found = heads if len(found) > 1 and heads else found
    names = " and ".join(name for _, name in found)
    if len(found) > 1 and not heads:
        fact = f"a head count did not change: {names} are each {before}"
        return {found[0][0]: f"{fact}; name the right one n_heads"}
    for path, name in found:
        setattr(made.get_submodule(path), name, after)
    return {path: f"its number of heads is taken to be {names}" for path, _ in found}
