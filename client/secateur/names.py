"""Matches names of parameters with and without the prefixes that torch's wrappers add."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from itertools import product

# The parts of names that torch.compile adds, and DataParallel and DistributedDataParallel.
_COMPILED, _PARALLEL = "_orig_mod", "module"
_WRAPPERS = (_COMPILED, _PARALLEL)


def bare_names(names: Iterable[str]) -> dict[str, str]:
    """Maps names to those without the parts that wrappers add, at any depth.

    DataParallel has one child. So a layer with the name `module` that has siblings is not taken for
    a wrapper.

    Args:
        names: All names of a model.
    """
    names = list(names)
    if not any(has_wrapper_part(name) for name in names):
        return {name: name for name in names}
    children: dict[tuple[str, ...], set[str]] = {}
    for name in names:
        parts = tuple(name.split("."))
        for depth, part in enumerate(parts):
            children.setdefault(parts[:depth], set()).add(part)
    return {name: _bare(tuple(name.split(".")), children) for name in names}


def _bare(parts: tuple[str, ...], children: Mapping[tuple[str, ...], Collection[str]]) -> str:
    *above, leaf = parts
    kept = [
        part
        for depth, part in enumerate(above)
        if part != _COMPILED and (part != _PARALLEL or len(children[parts[:depth]]) > 1)
    ]
    return ".".join((*kept, leaf))


def has_wrapper_part(name: str) -> bool:
    """Whether a part of a name may be that of a wrapper."""
    return any(part in name for part in _WRAPPERS)  # fast: an answer may be a yes too many


def resolver(known: Collection[str]) -> Callable[[str], list[str]]:
    """Returns a function that finds what a name or a glob of a spec names in a model.

    A pattern that names a tensor as it is, is left alone. Else it is matched without the parts that
    wrappers add to the names of the model, or to the pattern. One that still names nothing is left
    alone too, for the server's error.

    Args:
        known: All names of the model.
    """
    bare = bare_names(known)

    def resolve(pattern: str) -> list[str]:
        if pattern in bare or any(fnmatchcase(name, pattern) for name in bare):
            return [pattern]
        for form in dict.fromkeys((pattern, *_without_wrappers(pattern))):
            found = [n for n, short in bare.items() if form == short or fnmatchcase(short, form)]
            if found:
                return found
        return [pattern]

    return resolve


def _without_wrappers(pattern: str) -> tuple[str, str]:
    """A name or glob without torch.compile's parts, and without the parts of all wrappers."""
    parts = pattern.split(".")
    compiled = (part for part in parts if part != _COMPILED)
    return ".".join(compiled), ".".join(part for part in parts if part not in _WRAPPERS)


def matched(
    names: Collection[str], known: Collection[str], model: Collection[str]
) -> dict[str, str]:
    """Finds the names of a result in a module that may have other prefixes.

    All names lose the parts of wrappers, on the sides where most of the model's names are then
    found.

    Args:
        names: The names to find.
        known: The names in the module.
        model: All names of the model that the result is of, `names` among them.

    Returns:
        From each name to the one in `known`; a name that is not found is mapped to itself.
    """
    if all(name in known for name in model):
        return {name: name for name in names}
    forms = [({n: n for n in model}, bare_names(model)), ({n: n for n in known}, bare_names(known))]
    ways = [_way(ours, theirs) for ours, theirs in product(*forms)]
    best = max(ways, key=len)  # the first of equals
    return {name: best.get(name, name) for name in names}


def _way(model: Mapping[str, str], known: Mapping[str, str]) -> dict[str, str]:
    """The names that are found in exactly one place after parts are removed."""
    counts = Counter(model.values())
    places: dict[str, list[str]] = {}
    for name, short in known.items():
        places.setdefault(short, []).append(name)
    return {
        name: places[short][0]
        for name, short in model.items()
        if counts[short] == 1 and len(places.get(short, ())) == 1
    }
