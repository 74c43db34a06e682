"""Kernels that put a block's results, computed by somebody else's kernel, into the state."""

import triton
import triton.language as tl

from .tile import cast, row_pointers


@triton.jit(do_not_specialize=["length", "heads"])
def _fold_kernel(
    out_ptr,
    lse_ptr,
    block_out_ptr,
    block_lse_ptr,
    result_ptr,
    out_strides,
    lse_strides,
    block_out_strides,
    block_lse_strides,
    result_strides,
    length,
    heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """lse' = log(exp(lse) + exp(block_lse)),
    result = exp(lse - lse') out + exp(block_lse - lse') block_out.

    Grid: ceil(n / BLOCK_M) * B * H, one program BLOCK_M rows of one head, heads fastest. out,
    block_out, result [B, n, H, D] with strides (batch, head, row); lse, block_lse [B, H, n] with
    strides (batch, head, row). Writes result (any float dtype, may be out) and lse (float32).
    """
    n_heads = tl.num_programs(0) // tl.cdiv(length, BLOCK_M)
    offs_m = tl.program_id(0) // n_heads * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(0) % n_heads
    batch, head = head // heads, head % heads
    inside = offs_m < length
    lse_ptrs = row_pointers(lse_ptr, lse_strides, batch, head, offs_m)
    lse = tl.load(lse_ptrs, mask=inside, other=float("-inf"))
    block_lse_ptrs = row_pointers(block_lse_ptr, block_lse_strides, batch, head, offs_m)
    block_lse = tl.load(block_lse_ptrs, mask=inside, other=float("-inf"))
    top = tl.maximum(lse, block_lse)
    # Where both have seen nothing: -inf - 0, not -inf - -inf.
    top = tl.where(top == float("-inf"), 0.0, top)
    old, new = tl.exp(lse - top), tl.exp(block_lse - top)
    total = old + new
    total_safe = tl.where(total == 0.0, 1.0, total)
    weight = 1.0 / total_safe
    total_lse = tl.where(total == 0.0, float("-inf"), top + tl.log(total_safe))
    # With fewer rows than threads several warps load each row: all must, before one stores it.
    tl.debug_barrier()
    tl.store(lse_ptrs, total_lse, mask=inside)
    offs_d = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (offs_d < HEAD_DIM)[None, :]
    out_ptrs = row_pointers(out_ptr, out_strides, batch, head, offs_m)[:, None] + offs_d[None, :]
    out = tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
    block_out_ptrs = row_pointers(block_out_ptr, block_out_strides, batch, head, offs_m)
    # Where the block saw nothing its out may be anything.
    seen = mask & (block_lse != float("-inf"))[:, None]
    block_out = tl.load(block_out_ptrs[:, None] + offs_d[None, :], mask=seen, other=0.0)
    out = out * (old * weight)[:, None] + block_out.to(tl.float32) * (new * weight)[:, None]
    result_ptrs = row_pointers(result_ptr, result_strides, batch, head, offs_m)
    result_ptrs = result_ptrs[:, None] + offs_d[None, :]
    tl.store(result_ptrs, cast(out, result_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["length", "heads"])
def _put_kernel(
    state_ptr,
    share_ptr,
    result_ptr,
    rows_ptr,
    state_strides,
    share_strides,
    result_strides,
    length,
    heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ADD: tl.constexpr,
):
    """result = share, or with ADD state + share, in float32.

    Grid and shapes as in _fold_kernel. rows [n] uint8, may be None: share is 0 where it is 0.
    Writes result, any float dtype, may be state.
    """
    n_heads = tl.num_programs(0) // tl.cdiv(length, BLOCK_M)
    offs_m = tl.program_id(0) // n_heads * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(0) % n_heads
    batch, head = head // heads, head % heads
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_m < length)[:, None] & (offs_d < HEAD_DIM)[None, :]
    share_ptrs = row_pointers(share_ptr, share_strides, batch, head, offs_m)
    seen = mask
    if rows_ptr is not None:
        rows = tl.load(rows_ptr + offs_m, mask=offs_m < length, other=0)
        seen = mask & (rows != 0)[:, None]
    x = tl.load(share_ptrs[:, None] + offs_d[None, :], mask=seen, other=0.0).to(tl.float32)
    if ADD:
        state_ptrs = row_pointers(state_ptr, state_strides, batch, head, offs_m)
        x += tl.load(state_ptrs[:, None] + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    result_ptrs = row_pointers(result_ptr, result_strides, batch, head, offs_m)
    result_ptrs = result_ptrs[:, None] + offs_d[None, :]
    tl.store(result_ptrs, cast(x, result_ptr.dtype.element_ty), mask=mask)
