"""Powers of two that bring values to sizes whose squares and sums float32 can hold.

They change no bit of a mantissa. Values of usual sizes are not scaled at all.
"""

import torch
from torch import Tensor

# The largest value has this exponent, or its negative, at most.
MOST_OF_WEIGHT, MOST_OF_GRAM = 20, 40


def exponent_beyond(values: Tensor, most: int) -> int:
    """Finds how far the largest value is from the usual sizes.

    Args:
        values: Float32, finite.
        most: The exponent of the largest usual size.

    Returns:
        The exponent of the power of two that divides the values; 0 if all is well.
    """
    if not values.numel():
        return 0
    lowest, highest = values.aminmax()
    exponent = int(torch.frexp(torch.maximum(highest, -lowest)).exponent)
    return max(exponent - most, 0) + min(exponent + most, 0)


def scaled(values: Tensor, exponent: int) -> Tensor:
    """Multiplies by 2^exponent. Returns the same tensor if that is 1."""
    if exponent == 0:
        return values
    half = exponent // 2  # both factors are normal numbers of float32
    return values.mul(2.0**half).mul_(2.0 ** (exponent - half))
