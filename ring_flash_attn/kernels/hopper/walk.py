"""Which blocks of queries a tile of keys meets: entry by entry, head by head of its group.

Scalar arithmetic that every partition of the Hopper backward does alike.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate as aggregate


@aggregate
class Walk:
    """A tile of key rows [row, row_end) of one key head, and where it is on its way.

    `shift` is how far into an entry it starts, in tiles of all n_tiles; the last place follows on
    the first.
    """

    entries_ptr: gl.tensor
    row: gl.tensor
    row_end: gl.tensor
    first_entry: gl.tensor
    end_entry: gl.tensor
    shift: gl.tensor
    n_tiles: gl.tensor

    @gluon.constexpr_function
    def __init__(self, entries_ptr, row, row_end, first_entry, end_entry, shift, n_tiles):
        self.entries_ptr = entries_ptr
        self.row = row
        self.row_end = row_end
        self.first_entry = first_entry
        self.end_entry = end_entry
        self.shift = shift
        self.n_tiles = n_tiles


@gluon.jit
def load_queries(walk, entry, BLOCK: gl.constexpr):
    """Cut what the tile meets of an entry of queries into blocks of BLOCK rows.

    Returns:
        (first, end, lo, hi, n_blocks, skip): blocks start at `first`, the entry's rows end at
        `end`, key row j meets query row i iff lo <= i - j <= hi. n_blocks is at least 1, so that
        an entry of which the tile meets nothing is a step like any other. The walk starts with
        block `skip`.
    """
    exists = entry < walk.end_entry
    line_ptr = walk.entries_ptr + entry * 4
    begin = gl.load(line_ptr, mask=exists, other=0)
    end = gl.load(line_ptr + 1, mask=exists, other=0)
    lo = -gl.load(line_ptr + 3, mask=exists, other=0)
    hi = -gl.load(line_ptr + 2, mask=exists, other=0)
    first = gl.maximum(begin, walk.row + lo)
    last = gl.minimum(end, walk.row_end + hi)
    n_blocks = gl.maximum((last - first + BLOCK - 1) // BLOCK, 1)
    skip = walk.shift * n_blocks // walk.n_tiles
    return first, end, lo, hi, n_blocks, skip


@gluon.jit
def count_blocks(walk, BLOCK: gl.constexpr):
    """Return how many blocks of one query head the tile meets: 0 without entries, so of no rows."""
    total = 0
    for entry in range(walk.first_entry, walk.end_entry):
        total += load_queries(walk, entry, BLOCK)[4]
    return total


@gluon.jit
def begin_walk(walk, head, BLOCK: gl.constexpr):
    """Return the first place: (head, entry, index, queries), see load_queries."""
    return head, walk.first_entry, walk.row * 0, load_queries(walk, walk.first_entry, BLOCK)


@gluon.jit
def query_row(place, BLOCK: gl.constexpr):
    """Return the first query row of a place's block."""
    queries = place[3]
    block = place[2] + queries[5]
    if block >= queries[4]:
        block -= queries[4]
    return queries[0] + block * BLOCK


@gluon.jit
def next_place(walk, place, BLOCK: gl.constexpr):
    """Return the place after this one; after an entry's last block the next entry, then head."""
    head, entry, index, queries = place
    index += 1
    if index == queries[4]:
        # Computed, not set to 0: Triton 3.6 does not carry constants.
        index -= queries[4]
        entry += 1
        if entry == walk.end_entry:
            entry = walk.first_entry
            head += 1
        queries = load_queries(walk, entry, BLOCK)
    return head, entry, index, queries
