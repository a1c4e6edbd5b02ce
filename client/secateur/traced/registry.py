"""The rules of operations, by their names."""

from collections.abc import Callable

from secateur.traced.calls import Call, Result

Rule = Callable[[Call], Result]

RULES: dict[str, Rule] = {}


def rule(names: str) -> Callable[[Rule], Rule]:
    """Makes a function the rule of operations, of which the names are given with spaces."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), function))
        return function

    return register
