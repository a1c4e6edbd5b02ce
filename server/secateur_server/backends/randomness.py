"""Random scores that are computed where they are needed: they are never stored."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# The constants of SplitMix64, as int64.
GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
MIX_2 = 0x94D049BB133111EB - (1 << 64)


@dataclass(frozen=True)
class RandomScores:
    """Scores from one stream of numbers, as pieces.Scores.

    state: of the stream, an int64.  begin: the first one.
    """

    state: int
    begin: int = 0

    dtype = torch.float32  # its keys have 32 bits
    stored = None

    @property
    def stream(self) -> tuple[int, int]:
        return self.state, self.begin

    def part(self, begin: int, end: int) -> "RandomScores":
        return RandomScores(self.state, self.begin + begin)

    def keys(
        self, dtype: torch.dtype, units: int, make_random: Callable[["RandomScores", int], Tensor]
    ) -> Tensor:
        return make_random(self, units)

    bits = keys

    def keys_at(self, dtype: torch.dtype, index: Tensor) -> Tensor:
        return random_keys(self, index)


def random_scores(seed: int, name: str) -> RandomScores:
    """The scores of a tensor: they depend on the seed and the tensor's name alone."""
    digest = hashlib.sha256(seed.to_bytes(8, "little") + name.encode()).digest()
    return RandomScores(int.from_bytes(digest[:8], "little", signed=True))


def random_keys(scores: RandomScores, index: Tensor) -> Tensor:
    """Pseudo-random keys of the units at `index`, int64.

    The top 30 bits of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number
    generators, OOPSLA 2014), which can begin anywhere in its stream.  Returns: int32, in [0, 2^30).
    """
    z = index + (scores.begin + 1)
    z.mul_(GAMMA).add_(scores.state)
    z.bitwise_xor_(_shifted(z, 30)).mul_(MIX_1)
    z.bitwise_xor_(_shifted(z, 27)).mul_(MIX_2)
    z.bitwise_xor_(_shifted(z, 31))
    return _shifted(z, 34).to(torch.int32)


def _shifted(words: Tensor, by: int) -> Tensor:
    """A logical shift right; torch's keeps the sign."""
    return (words >> by) & ((1 << (64 - by)) - 1)
