"""Which tiles a program of the Hopper kernels takes, and what of the other side each one meets.

The tables are those of kernels/tile.py: a tile is five int32, an entry four. Everything here is
scalar arithmetic that the producer and the consumers do alike.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate as aggregate


@aggregate
class Tables:
    """Tiles [n_tiles, 5] and entries [m, 4] of a launch, and the heads it covers.

    n_heads is B * H of the side that is written, `heads` is H, and `group` of those share a head
    of K and V.
    """

    tiles_ptr: gl.tensor
    entries_ptr: gl.tensor
    n_tiles: gl.tensor
    n_heads: gl.tensor
    heads_in_flight: gl.tensor
    heads: gl.tensor
    group: gl.tensor

    @gluon.constexpr_function
    def __init__(self, tiles_ptr, entries_ptr, n_tiles, n_heads, heads_in_flight, heads, group):
        self.tiles_ptr = tiles_ptr
        self.entries_ptr = entries_ptr
        self.n_tiles = n_tiles
        self.n_heads = n_heads
        self.heads_in_flight = heads_in_flight
        self.heads = heads
        self.group = group

    @gluon.jit
    def n_items(self):
        """Return the number of work items: a tile and a head each."""
        return self.n_tiles * self.n_heads


@gluon.jit
def load_work(tables, index):
    """Return (row, row_end, first_entry, end_entry, finishes, head) of a work item.

    `head` counts through all batches, as n_heads does.

    Items count in groups of heads whose K and V together fit in L2; inside a group tile by tile
    (longest first), heads fastest. An index past the last item gives row 0 and row_end 1.
    """
    exists = index < tables.n_items()
    per_group = tables.n_tiles * tables.heads_in_flight
    first_head = index // per_group * tables.heads_in_flight
    heads = gl.maximum(gl.minimum(tables.heads_in_flight, tables.n_heads - first_head), 1)
    index = index % per_group
    line_ptr = tables.tiles_ptr + index // heads * 5
    row = gl.load(line_ptr, mask=exists, other=0)
    row_end = gl.load(line_ptr + 1, mask=exists, other=1)
    first_entry = gl.load(line_ptr + 2, mask=exists, other=0)
    end_entry = gl.load(line_ptr + 3, mask=exists, other=0)
    finishes = gl.load(line_ptr + 4, mask=exists, other=0)
    return row, row_end, first_entry, end_entry, finishes, first_head + index % heads


@gluon.jit
def next_work(tables, index, counter_ptr, BLOCK: gl.constexpr):
    """Return the work of item `index`, or of the first one drawn after it whose tile has rows.

    Tables filled on the device are padded with tiles of no rows.

    Returns:
        (exists, row, row_end, entry, end_entry, finishes, head, *band): what load_work returns, and
        load_band of the tile's first entry. `exists` is 0 past the last item.
    """
    row, row_end, entry, end_entry, finishes, head = load_work(tables, index)
    while row_end <= row:
        index = draw(counter_ptr)
        row, row_end, entry, end_entry, finishes, head = load_work(tables, index)
    exists = (index < tables.n_items()).to(gl.int32)
    band = load_band(tables, entry, end_entry, row, row_end, BLOCK)
    first, last, end, lo, hi, n_left, n_full, n_edge = band
    # Spelled out: Triton 3.6 does not join tuples.
    work = (exists, row, row_end, entry, end_entry, finishes, head)
    return work, (first, last, end, lo, hi, n_left, n_full, n_edge)


@gluon.jit
def draw(counter_ptr):
    """Return a work item that no other program gets. The first ones are the programs' own ids."""
    return gl.atomic_add(counter_ptr, 1, sem="relaxed") + gl.num_programs(0)


@gluon.jit
def leave(counter_ptr):
    """Count the programs that have drawn their last; the last of all zeroes both counters."""
    if gl.atomic_add(counter_ptr + 1, 1) == gl.num_programs(0) - 1:
        gl.store(counter_ptr, 0)
        gl.store(counter_ptr + 1, 0)


@gluon.jit
def load_band(tables, entry, end_entry, row, row_end, BLOCK: gl.constexpr):
    """Cut what rows [row, row_end) meet of an entry into blocks of BLOCK columns.

    Row r meets column c iff lo <= c - r <= hi. An entry from end_entry on has no columns.

    Returns:
        (first, last, end, lo, hi, n_left, n_full, n_edge): columns [first, last) are met by some
        row, blocks start at `first`, blocks [n_left, n_left + n_full) are met whole by every row,
        the n_edge others not; `end` is where the entry's columns end.
    """
    exists = entry < end_entry
    line_ptr = tables.entries_ptr + entry * 4
    begin = gl.load(line_ptr, mask=exists, other=0)
    end = gl.load(line_ptr + 1, mask=exists, other=0)
    lo = gl.load(line_ptr + 2, mask=exists, other=0)
    hi = gl.load(line_ptr + 3, mask=exists, other=0)
    first = gl.maximum(begin, row + lo)
    last = gl.minimum(end, row_end + hi)
    full_first = gl.maximum(first, row_end - 1 + lo)
    full_last = gl.minimum(last, row + hi + 1)
    n_blocks = (gl.maximum(last - first, 0) + BLOCK - 1) // BLOCK
    n_left = gl.minimum((full_first - first + BLOCK - 1) // BLOCK, n_blocks)
    n_full = gl.maximum(gl.maximum(full_last - first, 0) // BLOCK - n_left, 0)
    return first, last, end, lo, hi, n_left, n_full, n_blocks - n_full


@gluon.jit
def block_start(band, index, BLOCK: gl.constexpr):
    """Return the first column of a band's index-th block: those at the edges come first.

    Of these the right ones, from the last down: the first rows of a tile see least of it.
    """
    first, n_left, n_full, n_edge = band[0], band[5], band[6], band[7]
    block = n_edge + n_full - 1 - index
    if index >= n_edge - n_left:
        block = index - (n_edge - n_left)
    if index >= n_edge:
        block = index - n_edge + n_left
    return first + gl.maximum(block, 0) * BLOCK


@gluon.jit
def unseen_blocks(band, row, row_end, ROWS: gl.constexpr, BLOCK: gl.constexpr):
    """Return how many of a band's first blocks rows [row, row + ROWS) see nothing of.

    At most all but one. Of rows from row_end on, which do not exist, that many.
    """
    first, last, hi, n_left, n_full, n_edge = band[0], band[1], band[4], band[5], band[6], band[7]
    n_blocks = n_edge + n_full
    seen = gl.minimum(last, gl.minimum(row + ROWS, row_end) + hi)
    n_seen = (gl.maximum(seen - first, 0) + BLOCK - 1) // BLOCK
    unseen = gl.minimum(n_blocks - n_seen, n_edge - n_left)
    if row >= row_end:
        unseen = n_blocks
    return gl.maximum(gl.minimum(unseen, n_blocks - 1), 0)


@gluon.jit
def skipped(entry, first_entry):
    """Return 1 for a tile's first entry, whose first block is loaded ahead, else 0.

    Computed: Triton 3.6 does not carry a variable that is set to constants before and in a loop.
    """
    return 1 - gl.minimum(entry - first_entry, 1)
