"""Matches names of parameters with and without the prefixes that torch's wrappers add."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from itertools import product


def _as_is(name: str) -> str:
    return name


def _uncompiled(name: str) -> str:
    """Without the prefixes of torch.compile, which wraps a module or parts of one."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _unwrapped(name: str) -> str:
    """Without the prefix of DataParallel and DistributedDataParallel too."""
    return _uncompiled(name).removeprefix("module.")


_FORMS: tuple[Callable[[str], str], ...] = (_as_is, _uncompiled, _unwrapped)


def matched(
    names: Collection[str], known: Collection[str], model: Collection[str]
) -> dict[str, str]:
    """Finds the names of a result in a module that may have other prefixes.

    All names lose the same prefixes: those with which most of the model's names are found, and as
    few as possible. So a layer with the name `module` is not taken for a wrapper.

    Args:
        names: The names to find.
        known: The names in the module.
        model: All names of the model that the result is of, `names` among them.

    Returns:
        From each name to the one in `known`; a name that is not found is mapped to itself.
    """
    if all(name in known for name in model):
        return {name: name for name in names}
    ways = [_way(model, known, *forms) for forms in product(_FORMS, _FORMS)]
    best = max(ways, key=len)  # the first of equals
    return {name: best.get(name, name) for name in names}


def _way(
    model: Iterable[str],
    known: Iterable[str],
    form: Callable[[str], str],
    known_form: Callable[[str], str],
) -> dict[str, str]:
    """The names that are found in exactly one place after prefixes are removed."""
    counts = Counter(map(form, model))
    places: dict[str, list[str]] = {}
    for name in known:
        places.setdefault(known_form(name), []).append(name)
    return {
        name: places[form(name)][0]
        for name in model
        if counts[form(name)] == 1 and len(places.get(form(name), ())) == 1
    }
