"""The backward kernel of dq: one source's K, V."""

import triton
import triton.language as tl

from .tile import (
    LOG2_E,
    band_mask,
    band_tiles,
    cast,
    dot,
    load_entry,
    load_program,
    load_tile,
    store_rows,
    tail_tiles,
    tile_start,
)


@triton.jit(
    do_not_specialize=[
        "lse_stride_batch",
        "lse_stride_head",
        "delta_stride_batch",
        "delta_stride_head",
        "n_tiles",
        "n_heads",
        "heads_in_flight",
        "heads",
        "group",
    ]
)
def _bwd_kernel_dq(
    q,
    k,
    v,
    dout,
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    result_ptr,
    lse_stride_batch,
    lse_stride_head,
    delta_stride_batch,
    delta_stride_head,
    dq_strides,
    tiles_ptr,
    entries_ptr,
    n_tiles,
    n_heads,
    heads_in_flight,
    heads,
    group,
    softmax_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
    ADD: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):
    """dq = softmax_scale ds k, ds = p (dout v^T - delta), p = exp(softmax_scale q k^T - lse).

    Grid: n_tiles * B * H, one program a tile of query rows and query head (see load_program); q, k,
    v, dout and their strides as in load_tile; query head h reads key head h // group.
    Writes dq [B, L, H, D] (any float dtype) in the rows of the tiles: stored, or with ADD added.
    Tiles that finish their rows write result instead of dq, of the same strides.
    DOCUMENTS: rows past an entry may be another document's, and never reach a product.
    """
    row, row_end, entry, end_entry, finishes, head = load_program(
        tiles_ptr, n_tiles, n_heads, heads_in_flight
    )
    batch, head = head // heads, head % heads
    q_source, dout_source = (q, q_strides, batch, head), (dout, dout_strides, batch, head)
    key_head = head // group
    k_source, v_source = (k, k_strides, batch, key_head), (v, v_strides, batch, key_head)
    offs_m = row + tl.arange(0, BLOCK_M)
    stored = offs_m < row_end
    qk_scale = softmax_scale * LOG2_E
    lse_ptr += batch.to(tl.int64) * lse_stride_batch + head.to(tl.int64) * lse_stride_head
    lse2 = tl.load(lse_ptr + offs_m, mask=stored, other=float("inf")) * LOG2_E
    delta_ptr += batch.to(tl.int64) * delta_stride_batch + head.to(tl.int64) * delta_stride_head
    delta = tl.load(delta_ptr + offs_m, mask=stored, other=0.0)
    q_tile = load_tile(q_source, row, row_end, HEAD_DIM, BLOCK_M, BLOCK_D, TMA, True)
    dout_tile = load_tile(dout_source, row, row_end, HEAD_DIM, BLOCK_M, BLOCK_D, TMA, True)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for e in range(entry, end_entry):
        begin, end, lo, hi = load_entry(entries_ptr, e)
        first, last, n_left, n_full, n_edge = band_tiles(begin, end, lo, hi, row, row_end, BLOCK_N)
        n_tail = tail_tiles(first, last, end, n_edge, BLOCK_N) if DOCUMENTS else 0
        n_edge -= n_tail
        # Tiles without a mask, with one, and the one that reaches into another document.
        for KIND in tl.static_range(3 if DOCUMENTS else 2):
            for i in range(n_full if KIND == 0 else (n_edge if KIND == 1 else n_tail)):
                index = i + n_edge if KIND == 2 else i
                start = tile_start(index, first, n_left, n_full, BLOCK_N, KIND > 0)
                k_tile = load_tile(
                    k_source, start, last, HEAD_DIM, BLOCK_N, BLOCK_D, TMA, KIND > 0, KIND == 2
                )
                s = dot(q_tile, tl.trans(k_tile), None)
                v_tile = load_tile(
                    v_source, start, last, HEAD_DIM, BLOCK_N, BLOCK_D, TMA, KIND > 0, KIND == 2
                )
                dp = dot(dout_tile, tl.trans(v_tile), None)
                p = tl.math.exp2(s * qk_scale - lse2[:, None])
                if KIND > 0:
                    offs_n = start + tl.arange(0, BLOCK_N)
                    p = tl.where(band_mask(offs_m, offs_n, lo, hi, last), p, 0.0)
                ds = p * (dp - delta[:, None])
                dq = dot(cast(ds, k_tile.dtype), k_tile, dq)
    dq = dq * softmax_scale
    target = (dq_ptr, result_ptr, dq_strides)
    store_rows(
        dq,
        None,
        target,
        batch,
        head,
        offs_m,
        stored,
        finishes,
        0,
        HEAD_DIM,
        BLOCK_M,
        BLOCK_D,
        ADD,
    )
