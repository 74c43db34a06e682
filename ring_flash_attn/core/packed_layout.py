"""Where each local row sits in a global sequence of packed documents."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from .layout import KINDS, Layout, check_parts, check_rank, check_rows, join_rows, take_rows

PACKED_KINDS = (*KINDS, "gather")


@dataclass(frozen=True)
class PackedLayout:
    """Place documents, packed end to end in one global sequence, on the ranks.

    Attributes:
        kind: a kind of `Layout`, which then places every document by itself, a rank's shares of
            the documents packed in the documents' order; or `gather` (llama3's), where rank r
            holds the r-th of P equal blocks of the packed rows, wherever documents begin.
        cu_seqlens: where each document begins in global rows, then their total; host ints. P
            divides the length of every document (2P for zigzag), for gather only the total.
        world_size: P.
    """

    kind: str
    cu_seqlens: tuple[int, ...]
    world_size: int

    def __post_init__(self) -> None:
        if self.kind not in PACKED_KINDS:
            raise ValueError(f"kind must be one of {', '.join(PACKED_KINDS)}, got {self.kind!r}")
        if self.world_size < 1:
            raise ValueError(f"world_size must be at least 1, got {self.world_size}")
        self._check_cu_seqlens()
        if self.kind == "gather":
            if self.total % self.world_size:
                raise ValueError(
                    f"cu_seqlens must end with a multiple of {self.world_size} (the ranks) in the "
                    f"gather layout, got {self.total}"
                )
            return
        factor = 2 * self.world_size if self.kind == "zigzag" else self.world_size
        for document, (start, stop) in enumerate(pairwise(self.cu_seqlens)):
            if (stop - start) % factor:
                raise ValueError(
                    f"cu_seqlens must give every document a multiple of {factor} rows in the "
                    f"{self.kind} layout of {self.world_size} ranks, got {stop - start} rows in "
                    f"document {document}"
                )

    def _check_cu_seqlens(self) -> None:
        cu_seqlens = self.cu_seqlens
        if not isinstance(cu_seqlens, tuple) or not all(type(c) is int for c in cu_seqlens):
            raise TypeError(f"cu_seqlens must be a tuple of ints, got {cu_seqlens!r}")
        if not cu_seqlens or cu_seqlens[0] != 0:
            raise ValueError(f"cu_seqlens must start at 0, got {cu_seqlens}")
        if any(start > stop for start, stop in pairwise(cu_seqlens)):
            raise ValueError(f"cu_seqlens must not decrease, got {cu_seqlens}")

    @property
    def total(self) -> int:
        """Global rows of all documents."""
        return self.cu_seqlens[-1]

    @property
    def local_total(self) -> int:
        """Rows of each rank (T)."""
        return self.total // self.world_size

    @property
    def local_cu_seqlens(self) -> tuple[int, ...]:
        """Where each document begins in local rows, then T: equal on every rank.

        Raises:
            ValueError: for gather, where it differs from rank to rank.
        """
        if self.kind == "gather":
            raise ValueError(
                "kind gather has local_cu_seqlens that differ from rank to rank and between q and "
                "k: call llama3_flash_attn_prepare_cu_seqlens"
            )
        return tuple(start // self.world_size for start in self.cu_seqlens)

    @property
    def max_seqlen(self) -> int:
        """Local rows of the longest document; raises for gather as `local_cu_seqlens` does."""
        return max((stop - start for start, stop in pairwise(self.local_cu_seqlens)), default=0)

    def rows(self, rank: int) -> list[int]:
        """Return the global packed row of each local row of `rank`."""
        check_rank(rank, self.world_size)
        if self.kind == "gather":
            return list(range(rank * self.local_total, (rank + 1) * self.local_total))
        rows = []
        for start, stop in pairwise(self.cu_seqlens):
            document = Layout(self.kind, (stop - start) // self.world_size, self.world_size)
            rows += [start + position for position in document.positions(rank)]
        return rows

    def positions(self, rank: int) -> list[int]:
        """Return the position of each local row of `rank` in its own document (for RoPE)."""
        starts = self.cu_seqlens
        return [row - starts[bisect_right(starts, row) - 1] for row in self.rows(rank)]

    def shard(self, x: Tensor, rank: int, dim: int = 0) -> Tensor:
        """Return the rows of `rank` of a global tensor x, in local order, as a contiguous copy.

        Raises:
            ValueError: rank is none of the layout's, or x has not `total` rows along `dim`.
        """
        check_rows("x", x, dim, self.total)
        return take_rows(x, self.rows(rank), dim)

    def unshard(self, parts: Sequence[Tensor], dim: int = 0) -> Tensor:
        """Return the global tensor whose `shard` of rank r is parts[r].

        Raises:
            ValueError: not P parts, or a part has not `local_total` rows along `dim`.
        """
        check_parts(parts, self.world_size, dim, self.local_total)
        held = [row for rank in range(self.world_size) for row in self.rows(rank)]
        return join_rows(parts, held, dim)
