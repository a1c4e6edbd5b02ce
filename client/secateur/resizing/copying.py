"""Copies of torch modules. Imported with torch only."""

import copy
from collections import OrderedDict
from typing import Any

from torch.nn import Module


def deep_copy(module: Module, memo: dict[int, Any]) -> Module:
    """Returns a deep copy of a module, three times as fast as copy.deepcopy.

    Most of the objects of a module are empty dictionaries of hooks, which deepcopy makes slowly.

    Args:
        module: The module.
        memo: The copies of some objects by their ids, as of copy.deepcopy; added to.
    """
    for part in module.modules():
        for value in vars(part).values():
            if type(value) in (dict, OrderedDict) and not value:
                memo.setdefault(id(value), type(value)())
    return copy.deepcopy(module, memo)
