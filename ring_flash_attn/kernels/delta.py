"""The kernel that prepares a backward."""

import triton
import triton.language as tl

from .tile import load_tile


@triton.jit(do_not_specialize=["length", "heads"])
def _delta_kernel(
    out_ptr,
    dout_ptr,
    dlse_ptr,
    delta_ptr,
    out_strides,
    dout_strides,
    length,
    heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):
    """delta = rowsum(dout * out) - dlse.

    Grid: ceil(L / BLOCK_M) * B * H, one program BLOCK_M rows of one head, heads fastest.
    Writes delta [B, H, L] float32, contiguous as dlse.
    """
    n_heads = tl.num_programs(0) // tl.cdiv(length, BLOCK_M)
    row = tl.program_id(0) // n_heads * BLOCK_M
    head = tl.program_id(0) % n_heads
    offs = row + tl.arange(0, BLOCK_M)
    source = (out_ptr, out_strides, head // heads, head % heads)
    out = load_tile(source, row, length, HEAD_DIM, BLOCK_M, BLOCK_D, False, True)
    source = (dout_ptr, dout_strides, head // heads, head % heads)
    dout = load_tile(source, row, length, HEAD_DIM, BLOCK_M, BLOCK_D, False, True)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    values = head.to(tl.int64) * length + offs
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + values, mask=offs < length, other=0.0)
    tl.store(delta_ptr + values, delta, mask=offs < length)
