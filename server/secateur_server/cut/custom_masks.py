"""Prunes by masks that the caller sends."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from secateur_server.backends.masks import Mask
from secateur_server.cut.choice import Choice
from secateur_server.cut.scored import Masks
from secateur_server.errors import InvalidMask, quote
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.rules import CustomMasks
from secateur_server.state_dict.given_masks import to_mask
from secateur_server.state_dict.parameter import Parameter


def apply_masks(
    context: RequestContext,
    rule: CustomMasks,
    state: Mapping[str, Parameter],
    extras: Mapping[str, Tensor],
) -> tuple[Masks, Sequence[Choice]]:
    """Makes the masks of the tensors that a rule has masks for.

    Args:
        context: The request.
        rule: Resolved.
        state: All parameters.
        extras: Uploaded masks.

    Returns:
        The masks, prior masks included, and a choice for each.

    Raises:
        InvalidMask: A value is neither 0 nor 1.
    """
    masks: Masks = {}
    choices: list[Choice] = []
    for name, holder in context.each(rule.masks):
        field = f"{rule.path}.masks[{quote(name)}]"
        values, weight = extras[holder], state[name].weight
        if values.shape == weight.shape:
            asked = to_mask(context, values, InvalidMask, field)
        else:
            asked = _packed_mask(values, weight.numel(), field)
        before = masks.get(name, state[name].mask)
        masks[name] = asked if before is None else asked.both(context, before)
        candidates = asked.elements if before is None else before.kept(context)
        requested = asked.elements - asked.kept(context)
        choices.append(
            Choice((name,), candidates, requested, candidates - masks[name].kept(context))
        )
    return masks, choices


def _packed_mask(bits: Tensor, elements: int, field: str) -> Mask:
    """A mask of bits, as results have them. Raises InvalidMask."""
    if elements % 8 and int(bits[-1]) >> elements % 8:
        raise InvalidMask(
            field,
            f"bits after the last of {elements} elements are not 0; fill the last byte with 0",
        )
    return Mask(bits, elements)
