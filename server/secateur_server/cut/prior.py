"""Elements that count as pruned before the rules of a call."""

from collections.abc import Collection, Mapping

from secateur_server.report.measure import nonzero_mask
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.parameter import Parameter


def prune_zeros(
    context: RequestContext, parameters: Mapping[str, Parameter], named: Collection[str]
) -> dict[str, Parameter]:
    """Masks the zeros of tensors.

    This is torch.nn.utils.prune.custom_from_mask with the mask `weight != 0`.

    Args:
        context: The request.
        parameters: In the order of the state_dict. Not changed.
        named: The names of the tensors.

    Returns:
        All parameters, in the same order.
    """
    return {
        name: parameter._replace(mask=nonzero_mask(context, parameter))
        if name in named and not parameter.is_nonzero
        else parameter
        for name, parameter in context.each(parameters.items())
    }
