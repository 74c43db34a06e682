"""The forward kernel: one source's K, V folded into (out, lse)."""

import triton
import triton.language as tl

from .tile import (
    LN_2,
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
        "n_tiles",
        "n_heads",
        "heads_in_flight",
        "heads",
        "group",
    ]
)
def _fwd_kernel(
    q,
    k,
    v,
    q_strides,
    k_strides,
    v_strides,
    out_ptr,
    result_ptr,
    lse_ptr,
    out_strides,
    lse_stride_batch,
    lse_stride_head,
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
    CARRY: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):
    """out = softmax(softmax_scale q k^T + band) v, lse = log sum exp(softmax_scale q k^T + band).

    Grid: n_tiles * B * H, one program a tile of query rows and query head (see load_program); q, k,
    v and their strides as in load_tile; query head h reads key head h // group.
    Writes out [B, L, H, D] (normalised, any float dtype) and lse [B, H, L] (float32, natural log)
    in the rows of the tiles: stored, or with CARRY merged with what is there, so that the steps of
    a ring together give the softmax over all keys. A row that has seen nothing holds (0, -inf).
    Tiles that finish their rows write result instead of out, of the same strides.
    DOCUMENTS: rows past an entry may be another document's, and never reach a product.
    """
    row, row_end, entry, end_entry, finishes, head = load_program(
        tiles_ptr, n_tiles, n_heads, heads_in_flight
    )
    batch, head = head // heads, head % heads
    key_head = head // group
    k_source, v_source = (k, k_strides, batch, key_head), (v, v_strides, batch, key_head)
    offs_m = row + tl.arange(0, BLOCK_M)
    qk_scale = softmax_scale * LOG2_E
    q_tile = load_tile(
        (q, q_strides, batch, head), row, row_end, HEAD_DIM, BLOCK_M, BLOCK_D, TMA, True
    )
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
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
                k_tile = load_tile(k_source, start, last, HEAD_DIM, BLOCK_N, BLOCK_D, TMA, KIND > 0)
                s = dot(q_tile, tl.trans(k_tile), None)
                if KIND > 0:
                    offs_n = start + tl.arange(0, BLOCK_N)
                    s = tl.where(band_mask(offs_m, offs_n, lo, hi, last), s, float("-inf"))
                m_new = tl.maximum(m_i, tl.max(s, 1) * qk_scale)
                # A row that has seen nothing yet must compute -inf - 0, not -inf - -inf.
                shift = tl.where(m_new == float("-inf"), 0.0, m_new) if KIND > 0 else m_new
                p = tl.math.exp2(s * qk_scale - shift[:, None])
                alpha = tl.math.exp2(m_i - shift)
                m_i = m_new
                acc = acc * alpha[:, None]
                # Where p is 0, 0 * NaN of another document's v would still be NaN.
                v_tile = load_tile(
                    v_source, start, last, HEAD_DIM, BLOCK_N, BLOCK_D, TMA, KIND > 0, KIND == 2
                )
                acc = dot(cast(p, v_tile.dtype), v_tile, acc)
                # After the product is issued, which runs meanwhile.
                l_i = l_i * alpha + tl.sum(p, 1)

    l_safe = tl.where(l_i == 0.0, 1.0, l_i)
    lse2 = tl.where(l_i == 0.0, float("-inf"), m_i + tl.math.log2(l_safe))
    weight = 1.0 / l_safe
    old_weight = None
    stored = offs_m < row_end
    lse_ptr += batch.to(tl.int64) * lse_stride_batch + head.to(tl.int64) * lse_stride_head
    if CARRY:
        # Here and not as the loop's initial state: an accumulator that is loaded makes ptxas
        # serialise the wgmmas (C7514).
        old_lse2 = tl.load(lse_ptr + offs_m, mask=stored, other=float("-inf")) * LOG2_E
        # With fewer rows than threads several warps load each row: all must, before one stores it.
        tl.debug_barrier()
        top = tl.maximum(old_lse2, lse2)
        top = tl.where(top == float("-inf"), 0.0, top)
        old, new = tl.math.exp2(old_lse2 - top), tl.math.exp2(lse2 - top)
        total = old + new
        total_safe = tl.where(total == 0.0, 1.0, total)
        lse2 = tl.where(total == 0.0, float("-inf"), top + tl.math.log2(total_safe))
        weight *= new / total_safe
        old_weight = old / total_safe
    tl.store(lse_ptr + offs_m, lse2 * LN_2, mask=stored)
    acc = acc * weight[:, None]
    target = (out_ptr, result_ptr, out_strides)
    store_rows(
        acc,
        old_weight,
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
        CARRY,
    )
