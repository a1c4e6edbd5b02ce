"""Smaller torch modules, and their sizes as plain data."""

from collections.abc import Mapping
from typing import Any

from secateur.checks import text_keys
from secateur.tensors import torch_for


def sizes(module: Any) -> dict[str, Any]:
    """Returns the sizes of a torch.nn.Module's layers, as JSON can hold them.

    With its state_dict they are all that `resize` needs to make the module again.

    Args:
        module: For example what PruneResult.shrink returned.

    Returns:
        The shape of each tensor of the state_dict, and the `groups` of each convolution.
    """
    torch_for("sizes")
    from secateur.resizing import sizes_of

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
    from secateur.resizing import resized

    return resized(module, text_keys("sizes", sizes, "names to sizes"))
