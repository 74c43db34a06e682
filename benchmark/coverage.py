"""Which cases a benchmark of one GPU times: what is asked for, or a set that covers the inputs."""

from itertools import product
from typing import NamedTuple

import timing
from packing import BATCH, STATED, Packing, pack

MASKS = ("causal", "full", "window")
COVERED_WINDOW = 4096
TOKENS = 16384  # of a batch of short sequences
# Heads by head dim: 2048 columns, as FlashAttention's papers have.
HEADS = {64: 32, 128: 16, 256: 8}


class Shape(NamedTuple):
    """Sizes of one case."""

    batch: int
    length: int
    heads: int
    key_heads: int
    head_dim: int


class Case(NamedTuple):
    """What is timed in turn: a shape, a mask, and whether its rows are packed documents.

    Attributes:
        mask: one of MASKS; window is causal too.
        packed: batch, one or stated, see packing.py; but for batch the shape's batch is 1.
    """

    shape: Shape
    mask: str
    packed: str = BATCH

    def __str__(self) -> str:
        batch, length, heads, key_heads, head_dim = self.shape
        shape = f"{batch},{length},{heads}/{key_heads},{head_dim} {self.mask}"
        return shape if self.packed == BATCH else f"{shape} {self.packed}"

    @property
    def packing(self) -> Packing:
        """The documents; of a batch those of one sequence of it."""
        return pack(self.packed, self.shape.length, 1)

    def window(self, tokens: int) -> timing.Window:
        """Return the window, `tokens` to the left if the mask has one."""
        return (tokens, 0) if self.mask == "window" else (-1, -1)

    def flops(self, window: int, pass_: str) -> float:
        """Return the floating-point operations of a pass, see timing.flops."""
        batch, _, heads, _, head_dim = self.shape
        mask = self.mask != "full", self.window(window)
        return self.packing.flops(batch, heads, head_dim, *mask, pass_)


def shape(text: str) -> Shape:
    """Parse B,S,H/Hk,D."""
    batch, length, heads, head_dim = text.split(",")
    query, _, key = heads.partition("/")
    return Shape(int(batch), int(length), int(query), int(key or query), int(head_dim))


def asked(shapes: list[Shape], masks: list[str], packed: list[str]) -> list[Case]:
    """Return every shape under every mask, as a batch and packed; packed has a batch of one."""
    found = [Case(*case) for case in product(shapes, masks, packed)]
    return [case for case in found if case.packed == BATCH or case.shape.batch == 1]


def covering() -> list[Case]:
    """Return cases of every head dim, mask, length, head ratio and packing, not their product.

    Lengths of 1k to 16k for all, of 64k causal; 4 query heads a key head at 16k, 64k and packed; a
    window at 16k and, where it hides most, at 64k.
    """
    cases = []
    for head_dim in HEADS:
        for mask in ("causal", "full"):
            cases += [Case(_shape(n, head_dim), mask) for n in (1024, 4096, 16384)]
        cases += [Case(_shape(n, head_dim, 4), "causal") for n in (16384, 65536)]
        cases.append(Case(_shape(16384, head_dim), "window"))
        cases.append(Case(_shape(32768, head_dim, 4), "causal", STATED))
    cases.append(Case(_shape(65536, 128), "full"))
    cases.append(Case(_shape(65536, 128, 4), "window"))
    cases.append(Case(_shape(65536, 128, 4), "causal", STATED))
    cases.append(Case(_shape(32768, 128), "full", STATED))
    cases.append(Case(_shape(32768, 128, 4), "window", STATED))
    return cases


def part_of(cases: list[Case], part: tuple[int, int], window: int) -> list[Case]:
    """Return part i of n (from 1), which takes about as long as each of the others."""
    index, count = part
    longest_first = sorted(cases, key=lambda case: -case.flops(window, "fwd"))
    # To and fro, so that no part has the longest of every round.
    mine = [case for number, case in enumerate(longest_first) if _dealt(number, count) == index - 1]
    return sorted(mine, key=cases.index)


def part(text: str) -> tuple[int, int]:
    """Parse i/n.

    Raises:
        ValueError: not 1 <= i <= n.
    """
    index, count = (int(x) for x in text.split("/"))
    if not 1 <= index <= count:
        raise ValueError(f"part must be i/n with 1 <= i <= n, got {text}")
    return index, count


def _dealt(number: int, count: int) -> int:
    turn, place = divmod(number, count)
    return count - 1 - place if turn % 2 else place


def _shape(length: int, head_dim: int, group: int = 1) -> Shape:
    heads = HEADS[head_dim]
    return Shape(max(1, TOKENS // length), length, heads, heads // group, head_dim)
