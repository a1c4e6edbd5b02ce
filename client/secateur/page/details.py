"""Encodes the details of a tensor for a page."""

import base64
from typing import Any

import numpy as np

from secateur.details import Image, TensorDetails
from secateur.page.views import finite
from secateur.report import TensorReport

# The groups of which a page says how many hold.
_PATTERNS = ((1, 2), (1, 4), (2, 4), (2, 8), (4, 8), (4, 16), (8, 16))


def encode_details(tensor: TensorReport, threshold: float | None) -> dict[str, Any]:
    """Encodes what a page shows of one tensor.

    Args:
        tensor: The tensor.
        threshold: The magnitude up to which a rule pruned; None if there is no such one.
    """
    details = tensor.details
    blocks = [[of.side, of.zero, of.total] for of in tensor.zero_blocks]
    if details is None:
        return {"blocks": blocks}
    return {
        "blocks": blocks,
        "histogram": _histogram(details, threshold),
        "patterns": [
            [f"{n}:{m}", details.share(n, m)] for n, m in _PATTERNS if m in details.groups
        ],
        "images": [_image(image) for image in details.images],
        "slices": [
            [dim, int(flags.sum()), tensor.shape[dim], _packed(flags), len(flags)]
            for dim, flags in details.zero_slices.items()
        ],
    }


def _histogram(details: TensorDetails, threshold: float | None) -> dict[str, Any]:
    found = details.histogram
    return {
        "largest": finite(found.largest),
        "kept": found.kept.tolist(),
        "pruned": found.pruned.tolist(),
        "zeros": found.zeros,
        "nonFinite": found.non_finite,
        "threshold": None if threshold is None else finite(threshold),
    }


def _image(image: Image) -> dict[str, Any]:
    height, width = image.pixels.shape
    is_bits = image.pixels.dtype == np.bool_
    return {
        "rows": image.rows,
        "columns": image.columns,
        "height": height,
        "width": width,
        "isBits": is_bits,
        "pixels": _packed(image.pixels) if is_bits else _text(image.pixels.tobytes()),
    }


def _packed(flags: Any) -> str:
    return _text(np.packbits(flags.reshape(-1), bitorder="little").tobytes())


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
