"""Products whose left operand lies in part in registers.

A warpgroup's wgmma reads a left operand of 64 rows from shared memory for every block anew: with 64
columns of scores as many bytes as the right one, all that shared memory gives in that time.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma


@gluon.jit
def left_operand(tile, layout: gl.constexpr, COLUMNS: gl.constexpr):
    """Return the first COLUMNS of a tile in registers, for results of a layout; 0: the tile."""
    if COLUMNS > 0:
        operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
        tile = tile.slice(0, COLUMNS, 1).load(operand)
        fence_async_shared()  # see release in slots.py
    return tile


@gluon.jit
def multiply_rows(left, tile, right, layout: gl.constexpr, COLUMNS: gl.constexpr):
    """Issue tile right^T, of tiles [rows, D] in shared memory; wait before reading it.

    In 1 + parts_after(COLUMNS, D) products, each of which counts for warpgroup_mma_wait.

    Args:
        left: what left_operand returned for `tile`.
        layout: of the result.
    """
    M: gl.constexpr = tile.shape[0]
    N: gl.constexpr = right.shape[0]
    D: gl.constexpr = tile.shape[1]
    zeros = gl.zeros([M, N], gl.float32, layout)
    if COLUMNS == 0:
        return warpgroup_mma(tile, right.permute((1, 0)), zeros, use_acc=False, is_async=True)
    else:
        right_part = right.slice(0, COLUMNS, 1).permute((1, 0))
        s = warpgroup_mma(left, right_part, zeros, use_acc=False, is_async=True)
        # The rest in parts as wide as what is before them: widths are powers of two.
        for i in gl.static_range(parts_after(COLUMNS, D)):
            left_part = tile.slice(COLUMNS << i, COLUMNS << i, 1)
            right_part = right.slice(COLUMNS << i, COLUMNS << i, 1).permute((1, 0))
            s = warpgroup_mma(left_part, right_part, s, is_async=True)
        return s


@gluon.constexpr_function
def parts_after(COLUMNS, D):
    """Return how many times COLUMNS doubles to D."""
    return (D // COLUMNS).bit_length() - 1
