"""Checks that the heads which a shrunk transformer kept can compute together."""

from collections import Counter

from secateur.architectures.transformer import Transformer
from secateur.errors import InvalidStateDict
from secateur.resizing.removal import Removed


def check_kept_heads(model: Transformer, removed: Removed) -> None:
    """Refuses a layer whose KV heads kept different numbers of query heads.

    The shapes of its tensors do not show it: a model of these shapes would give query heads to
    other keys, and compute something else.

    Args:
        model: With the config before.
        removed: What was removed of each tensor.

    Raises:
        InvalidStateDict: The message names the layer.
    """
    layout, heads, kv_heads = model.layout, model.heads, model.kv_heads
    shared = heads // kv_heads
    for layer in range(model.layers):
        at, kind = model.layer(layer), layout.kind
        first = heads if layout.qkv[0] == layout.qkv[1] else 0  # fused: keys are behind queries
        queries = _kept(model, removed, at + layout.o + kind.suffix, kind.input, 0, heads)
        keys = _kept(model, removed, at + layout.qkv[1] + kind.suffix, kind.output, first, kv_heads)
        counts = Counter(query // shared for query in queries)
        if counts.keys() != keys or len(set(counts.values())) > 1:
            listed = ", ".join(f"{counts[head]}" for head in range(kv_heads))
            raise InvalidStateDict(
                f"{at}{layout.o}: its {kv_heads} KV heads kept {listed} query heads; all must keep "
                "the same number: prune the same fraction of each group, with scope='tensor'"
            )


def _kept(
    model: Transformer, removed: Removed, weight: str, dim: int, first: int, heads: int
) -> set[int]:
    """The heads that keep slices of a tensor, which has the slices of `first` others before."""
    gone = {index for one in removed.get(weight, ()) if one.dim == dim for index in one.slices}
    width = model.head_dim
    return {head for head in range(heads) if not _slices(first + head, width) <= gone}


def _slices(head: int, width: int) -> set[int]:
    return set(range(head * width, (head + 1) * width))
