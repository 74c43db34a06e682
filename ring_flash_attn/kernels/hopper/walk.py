"""Which blocks of the other side a tile meets: entry by entry, block by block, head by head.

As in kernels/tile.py a tile owns rows and walks entries of columns. Scalar arithmetic that every
partition of the Hopper backward does alike.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate as aggregate


@aggregate
class Walk:
    """A tile of rows [row, row_end) of one head. KEYS: they are keys, and columns are queries.

    Each block is that of `group` heads from first_head on, one after the other: tiles that start
    with the same block stay together through all heads, whatever number of blocks each one meets.
    APART: each head is walked by itself, for tiles that meet the same number of blocks, but others.

    DOWN: an entry's blocks come from the last to the first. Under a causal mask all tiles of keys
    meet the last query, so programs that start together read the same blocks.
    `shift` is how far into an entry it starts, in tiles of all n_tiles; the first place follows on
    the last.
    """

    entries_ptr: gl.tensor
    row: gl.tensor
    row_end: gl.tensor
    first_entry: gl.tensor
    end_entry: gl.tensor
    shift: gl.tensor
    n_tiles: gl.tensor
    first_head: gl.tensor
    group: gl.tensor
    KEYS: gl.constexpr
    DOWN: gl.constexpr
    APART: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self,
        entries_ptr,
        rows,
        entries,
        shift,
        n_tiles,
        first_head,
        group,
        KEYS,
        DOWN,
        APART=False,
    ):
        self.entries_ptr = entries_ptr
        self.row, self.row_end = rows
        self.first_entry, self.end_entry = entries
        self.shift = shift
        self.n_tiles = n_tiles
        self.first_head = first_head
        self.group = group
        self.KEYS = gl.constexpr(KEYS)
        self.DOWN = gl.constexpr(DOWN)
        self.APART = gl.constexpr(APART)


@gluon.jit
def load_columns(walk, entry, BLOCK: gl.constexpr):
    """Cut what the tile meets of an entry into blocks of BLOCK columns.

    Returns:
        (first, end, lo, hi, n_blocks, skip): blocks start at `first`, the entry's columns end at
        `end`, row r meets column c iff lo <= c - r <= hi. n_blocks is at least 1, so that an entry
        of which the tile meets nothing is a step like any other. The walk starts with block `skip`.
    """
    exists = entry < walk.end_entry
    line_ptr = walk.entries_ptr + entry * 4
    begin = gl.load(line_ptr, mask=exists, other=0)
    end = gl.load(line_ptr + 1, mask=exists, other=0)
    lo = gl.load(line_ptr + 2, mask=exists, other=0)
    hi = gl.load(line_ptr + 3, mask=exists, other=0)
    if walk.KEYS:
        lo, hi = -hi, -lo
    first = gl.maximum(begin, walk.row + lo)
    last = gl.minimum(end, walk.row_end + hi)
    n_blocks = gl.maximum((last - first + BLOCK - 1) // BLOCK, 1)
    skip = walk.shift * n_blocks // walk.n_tiles
    return first, end, lo, hi, n_blocks, skip


@gluon.jit
def count_blocks(walk, BLOCK: gl.constexpr):
    """Return how many blocks of one head the tile meets: 0 without entries, so without rows."""
    total = walk.row * 0
    for entry in range(walk.first_entry, walk.end_entry):
        total += load_columns(walk, entry, BLOCK)[4]
    return total


@gluon.jit
def begin_walk(walk, BLOCK: gl.constexpr):
    """Return the first place: (head, entry, index, columns), see load_columns."""
    columns = load_columns(walk, walk.first_entry, BLOCK)
    return walk.first_head, walk.first_entry, walk.row * 0, columns


@gluon.jit
def column(walk, place, BLOCK: gl.constexpr):
    """Return the first column of a place's block."""
    columns = place[3]
    block = place[2] + columns[5]
    if block >= columns[4]:
        block -= columns[4]
    if walk.DOWN:
        block = columns[4] - 1 - block
    return columns[0] + block * BLOCK


@gluon.jit
def next_place(walk, place, BLOCK: gl.constexpr):
    """Return the place after this one; after a block's last head the next block, then entry.

    APART: after a head's last block its next entry, then the next head.
    """
    head, entry, index, columns = place
    # Computed, not set to constants: Triton 3.6 does not carry those.
    if walk.APART:
        index += 1
        if index == columns[4]:
            index -= columns[4]
            entry += 1
            if entry == walk.end_entry:
                entry -= walk.end_entry - walk.first_entry
                head += 1
            columns = load_columns(walk, entry, BLOCK)
    else:
        head += 1
        if head == walk.first_head + walk.group:
            head -= walk.group
            index += 1
            if index == columns[4]:
                index -= columns[4]
                entry += 1
                columns = load_columns(walk, entry, BLOCK)
    return head, entry, index, columns
