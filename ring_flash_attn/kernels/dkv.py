"""The backward kernel of dk and dv: one source's K, V."""

import triton
import triton.language as tl

from .tile import (
    LOG2_E,
    band_mask,
    band_tiles,
    cast,
    dot,
    load_entry,
    load_pair,
    load_program,
    load_tile,
    source_offset,
    store_rows,
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
        "span",
    ]
)
def _bwd_kernel_dkv(
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
    dk_ptr,
    dv_ptr,
    lse_stride_batch,
    lse_stride_head,
    delta_stride_batch,
    delta_stride_head,
    dk_strides,
    dv_strides,
    offsets_ptr,
    span,
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
    COPIES: tl.constexpr,
    TMA: tl.constexpr,
    ADD: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):
    """dv = p^T dout, dk = softmax_scale ds^T q, with p and ds as in _bwd_kernel_dq.

    Grid: n_tiles * B * Hk, one program a tile of key rows and key head (see load_program), summing
    over the head's `group` query heads; q, k, v, dout and their strides as in load_tile.
    Writes dk, dv [B, Lk, Hk, D] (any float dtype) in the rows of the tiles: stored, or with ADD
    added. Nobody else writes them, so the result is the same every time. Those of several sources
    are in several places, see source_offset.
    DOCUMENTS: rows past an entry may be another document's, and never reach a product.
    """
    row, row_end, entry, end_entry, _, head = load_program(
        tiles_ptr, n_tiles, n_heads, heads_in_flight
    )
    batch, key_head = head // heads, head % heads
    k_source, v_source = (k, k_strides, batch, key_head), (v, v_strides, batch, key_head)
    offs_n = row + tl.arange(0, BLOCK_N)
    qk_scale = softmax_scale * LOG2_E
    k_tile = load_tile(k_source, row, row_end, HEAD_DIM, BLOCK_N, BLOCK_D, TMA, True)
    v_tile = load_tile(v_source, row, row_end, HEAD_DIM, BLOCK_N, BLOCK_D, TMA, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    lse_ptr += batch.to(tl.int64) * lse_stride_batch
    delta_ptr += batch.to(tl.int64) * delta_stride_batch
    n_entries = end_entry - entry
    for job in range(group * n_entries):
        head = key_head * group + job // n_entries
        q_source, dout_source = (q, q_strides, batch, head), (dout, dout_strides, batch, head)
        head_lse_ptr = lse_ptr + head.to(tl.int64) * lse_stride_head
        head_delta_ptr = delta_ptr + head.to(tl.int64) * delta_stride_head
        begin, end, key_lo, key_hi = load_entry(entries_ptr, entry + job % n_entries)
        # A key row j meets query column i iff -key_hi <= i - j <= -key_lo.
        lo, hi = -key_hi, -key_lo
        first, last, n_left, n_full, n_edge = band_tiles(begin, end, lo, hi, row, row_end, BLOCK_M)
        # A third kind for the tile at a document's end, as in dQ, spills: 216 bytes at D 128.
        for EDGE in tl.static_range(2):
            for index in range(n_edge if EDGE else n_full):
                start = tile_start(index, first, n_left, n_full, BLOCK_M, EDGE)
                offs_m = start + tl.arange(0, BLOCK_M)
                q_tile = load_tile(
                    q_source, start, last, HEAD_DIM, BLOCK_M, BLOCK_D, TMA, EDGE, EDGE and DOCUMENTS
                )
                s_t = dot(k_tile, tl.trans(q_tile), None)
                lse2, delta = load_pair(
                    head_lse_ptr, head_delta_ptr, start, last, BLOCK_M, COPIES, EDGE
                )
                lse2 *= LOG2_E
                p_t = tl.math.exp2(s_t * qk_scale - lse2[None, :])
                if EDGE:
                    p_t = tl.where(band_mask(offs_n, offs_m, lo, hi, last), p_t, 0.0)
                dout_tile = load_tile(
                    dout_source,
                    start,
                    last,
                    HEAD_DIM,
                    BLOCK_M,
                    BLOCK_D,
                    TMA,
                    EDGE,
                    EDGE and DOCUMENTS,
                )
                dp_t = dot(v_tile, tl.trans(dout_tile), None)
                dv = dot(cast(p_t, dout_tile.dtype), dout_tile, dv)
                ds_t = p_t * (dp_t - delta[None, :])
                dk = dot(cast(ds_t, q_tile.dtype), q_tile, dk)
    stored = offs_n < row_end
    dk = dk * softmax_scale
    offset = source_offset(offsets_ptr, row, span)
    dk_ptr += offset
    dv_ptr += offset
    dk_target, dv_target = (dk_ptr, dk_ptr, dk_strides), (dv_ptr, dv_ptr, dv_strides)
    store_rows(
        dk,
        None,
        dk_target,
        batch,
        key_head,
        offs_n,
        stored,
        0,
        0,
        HEAD_DIM,
        BLOCK_N,
        BLOCK_D,
        ADD,
    )
    store_rows(
        dv,
        None,
        dv_target,
        batch,
        key_head,
        offs_n,
        stored,
        0,
        0,
        HEAD_DIM,
        BLOCK_N,
        BLOCK_D,
        ADD,
    )
