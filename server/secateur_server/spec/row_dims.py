"""The dimensions of rows, which SCOPE_PER_ROW reads."""

from collections.abc import Mapping, Sequence

from secateur_proto import spec_pb2 as pb
from secateur_server.errors import DimOutOfRange, InvalidSpec, NotStructured, quote
from secateur_server.fields import check_length
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.matching import first_matches

# As PruningSpec in spec.proto says.
MOST_ROW_DIMS = 100_000


def decode_row_dims(
    context: RequestContext, messages: Sequence[pb.RowDim], path: str
) -> dict[str, int]:
    """Decodes the dimensions of rows, by name or glob.

    Args:
        context: The request.
        messages: The dimensions.
        path: Of the messages in the request.

    Raises:
        InvalidSpec: There are too many, or two have the same name.
    """
    check_length(path, messages, MOST_ROW_DIMS, "entries")
    found: dict[str, int] = {}
    for index, message in enumerate(context.each(messages)):
        if message.tensors in found:
            raise InvalidSpec(
                f"{path}[{index}].tensors",
                f"{quote(message.tensors)} is listed twice; list it once",
            )
        found[message.tensors] = message.dim
    return found


def resolve_row_dims(
    context: RequestContext, dims: Mapping[str, int], path: str, known: Mapping[str, str]
) -> dict[str, int]:
    """Finds the dimension of rows of each tensor that has one, and is not 0.

    Args:
        context: The request.
        dims: By name or glob; the first that matches a tensor counts.
        path: Of `dims` in the request.
        known: From every name of the rule's tensors to the tensor.

    Raises:
        UnknownTensor: A name or glob matches no tensor of the rule.
    """
    values = list(dims.values())
    first = first_matches(context, path, list(dims), known, lambda i: f"{path}[{i}].tensors")
    return {name: values[index] for name, index in first.items() if values[index]}


def check_rows(path: str, name: str, shape: Sequence[int], grid: Sequence[int], dim: int) -> None:
    """Refuses a tensor whose units have no rows.

    Args:
        path: Of the selection in the request.
        name: Of the tensor.
        shape: Of the tensor.
        grid: The shape of its units.
        dim: The dimension of its rows.

    Raises:
        NotStructured: The units have fewer than 2 dimensions.
        DimOutOfRange: They do not have the dimension.
    """
    if len(grid) < 2:
        raise NotStructured(
            f"{path}.scope",
            f"{quote(name)} has shape {list(shape)}: rows need units in 2 dimensions or more; "
            "leave it out of the rule, or use SCOPE_PER_TENSOR",
        )
    if not -len(grid) <= dim < len(grid):
        raise DimOutOfRange(
            f"{path}.row_dims",
            f"{dim} is not in [{-len(grid)}, {len(grid)}) of the units of {quote(name)}, whose "
            f"shape is {list(grid)}",
        )
