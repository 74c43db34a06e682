"""Attention over packed documents with every choice spelled out, and the checks before it.

As api.py for batches: every public form comes down to these.
"""

import zlib
from itertools import pairwise

import torch.distributed as dist
from torch import Tensor

from ..backends import needs_lengths, select_backend
from ..ranks import ranks_of
from .agree import agreement
from .api import note_call
from .choose import Route, wanted_exchange
from .function import Call, RingAttention
from .gather import GatheredCall
from .packed import Documents, on_device, on_host, plan_gathered, plan_packed
from .traffic import packed_traffic
from .validate import (
    check_attention,
    check_cu_seqlens,
    check_positive,
    check_slice,
    check_tensor,
    check_tensors,
    check_transport,
)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    layout: str = "contiguous",
    backend: str = "native",
    group: dist.ProcessGroup | None = None,
    exchange: str | None = None,
    **options,
) -> tuple[Tensor, Tensor]:
    """Attend within packed documents sharded over `group`, K and V travelling a ring.

    Args:
        q: [T, H, D], k, v: [T, Hk, D], this rank's rows of all documents.
        cu_seqlens: [N + 1] int32 on q's device, local. max_seqlen: the longest one's local rows.
        layout: `contiguous`, `zigzag` or `stripe`: how each document is placed, as in `Layout`.
        backend, exchange: as in `ring_attention`.
        options: softmax_scale, causal, window_size, deterministic, as in `ring_attention`.

    Returns:
        out [T, H, D] in q's dtype and lse [H, T], natural log, float32 (float64 for float64). Both
        are differentiable. Rows of no document have out 0, lse -inf and gradients 0.

    Raises:
        TypeError, ValueError, NotImplementedError: as `ring_attention`.
    """
    with agreement(group, q) as same:
        given = *as_batch(q, k, v), cu_seqlens, max_seqlen
        call = packed_call(*given, layout, backend, group, same, exchange, **options)
    return RingAttention.apply(q, k, v, call)


def gathered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    heads_k_stride: int,
    local_k_slice: slice,
    *,
    backend: str = "native",
    group: dist.ProcessGroup | None = None,
    **options,
) -> tuple[Tensor, Tensor]:
    """Attend within packed documents whose total is cut into P equal shards, K and V gathered.

    Args:
        q: [T, H, D], k, v: [T, Hk, D]: rows [r T, (r + 1) T) of the packed total on rank r.
        cu_seqlens_q, ..., local_k_slice: as in `gathered_call`.
        backend, options: as in `packed_attention`.

    Returns:
        out [T, H, D] in q's dtype and lse [H, T], as `packed_attention`.
    """
    prepared = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, heads_k_stride, local_k_slice
    with agreement(group, q) as same:
        call = gathered_call(*as_batch(q, k, v), *prepared, backend, group, same, **options)
    return RingAttention.apply(q, k, v, call)


def as_batch(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return packed q [T, H, D], k, v [T, Hk, D] as a batch of one."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x, ("T", "H" if name == "q" else "Hk", "D"))
    return q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)


def packed_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    layout: str,
    backend: str,
    group: dist.ProcessGroup | None,
    same: dict[str, str] | None,
    exchange: str | None = None,
    **options,
) -> Call:
    """Check every argument of a ring over packed documents.

    Args:
        q: [1, T, H, D], k, v: [1, T, Hk, D]. cu_seqlens: [N + 1] int32, local. max_seqlen: the
            longest document's local rows.
        same, exchange, options: as in `ring_call`.

    The numbers in cu_seqlens are read and checked on calls that ranks compare (see `agreement`),
    wherever they are on the CPU, and for a backend that needs them (`needs_lengths`). On a GPU that
    is a host sync. Where they are not, a zigzag document of odd local length gets NaN in its last
    row; from a native backend also one of more than max_seqlen rows.
    """
    check_tensors(q, k, v)
    attention = check_attention(q.shape[-1], **options)
    check_transport(group, q)
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"k must have q's {q.shape[1]} packed rows, got {k.shape[1]}")
    check_cu_seqlens("cu_seqlens", cu_seqlens, q)
    check_positive("max_seqlen", max_seqlen)
    runs = select_backend(backend, attention, q, k, v)
    documents = Documents(cu_seqlens, cu_seqlens, q.shape[1], k.shape[1], max_seqlen, max_seqlen)
    rank, size, *_ = ranks_of(group)
    wanted = wanted_exchange(exchange, runs.name)
    plan = plan_packed(attention, layout, size, rank)
    route = Route(packed_traffic(attention, layout, size, rank, k.shape[1]), wanted)
    why_read = needs_lengths(runs, plan, documents)
    if why_read or same is not None or not cu_seqlens.is_cuda:
        edges, _ = documents.edges
        _check_edges("cu_seqlens", edges, q.shape[1], max_seqlen)
        if layout == "zigzag":
            _check_even(edges)
        if same is not None:
            note_call(same, attention, q, k, layout)
            same["cu_seqlens"] = _summary(edges)
            same["exchange"] = str(wanted)
    placed = on_host(plan, documents) if why_read else on_device(plan, documents)
    return Call(attention, placed, runs, group, route)


def gathered_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    heads_k_stride: int,
    local_k_slice: slice,
    backend: str,
    group: dist.ProcessGroup | None,
    same: dict[str, str] | None,
    **options,
) -> GatheredCall:
    """Check every argument of a call that gathers K, V by slices of heads.

    Args:
        q: [1, T, H, D], k, v: [1, T, Hk, D]: rows [r T, (r + 1) T) of the packed total on rank r.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, local_k_slice: what
            `llama3_flash_attn_prepare_cu_seqlens` returns.
        heads_k_stride: key heads gathered at a time; divides Hk.
        same, options: as in `ring_call`.
    """
    check_tensors(q, k, v)
    attention = check_attention(q.shape[-1], **options)
    check_transport(group, q)
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"k must have q's {q.shape[1]} packed rows, got {k.shape[1]}")
    (rank, size, *_), rows = ranks_of(group), q.shape[1]
    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q)
    check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, q)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"cu_seqlens_k must name as many documents as cu_seqlens_q, {len(cu_seqlens_q) - 1}, "
            f"got {len(cu_seqlens_k) - 1}"
        )
    check_positive("max_seqlen_q", max_seqlen_q)
    check_positive("max_seqlen_k", max_seqlen_k)
    check_positive("heads_k_stride", heads_k_stride)
    if k.shape[2] % heads_k_stride:
        raise ValueError(f"heads_k_stride must divide k's {k.shape[2]} heads, got {heads_k_stride}")
    check_slice("local_k_slice", local_k_slice, size * rows)
    key_rows = local_k_slice.stop - local_k_slice.start
    runs = select_backend(backend, attention, q, k, v)
    documents = Documents(cu_seqlens_q, cu_seqlens_k, rows, key_rows, max_seqlen_q, max_seqlen_k)
    plan = plan_gathered(attention, rank * rows - local_k_slice.start)
    why_read = needs_lengths(runs, plan, documents)
    if why_read or same is not None or not cu_seqlens_q.is_cuda:
        q_edges, k_edges = documents.edges
        _check_edges("cu_seqlens_q", q_edges, rows, max_seqlen_q)
        _check_edges("cu_seqlens_k", k_edges, key_rows, max_seqlen_k)
        if same is not None:
            note_call(same, attention, q, k, "gathered")
            same["heads_k_stride"] = str(heads_k_stride)
    return GatheredCall(
        attention,
        on_host(plan, documents) if why_read else on_device(plan, documents),
        runs,
        group,
        heads_k_stride,
        local_k_slice,
    )


def _check_edges(name: str, edges: list[int], rows: int, max_seqlen: int) -> None:
    """Raise unless the numbers in a cu_seqlens cut `rows` rows into documents."""
    if edges[0] != 0:
        raise ValueError(f"{name} must start at 0, got {edges[0]}")
    for index, (begin, end) in enumerate(pairwise(edges)):
        if end < begin:
            raise ValueError(f"{name} must not decrease, got {begin}, {end} at document {index}")
        if end - begin > max_seqlen:
            of = name.replace("cu_seqlens", "max_seqlen")
            raise ValueError(
                f"{of} must be at least the longest document's rows, got {max_seqlen} and "
                f"{end - begin} rows in document {index} of {name}"
            )
    if edges[-1] > rows:
        raise ValueError(f"{name} must end within the {rows} packed rows, got {edges[-1]}")


def _check_even(edges: list[int]) -> None:
    for index, (begin, end) in enumerate(pairwise(edges)):
        if (end - begin) % 2:
            raise ValueError(
                "cu_seqlens must hold even local lengths in the zigzag layout (two halves a rank), "
                f"got {end - begin} rows in document {index}"
            )


def _summary(edges: list[int]) -> str:
    """Return the numbers in words short enough for an error of many ranks."""
    if len(edges) <= 9:
        return str(edges)
    return (
        f"{len(edges) - 1} documents of {edges[-1]} rows, crc32 {zlib.crc32(str(edges).encode())}"
    )
