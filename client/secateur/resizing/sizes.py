"""Smaller torch modules, and their sizes as plain data."""

from collections.abc import Iterable, Mapping
from typing import Any

from secateur.resizing.removal import removed_slices
from secateur.shrinkage import Shrinkage
from secateur.tensors import torch_for
from secateur_proto import spec_pb2 as pb


def sizes(module: Any) -> dict[str, Any]:
    """Returns the sizes of a torch.nn.Module's layers, as JSON can hold them.

    With its state_dict they are all that `resize` needs to make the module again.

    Args:
        module: For example what PruneResult.shrink returned.

    Returns:
        The shape of each tensor of the state_dict, the `groups` of each convolution, and the
        integer attributes of other modules, among which are counts of heads.
    """
    torch_for("sizes")
    from secateur.resizing.modules import sizes_of

    return sizes_of(module)


def resize(module: Any, sizes: Mapping[str, Any]) -> Any:
    """Returns a copy of a torch.nn.Module whose layers have other sizes, for load_state_dict.

        torch.save(small.state_dict(), "small.pt")
        Path("small.json").write_text(json.dumps(secateur.sizes(small)))
        ...
        small = secateur.resize(Net(), json.loads(Path("small.json").read_text()))
        small.load_state_dict(torch.load("small.pt"))

    Tensors that get another shape are zero. The module is unchanged.

    Args:
        module: One of the class and with the sizes that were pruned.
        sizes: What `sizes` returned; or the shapes of some tensors by their names.

    Raises:
        InvalidSpec: A size is not one of a tensor of the module.
        InvalidStateDict: Sizes of a layer do not fit each other; the message names it.
    """
    torch_for("resize")
    from secateur.resizing.modules import resized

    return resized(module, sizes)


def shrink(
    module: Any,
    entries: Mapping[str, Any],
    groups: Iterable[pb.Group],
    shrinkage: Shrinkage,
    example_inputs: Any,
) -> Any:
    """Returns a smaller copy of a module; see PruneResult.shrink.

    Args:
        module: The one that was pruned.
        entries: The whole shrunk model; tensors are torch's.
        groups: As they were sent.
        shrinkage: What was removed.
        example_inputs: To compare with the masked module, or None.
    """
    import torch

    from secateur.resizing.modules import shrunk

    tensors = {name: value for name, value in entries.items() if isinstance(value, torch.Tensor)}
    dims = {name: tensor.ndim for name, tensor in tensors.items()}
    return shrunk(module, tensors, removed_slices(groups, shrinkage.groups, dims), example_inputs)
