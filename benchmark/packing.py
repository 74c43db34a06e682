"""Which documents a sequence holds: one, or lengths as they occur in training."""

from itertools import accumulate
from typing import NamedTuple

import numpy as np
import timing

BATCH, ONE, STATED = "batch", "one", "stated"
SHORTEST, LONGEST = 128, 16384


class Packing(NamedTuple):
    """A sequence of documents, or a batch of sequences of one document each.

    Attributes:
        name: column `packing`.
        lengths: global rows of each document, in order.
    """

    name: str
    lengths: tuple[int, ...]

    @property
    def cu_seqlens(self) -> tuple[int, ...]:
        """Where each document begins in global rows, then their total."""
        return tuple(accumulate(self.lengths, initial=0))

    def flops(
        self,
        batch: int,
        heads: int,
        head_dim: int,
        causal: bool,
        window: timing.Window,
        pass_: str,
    ) -> float:
        """Return the floating-point operations over all documents, as `timing.flops` of each."""
        mask = causal, window, pass_
        return sum(timing.flops(batch, n, heads, head_dim, *mask) for n in self.lengths)


def pack(name: str, local_len: int, world_size: int) -> Packing:
    """Return a packing of `local_len` rows a rank; `batch` and `one` are one document."""
    total = local_len * world_size
    return Packing(name, stated(local_len, world_size) if name == STATED else (total,))


def stated(local_len: int, world_size: int) -> tuple[int, ...]:
    """Return document lengths, log-uniform in 128 to 16384, that fill `local_len` rows a rank.

    Seed 0; each is a multiple of 2P, the last is cut to the total. Both ends of the range shrink
    with a total below 8192, so that small sequences hold several documents too.

    Raises:
        ValueError: an odd local_len, which no such lengths fill.
    """
    if local_len % 2:
        raise ValueError(f"local_len must be even, got {local_len}")
    unit, left = 2 * world_size, local_len * world_size
    longest = min(LONGEST, 2 * left)
    ends = np.log(longest * SHORTEST / LONGEST), np.log(longest)
    draws, lengths = np.random.default_rng(0), []
    while left:
        length = round(float(np.exp(draws.uniform(*ends))) / unit) * unit
        lengths.append(min(max(length, unit), left))
        left -= lengths[-1]
    return tuple(lengths)
