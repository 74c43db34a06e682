"""Which documents, and which rows of K and V, a rank needs of a sequence cut into equal blocks."""

from itertools import pairwise

import torch
from torch import Tensor


def llama3_flash_attn_prepare_cu_seqlens(
    cu_seqlens: Tensor, causal: bool, rank: int, world_size: int
) -> tuple[Tensor, Tensor, int, int, slice]:
    """Return what the llama3 functions take, for one rank of packed documents.

    With T = total rows / P, rank r holds the global rows [r T, (r + 1) T), wherever documents
    begin. Reads cu_seqlens on the host, which waits for the device: call it once a batch.

    Args:
        cu_seqlens: [documents + 1], an integer dtype, any device: where each document begins in
            the global sequence, then the total. A document may have no rows.
        causal: whether a row sees only rows up to itself; K and V then end with the rank's rows.
        rank: this rank in the group. world_size: P.

    Returns:
        (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, local_k_slice). cu_seqlens_q
        [N + 1] cuts the rank's rows into the N documents that have rows there. local_k_slice is
        the range of global rows that these see, from the start of the first document on, and
        cu_seqlens_k [N + 1] cuts it into the same documents. Both int32 on cu_seqlens' device. If
        causal, a document's last rows in q and in k are one global row, as flash-attn's
        bottom-right alignment wants it.

    Raises:
        TypeError: an argument has another type.
        ValueError: cu_seqlens does not start at 0, decreases, holds no row, or ends with a number
            that P does not divide; rank is none of P.
    """
    starts = _checked(cu_seqlens, causal, rank, world_size)
    local_len = starts[-1] // world_size
    begin, end = rank * local_len, (rank + 1) * local_len
    documents = [
        (start, stop)
        for start, stop in pairwise(starts)
        if start < stop and start < end and begin < stop
    ]
    first, last = documents[0][0], end if causal else documents[-1][1]
    inner = [start for start, _ in documents[1:]]
    cu_q = [row - begin for row in (begin, *inner, end)]
    cu_k = [row - first for row in (first, *inner, last)]
    return (
        torch.tensor(cu_q, dtype=torch.int32, device=cu_seqlens.device),
        torch.tensor(cu_k, dtype=torch.int32, device=cu_seqlens.device),
        _longest(cu_q),
        _longest(cu_k),
        slice(first, last),
    )


def _longest(cu_seqlens: list[int]) -> int:
    return max(stop - start for start, stop in pairwise(cu_seqlens))


def _checked(cu_seqlens: Tensor, causal: bool, rank: int, world_size: int) -> list[int]:
    """Return cu_seqlens as ints, or raise: see `llama3_flash_attn_prepare_cu_seqlens`."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be a tensor, got {type(cu_seqlens).__name__}")
    dtype = cu_seqlens.dtype
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise TypeError(f"cu_seqlens must have an integer dtype, got {dtype}")
    if cu_seqlens.ndim != 1:
        raise ValueError(f"cu_seqlens must have one axis, got shape {list(cu_seqlens.shape)}")
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be True or False, got {causal!r}")
    for name, value in (("rank", rank), ("world_size", world_size)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
    starts = cu_seqlens.tolist()
    if not starts or starts[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {starts}")
    if any(start > stop for start, stop in pairwise(starts)):
        raise ValueError(f"cu_seqlens must not decrease, got {starts}")
    if starts[-1] == 0 or starts[-1] % world_size:
        raise ValueError(
            f"cu_seqlens must end with a positive multiple of {world_size} (world_size), "
            f"got {starts[-1]}"
        )
    return starts
