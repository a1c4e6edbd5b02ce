"""Fits the uploaded tensors of a rule to the tensors that it prunes."""

from collections.abc import Iterable
from dataclasses import replace

import torch

from secateur_server.backends.dtypes import FP8, PRUNABLE, WIRE_DTYPES
from secateur_server.errors import InvalidScores, quote
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.matching import by_tensor, extra_of, not_pruned
from secateur_server.spec.rules import Selection
from secateur_server.state_dict.catalog import Catalog, Shape, Stored

_FACTOR_DTYPES = tuple(d for d in PRUNABLE if d.is_floating_point and d not in FP8)


def resolve_uploads(
    context: RequestContext, rule: Selection, named: Iterable[str], catalog: Catalog
) -> Selection:
    """Finds the tensors that the uploads of a rule's importance are for.

    Args:
        context: The request.
        rule: Of the request.
        named: The tensors that it names, those that guard rails exclude among them.
        catalog: Of the state_dict.

    Raises:
        InvalidSpec: An upload is for another tensor, is missing, or does not fit.
    """
    importance = rule.importance
    if not importance.uploads:
        return rule
    shapes = {name: catalog.prunable[name] for name in named}
    known = catalog.all_names(list(shapes))
    found = {
        field: by_tensor(context, given, f"{rule.path}.{field}", known)
        for field, given in importance.uploads.items()
    }
    for field, given in found.items():
        for name, holder in context.each(given.items()):
            path = f"{rule.path}.{field}[{quote(name)}]"
            _check_upload(rule, field, path, shapes.get(name), extra_of(path, holder, catalog))
    return replace(rule, importance=importance.with_uploads(found))


def _check_upload(
    rule: Selection, field: str, path: str, shape: Shape | None, uploaded: Stored
) -> None:
    if shape is None:
        raise not_pruned(path, "tensor")
    if uploaded.dtype not in _FACTOR_DTYPES:
        raise InvalidScores(path, wrong_dtype(uploaded, "factors", _FACTOR_DTYPES))
    rule.importance.check_upload(field, path, shape, uploaded.shape)


def wrong_dtype(extra: Stored, what: str, dtypes: Iterable[torch.dtype]) -> str:
    """Says that an uploaded tensor has none of the dtypes that `what` may have."""
    allowed = ", ".join(WIRE_DTYPES[dtype] for dtype in dtypes)
    return f"has dtype {extra.dtype_name}; {what} may be {allowed}"
