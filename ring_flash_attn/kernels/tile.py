"""What the attention kernels share: a program's tile, what it meets under a band, loads and stores.

A program owns a tile of rows (queries in the forward and dQ, keys in dKV) and walks the entries of
its list: ranges of rows of the other side, called columns here. Row r meets column c iff
lo <= c - r <= hi. Tiles and entries are int32 tables of five and of four numbers a line.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_program(tiles_ptr, n_tiles, n_heads, heads_in_flight):
    """Return (row, row_end, first_entry, end_entry, finishes, head) of this program.

    Programs run in groups of `heads_in_flight` heads, whose K and V together fit in L2; inside a
    group tile by tile (longest first), heads fastest, so that heads that share K, V meet in L2.
    """
    pid = tl.program_id(0)
    group = pid // (n_tiles * heads_in_flight)
    first_head = group * heads_in_flight
    heads = tl.minimum(heads_in_flight, n_heads - first_head)
    pid -= group * n_tiles * heads_in_flight
    line_ptr = tiles_ptr + pid // heads * 5
    row, row_end = tl.load(line_ptr), tl.load(line_ptr + 1)
    first_entry, end_entry = tl.load(line_ptr + 2), tl.load(line_ptr + 3)
    finishes = tl.load(line_ptr + 4)
    return row, row_end, first_entry, end_entry, finishes, first_head + pid % heads


@triton.jit
def load_entry(entries_ptr, entry):
    """Return (begin, end, lo, hi) of an entry."""
    line_ptr = entries_ptr + entry * 4
    return tl.load(line_ptr), tl.load(line_ptr + 1), tl.load(line_ptr + 2), tl.load(line_ptr + 3)


@triton.jit
def band_tiles(begin, end, lo, hi, row, row_end, BLOCK: tl.constexpr):
    """Cut what rows [row, row_end) meet of columns [begin, end) into tiles of BLOCK columns.

    Returns (first, last, n_left, n_full, n_edge): some row meets columns [first, last); tiles start
    at `first`; every row meets all of tiles [n_left, n_left + n_full), which need no mask; the
    n_edge others, on both sides of them, do. The counts are 0 if nothing is met.
    """
    first = tl.maximum(begin, row + lo)
    last = tl.minimum(end, row_end + hi)
    full_first = tl.maximum(first, row_end - 1 + lo)
    full_last = tl.minimum(last, row + hi + 1)
    n_tiles = (tl.maximum(last - first, 0) + BLOCK - 1) // BLOCK
    n_left = tl.minimum((full_first - first + BLOCK - 1) // BLOCK, n_tiles)
    n_full = tl.maximum(tl.maximum(full_last - first, 0) // BLOCK - n_left, 0)
    return first, last, n_left, n_full, n_tiles - n_full


@triton.jit
def tail_tiles(first, last, end, n_edge, BLOCK: tl.constexpr):
    """Return 1 if the last tile reaches past `end`, where its entry's rows end, else 0.

    Such a tile is an edge tile, the last of them: all that follows is no column of this entry.
    """
    n_tiles = (tl.maximum(last - first, 0) + BLOCK - 1) // BLOCK
    return tl.where((n_edge > 0) & (first + n_tiles * BLOCK > end), 1, 0)


@triton.jit
def tile_start(index, first, n_left, n_full, BLOCK: tl.constexpr, EDGE: tl.constexpr):
    """Return the first column of the index-th tile without a mask or, if EDGE, with one."""
    if EDGE:
        tile = index + tl.where(index < n_left, 0, n_full)
    else:
        tile = index + n_left
    return first + tile * BLOCK


@triton.jit
def band_mask(offs_row, offs_col, lo, hi, last):
    """Return [rows, columns] bool: lo <= c - r <= hi and c < last, for columns that are >= begin.

    One unsigned compare, 0 <= c - left < width: two signed ones cost registers.
    """
    left = offs_row + lo
    width = tl.maximum(tl.minimum(offs_row + hi + 1, last) - left, 0)
    distance = offs_col[None, :] - left[:, None]
    return distance.to(tl.uint32, bitcast=True) < width.to(tl.uint32, bitcast=True)[:, None]


@triton.jit
def row_pointers(base, strides, batch, head, offs_row):
    """Return pointers [BLOCK] to base[batch, offs_row, head, 0], strides (batch, head, row)."""
    base += batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    return base + offs_row.to(tl.int64) * strides[2]


@triton.jit
def load_tile(
    source,
    row,
    row_end,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
    BOUND: tl.constexpr,
    CUT: tl.constexpr = False,
):
    """Return x[batch, row : row + BLOCK, head, :] as [BLOCK, BLOCK_D], zero from HEAD_DIM on.

    `source` is (x, strides, batch, head). TMA: x is a descriptor of [B, H, L, D] with box [1, 1,
    BLOCK, BLOCK_D]; rows from L on are zero, and nothing of the next batch is read; with CUT those
    from row_end on are zero too, which may be another document's and hold anything. Else x is a
    pointer with strides (batch, head, row), and rows from row_end on are zero; without BOUND there
    are none.
    """
    x, strides, batch, head = source
    if TMA:
        tile = x.load([batch, head, row, 0]).reshape([BLOCK, BLOCK_D])
        if CUT:
            inside = tl.arange(0, BLOCK) < row_end - row
            tile = tl.where(inside[:, None], tile, tl.zeros([BLOCK, BLOCK_D], tile.dtype))
    else:
        offs = tl.arange(0, BLOCK)
        offs_d = tl.arange(0, BLOCK_D)
        base = x + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
        # row in the scalar base, so that the [BLOCK, BLOCK_D] offsets do not change in a loop.
        base += row.to(tl.int64) * strides[2]
        pointers = base + (offs.to(tl.int64) * strides[2])[:, None] + offs_d[None, :]
        if BOUND and HEAD_DIM < BLOCK_D:
            mask = (offs < row_end - row)[:, None] & (offs_d < HEAD_DIM)[None, :]
            tile = tl.load(pointers, mask=mask, other=0.0)
        elif BOUND:
            tile = tl.load(pointers, mask=(offs < row_end - row)[:, None], other=0.0)
        elif HEAD_DIM < BLOCK_D:
            tile = tl.load(pointers, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def load_pair(
    a_ptr,
    b_ptr,
    row,
    row_end,
    BLOCK: tl.constexpr,
    COPIES: tl.constexpr,
    BOUND: tl.constexpr,
):
    """Return a[row : row + BLOCK] and b[row : row + BLOCK] as [BLOCK] each, 0 from row_end on.

    One load of both, COPIES times over: with fewer elements than the program has threads, Triton
    lets every thread fetch all that it needs for itself, in dKV 32 copies of 4 bytes a tile and
    thread where now there is one. Copies that are split off are never read.
    """
    offs = row + tl.arange(0, BLOCK)
    lines = tl.arange(0, 2 * COPIES)
    pointers = tl.where(lines % 2 == 0, a_ptr, b_ptr)[:, None] + offs[None, :]
    if BOUND:
        pair = tl.load(pointers, mask=(offs < row_end)[None, :], other=0.0)
    else:
        pair = tl.load(pointers)
    return first_pair(pair, BLOCK, COPIES).permute(1, 0).split()


@triton.jit
def first_pair(pairs, BLOCK: tl.constexpr, COPIES: tl.constexpr):
    """Return the first [2, BLOCK] of [2 * COPIES, BLOCK]."""
    if COPIES > 1:
        half, _ = pairs.reshape([2, COPIES, BLOCK]).permute(1, 2, 0).split()
        pairs = first_pair(half, BLOCK, COPIES // 2)
    return pairs


# The decorator has chosen between compiler and interpreter when this module was imported.
INTERPRETED = tl.constexpr(not isinstance(load_tile, triton.JITFunction))


@triton.jit
def dot(a, b, acc):
    """Return acc + a @ b (a @ b if acc is None) in float32, never cutting float32 to tf32.

    The interpreter multiplies bfloat16 as the integers that hold its bits, so it gets float32.
    """
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def cast(x, dtype: tl.constexpr):
    """Round float32 x to `dtype`, to nearest even.

    The interpreter's cast to bfloat16 halves values that round up to a power of two, so there the
    bits are rounded first and its cast is exact.
    """
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def store_rows(
    x,
    old_weight,
    target,
    batch,
    head,
    offs_row,
    stored,
    finishes,
    COLUMN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ADD: tl.constexpr,
):
    """Store float32 x [BLOCK, BLOCK_D] from column COLUMN on, in the rows where `stored` [BLOCK].

    `target` is (state, result, strides): both [B, L, H, D] with the strides of row_pointers. What
    is stored goes to result if `finishes`, else to state.
    ADD: adds what is in state times old_weight [BLOCK] (times 1 if None), in pieces of 64 columns
    that are cut in registers. In one piece the old rows beside x spill: forward, ptxas for sm_90,
    16 bytes at D 128 and 1400 at D 256; in pieces none.
    """
    if COLUMN < HEAD_DIM:
        if ADD and BLOCK_D > 64:
            HALF: tl.constexpr = BLOCK_D // 2
            left, right = x.reshape([BLOCK, 2, HALF]).permute(0, 2, 1).split()
            store_rows(
                left,
                old_weight,
                target,
                batch,
                head,
                offs_row,
                stored,
                finishes,
                COLUMN,
                HEAD_DIM,
                BLOCK,
                HALF,
                ADD,
            )
            store_rows(
                right,
                old_weight,
                target,
                batch,
                head,
                offs_row,
                stored,
                finishes,
                COLUMN + HALF,
                HEAD_DIM,
                BLOCK,
                HALF,
                ADD,
            )
        else:
            state, result, strides = target
            offs_d = COLUMN + tl.arange(0, BLOCK_D)
            mask = stored[:, None]
            if COLUMN + BLOCK_D > HEAD_DIM:
                mask = mask & (offs_d < HEAD_DIM)[None, :]
            state_ptrs = row_pointers(state, strides, batch, head, offs_row)[:, None]
            state_ptrs = state_ptrs + offs_d[None, :]
            if ADD:
                old = tl.load(state_ptrs, mask=mask, other=0.0).to(tl.float32)
                if old_weight is None:
                    x += old
                else:
                    x += old * old_weight[:, None]
            if finishes != 0:
                result_ptrs = row_pointers(result, strides, batch, head, offs_row)[:, None]
                result_ptrs = result_ptrs + offs_d[None, :]
                tl.store(result_ptrs, cast(x, result.dtype.element_ty), mask=mask)
            else:
                tl.store(state_ptrs, cast(x, state.dtype.element_ty), mask=mask)


@triton.jit
def source_offset(offsets_ptr, row, span):
    """Return how far from dk's and dv's address, in numbers, a tile of the merged keys has its own.

    Without offsets_ptr there is one source and no offset. Else sources' keys lie `span` rows apart,
    and offsets [n] int64 say where each one's dk and dv do, less its first row's place, in fours.
    """
    if offsets_ptr is None:
        return tl.zeros([], tl.int64)
    else:
        return tl.load(offsets_ptr + row // span) * 4
