"""The kernel that moves the rows of tiles from one tensor to another."""

import triton
import triton.language as tl

from .tile import cast, load_program, row_pointers, source_offset


@triton.jit(do_not_specialize=["n_tiles", "n_heads", "heads_in_flight", "heads", "span"])
def _rows_kernel(
    source_ptr,
    target_ptr,
    source_strides,
    target_strides,
    offsets_ptr,
    span,
    tiles_ptr,
    n_tiles,
    n_heads,
    heads_in_flight,
    heads,
    HEAD_DIM: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ADD: tl.constexpr,
    FINISHED: tl.constexpr,
):
    """target = source, or with ADD target += source, in the rows of the tiles.

    Grid: n_tiles * B * H, one program a tile and head (see load_program). target is
    [B, L, H, D], source [B, L, H * COPIES, D] and summed over the copies of a head, both of any
    float dtype, strides (batch, head, row); target is written. Rows of keys of several sources have
    their targets in several places, see source_offset.
    FINISHED: only in the rows of tiles that finish them.
    """
    row, row_end, _, _, finishes, head = load_program(tiles_ptr, n_tiles, n_heads, heads_in_flight)
    batch, head = head // heads, head % heads
    offs_d = tl.arange(0, BLOCK_D)
    target_ptr += source_offset(offsets_ptr, row, span)
    if not FINISHED or finishes != 0:
        for start in range(row, row_end, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            mask = (offs < row_end)[:, None] & (offs_d < HEAD_DIM)[None, :]
            x = tl.zeros([BLOCK, BLOCK_D], tl.float32)
            for copy in tl.static_range(COPIES):
                rows = row_pointers(source_ptr, source_strides, batch, head * COPIES + copy, offs)
                x += tl.load(rows[:, None] + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
            rows = row_pointers(target_ptr, target_strides, batch, head, offs)
            targets = rows[:, None] + offs_d[None, :]
            if ADD:
                x += tl.load(targets, mask=mask, other=0.0).to(tl.float32)
            tl.store(targets, cast(x, target_ptr.dtype.element_ty), mask=mask)
