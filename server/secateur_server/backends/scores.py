"""Random scores that are stored, as one value for each element."""

import torch
from torch import Tensor

from secateur_server.backends import Span, allocate, backend_for, spans
from secateur_server.backends.pieces import Piece
from secateur_server.backends.randomness import RandomScores
from secateur_server.runtime.context import RequestContext


def stored_scores(context: RequestContext, scores: RandomScores, like: Tensor) -> Tensor:
    """Computes random scores of all elements of a tensor.

    Returns:
        float32, on the device and in the shape of `like`. They compare as the random scores do.
    """
    backend, elements = backend_for(like.device), like.numel()
    keys = allocate(context, 4 * elements, backend).view(torch.int32)

    def fill(span: Span) -> None:
        piece = Piece(span[1] - span[0], scores.part(*span), torch.float32, None)
        keys[slice(*span)] = backend.keys(piece)

    backend.map(context, fill, spans(elements, backend.piece))
    return keys.view(torch.float32).view(like.shape)
