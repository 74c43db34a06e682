"""Where each local row sits in the global sequence.

A layout is a list of runs: `Run(row, n, pos, stride)` says that local rows [row, row + n) hold the
global positions pos, pos + stride, ... Position arrays are derived from runs, never the reverse.
"""

from dataclasses import dataclass
from typing import NamedTuple

KINDS = ("contiguous", "zigzag", "stripe")


class Run(NamedTuple):
    """Local rows [row, row + n) at global positions pos + stride * (0, 1, ..., n - 1)."""

    row: int
    n: int
    pos: int
    stride: int


@dataclass(frozen=True)
class Layout:
    """Place `local_len` rows of each of `world_size` ranks in one global sequence.

    Attributes:
        kind: `contiguous` (rank r holds the r-th block), `zigzag` (blocks r and 2P - 1 - r of 2P,
            which balances causal work) or `stripe` (positions r, r + P, r + 2P, ...).
        local_len: rows a rank; even for zigzag.
        world_size: P.
    """

    kind: str
    local_len: int
    world_size: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"layout must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.kind == "zigzag" and self.local_len % 2:
            raise ValueError(
                f"zigzag needs an even local length (two blocks a rank), got {self.local_len}"
            )

    @property
    def global_len(self) -> int:
        return self.local_len * self.world_size

    def runs(self, rank: int) -> tuple[Run, ...]:
        """Return the runs of `rank`, in row order."""
        n, size = self.local_len, self.world_size
        if self.kind == "contiguous":
            return (Run(0, n, rank * n, 1),)
        if self.kind == "stripe":
            return (Run(0, n, rank, size),)
        half = n // 2
        mirror = 2 * size - 1 - rank
        return (Run(0, half, rank * half, 1), Run(half, half, mirror * half, 1))

    def positions(self, rank: int) -> list[int]:
        """Return the global position of each local row of `rank` (for tests and RoPE)."""
        return [run.pos + run.stride * i for run in self.runs(rank) for i in range(run.n)]
