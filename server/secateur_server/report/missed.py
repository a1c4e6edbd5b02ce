"""Finds weights that the globs of a spec miss in the modules that they name.

`*.weight` misses the `weight_ih_l0` of an LSTM, the `in_proj_weight` of an attention layer, and the
names that torch.nn.utils.parametrize gives to a weight.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from secateur_server.errors import InvalidSpec
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.rules import Rule
from secateur_server.state_dict.catalog import Catalog, match
from secateur_server.state_dict.globs import matches

# Globs may miss this share of the weights, such as position embeddings.
MISSED_SHARE = 0.1

# The most globs that are tried for the advice.
MOST_TRIED = 16


@dataclass(frozen=True)
class Missed:
    """Weights that globs miss: floating tensors of 2 or more dimensions.

    Attributes:
        names: The largest tensor first.
        covered: Elements of the weights that the spec covers.
        elements: Elements of the weights that the globs miss.
        glob: Matches all of them; None if no simple glob does.
    """

    names: list[str]
    covered: int
    elements: int
    glob: str | None


def missed_weights(
    context: RequestContext, rules: Sequence[Rule], catalog: Catalog, covered: Collection[str]
) -> Missed | None:
    """Finds weights in the modules that globs name; None if the spec misses only a few.

    Args:
        context: The request.
        rules: The rules of the request, not resolved.
        catalog: The catalog of the whole state_dict.
        covered: The names of the tensors that the spec prunes.
    """
    shapes = catalog.prunable
    if not any(name not in covered and len(shapes[name]) >= 2 for name in catalog.floating):
        return None
    sizes = {name: math.prod(shapes[name]) for name in catalog.floating if len(shapes[name]) >= 2}
    others = [name for name in sizes if name not in covered]
    patterns = dict.fromkeys(pattern for rule in rules for pattern in rule.patterns())
    globs = [pattern for pattern in patterns if pattern not in shapes]
    scopes = [s for glob in context.each(globs) if (s := _scope(glob))]
    try:
        found = matches(context, "spec", scopes, {}, {name: name for name in others}).first
    except InvalidSpec:  # the advice takes too much work
        return None
    missed = [name for name in others if name in found]
    if missed:  # guard rails leave tensors out on purpose
        named = _named(context, rules, catalog)
        missed = [name for name in missed if name not in named]
    lost = sum(sizes[name] for name in missed)
    kept = sum(sizes.values()) - sum(sizes[name] for name in others)
    if lost <= MISSED_SHARE * (lost + kept):
        return None
    names = sorted(missed, key=sizes.__getitem__, reverse=True)
    return Missed(names, kept, lost, _glob_of(context, names, scopes))


def _scope(glob: str) -> str:
    """The glob for the modules that a glob names: `conv**` for `conv*.weight`; empty for `fc?`."""
    end = max(glob.rfind("*"), glob.rfind(".")) + 1
    modules = glob[:end]
    return f"{modules.removesuffix('.') if modules.endswith('*.') else modules}*" if end else ""


def _named(context: RequestContext, rules: Sequence[Rule], catalog: Catalog) -> set[str]:
    """The tensors that the rules name, also those that guard rails exclude."""
    matched = (
        match(context, rule.path, rule.patterns(), catalog) for rule in rules if rule.patterns()
    )
    return set(chain.from_iterable(matched))


def _glob_of(context: RequestContext, names: Sequence[str], scopes: Sequence[str]) -> str | None:
    every = {name: name for name in names}
    globs = dict.fromkeys(f"{scope.rstrip('*')}*weight*" for scope in scopes)
    for glob in islice(globs, MOST_TRIED):
        if len(matches(context, "spec", [glob], {}, every).first) == len(names):
            return glob
    return None
