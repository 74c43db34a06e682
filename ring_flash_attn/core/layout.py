"""Where each local row sits in the global sequence.

A layout is a list of runs: `Run(row, n, pos, stride)` says that local rows [row, row + n) hold the
global positions pos, pos + stride, ... Position arrays are derived from runs, never the reverse.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

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

    def shard(self, x: Tensor, rank: int, dim: int = 1) -> Tensor:
        """Return the rows of `rank`, in local order, as a contiguous copy.

        Args:
            x: a global tensor, `global_len` rows along `dim`, any dtype and device; read.

        Raises:
            ValueError: rank is none of the layout's, or x has another number of rows.
        """
        check_rank(rank, self.world_size)
        check_rows("x", x, dim, self.global_len)
        return take_rows(x, self.positions(rank), dim)

    def unshard(self, parts: Sequence[Tensor], dim: int = 1) -> Tensor:
        """Return the global tensor whose `shard` of rank r is parts[r].

        Args:
            parts: P local tensors in rank order, `local_len` rows along `dim`, of one dtype and
                device; read.

        Raises:
            ValueError: another number of parts, or a part has another number of rows.
        """
        check_parts(parts, self.world_size, dim, self.local_len)
        held = [row for rank in range(self.world_size) for row in self.positions(rank)]
        return join_rows(parts, held, dim)


def check_rank(rank: int, world_size: int) -> None:
    """Raise unless rank is one of 0, ..., world_size - 1."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, {world_size}), got {rank}")


def check_rows(name: str, x: Tensor, dim: int, rows: int) -> None:
    """Raise unless x has `rows` rows along `dim`."""
    if x.shape[dim] != rows:
        raise ValueError(f"{name} must have {rows} rows along dim {dim}, got shape {list(x.shape)}")


def check_parts(parts: Sequence[Tensor], world_size: int, dim: int, rows: int) -> None:
    """Raise unless parts are one tensor a rank, each with `rows` rows along `dim`."""
    if len(parts) != world_size:
        raise ValueError(f"parts must be {world_size} tensors, one a rank, got {len(parts)}")
    for rank, part in enumerate(parts):
        check_rows(f"parts[{rank}]", part, dim, rows)


def take_rows(x: Tensor, rows: Sequence[int], dim: int) -> Tensor:
    """Return a contiguous copy of these rows of x."""
    return x.index_select(dim, torch.tensor(rows, dtype=torch.long, device=x.device))


def join_rows(parts: Sequence[Tensor], held: Sequence[int], dim: int) -> Tensor:
    """Return the global tensor of which the parts, one after the other, hold the rows `held`."""
    local_row = torch.tensor(held, dtype=torch.long, device=parts[0].device).argsort()
    return torch.cat(tuple(parts), dim).index_select(dim, local_row)
