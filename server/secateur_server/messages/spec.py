"""A pruning spec from the wire: every field checked that can be without the tensors."""

import math

from google.protobuf.message import Message

from secateur_proto import spec_pb2
from secateur_server.errors import AmountOutOfRange, InvalidSpec
from secateur_server.pruning.spec import (
    CustomMasks,
    Element,
    Magnitude,
    Random,
    Rule,
    Selection,
    Slice,
)


def decode_spec(spec: spec_pb2.PruningSpec) -> list[Rule]:
    """The rules of a spec.  Errors: InvalidSpec, naming the field by its path."""
    if not spec.rules:
        raise InvalidSpec("spec.rules", "a spec needs at least one rule")
    return [_rule(rule, f"spec.rules[{index}]") for index, rule in enumerate(spec.rules)]


def _rule(rule: spec_pb2.Rule, path: str) -> Rule:
    if _chosen(rule, "method", path) == "selection":
        return _selection(rule.selection, f"{path}.selection")
    path = f"{path}.custom_masks"
    if not rule.custom_masks.masks:
        raise InvalidSpec(f"{path}.masks", "at least one mask is needed")
    return CustomMasks(path, dict(rule.custom_masks.masks))


def _selection(selection: spec_pb2.Selection, path: str) -> Selection:
    if not selection.tensors:
        raise InvalidSpec(f"{path}.tensors", "at least one name or glob is needed")
    granularity = _granularity(selection, path)
    importance = _importance(selection, granularity, path)
    is_global = _scope(selection, path) == spec_pb2.SCOPE_GLOBAL
    if is_global and isinstance(granularity, Slice):
        raise InvalidSpec(f"{path}.scope", "SCOPE_GLOBAL ranks elements, not slices")
    if selection.importance_scores and isinstance(importance, Random):
        raise InvalidSpec(f"{path}.importance_scores", "random importance takes no scores")
    return Selection(
        path=path,
        tensors=tuple(selection.tensors),
        importance=importance,
        granularity=granularity,
        is_global=is_global,
        amount=_amount(selection, path),
        scores=dict(selection.importance_scores),
    )


def _granularity(selection: spec_pb2.Selection, path: str) -> Element | Slice:
    if selection.granularity == spec_pb2.GRANULARITY_ELEMENT:
        return Element()
    if selection.granularity == spec_pb2.GRANULARITY_SLICE:
        return Slice(selection.dim)
    raise InvalidSpec(f"{path}.granularity", f"{selection.granularity} is no granularity")


def _importance(
    selection: spec_pb2.Selection, granularity: Element | Slice, path: str
) -> Magnitude | Random:
    if _chosen(selection, "importance", path) == "random":
        return Random(selection.random.seed)
    if isinstance(granularity, Element):
        return Magnitude()
    magnitude, path = selection.magnitude, f"{path}.magnitude"
    if _chosen(magnitude, "norm", path) == "p":
        if math.isnan(magnitude.p):
            raise InvalidSpec(f"{path}.p", "the order of a norm cannot be NaN")
        return Magnitude(magnitude.p)
    if magnitude.matrix_norm == spec_pb2.MATRIX_NORM_FROBENIUS:
        return Magnitude(2.0)
    if magnitude.matrix_norm == spec_pb2.MATRIX_NORM_NUCLEAR:
        return Magnitude("nuc")
    raise InvalidSpec(f"{path}.matrix_norm", f"{magnitude.matrix_norm} is no matrix norm")


def _scope(selection: spec_pb2.Selection, path: str) -> int:
    if selection.scope in (spec_pb2.SCOPE_PER_TENSOR, spec_pb2.SCOPE_GLOBAL):
        return selection.scope
    raise InvalidSpec(f"{path}.scope", f"{selection.scope} is no scope")


def _amount(selection: spec_pb2.Selection, path: str) -> float | int:
    if _chosen(selection, "amount", path) == "count":
        return selection.count
    if not 0.0 <= selection.fraction <= 1.0:
        raise AmountOutOfRange(f"{path}.fraction", f"{selection.fraction} is not in [0, 1]")
    return selection.fraction


def _chosen(message: Message, oneof: str, path: str) -> str:
    chosen: str | None = message.WhichOneof(oneof)
    if chosen is None:
        fields = message.DESCRIPTOR.oneofs_by_name[oneof].fields
        choices = " or ".join(field.name for field in fields)
        raise InvalidSpec(f"{path}.{oneof}", f"{choices} is needed")
    return chosen
