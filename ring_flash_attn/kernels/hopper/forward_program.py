"""What producer and consumers of the Hopper forward share, and how the old state reaches them."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate as aggregate

from .slots import Blocks, Slots
from .tiles import Tables

ROWS = gl.constexpr(64)  # query rows of a consumer: what one warpgroup's wgmma multiplies
# What next_work returns: 7 numbers of the work and 8 of the band.
WORK_FIELDS = gl.constexpr(7)
FIELDS = gl.constexpr(15)


@aggregate
class Options:
    """What is compiled in, see _hopper_fwd_kernel."""

    HEAD_DIM: gl.constexpr
    BLOCK_D: gl.constexpr
    BLOCK_N: gl.constexpr
    CARRY: gl.constexpr
    DOCUMENTS: gl.constexpr
    ONE_ENTRY: gl.constexpr
    CONSUMERS: gl.constexpr
    PING_PONG: gl.constexpr
    RESCALE_LATE: gl.constexpr
    Q_COLUMNS: gl.constexpr
    SHUFFLES: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self,
        HEAD_DIM,
        BLOCK_D,
        BLOCK_N,
        CARRY,
        DOCUMENTS,
        ONE_ENTRY,
        CONSUMERS,
        PING_PONG,
        RESCALE_LATE,
        Q_COLUMNS,
        SHUFFLES,
    ):
        self.HEAD_DIM = gl.constexpr(HEAD_DIM)
        self.BLOCK_D = gl.constexpr(BLOCK_D)
        self.BLOCK_N = gl.constexpr(BLOCK_N)
        self.CARRY = gl.constexpr(CARRY)
        self.DOCUMENTS = gl.constexpr(DOCUMENTS)
        self.ONE_ENTRY = gl.constexpr(ONE_ENTRY)
        self.CONSUMERS = gl.constexpr(CONSUMERS)
        self.PING_PONG = gl.constexpr(PING_PONG)
        self.RESCALE_LATE = gl.constexpr(RESCALE_LATE)
        self.Q_COLUMNS = gl.constexpr(Q_COLUMNS)
        self.SHUFFLES = gl.constexpr(SHUFFLES)


@aggregate
class Program:
    """What producer and consumers share."""

    tables: Tables
    items: Slots
    q: Slots
    k: Blocks
    v: Blocks
    options: Options

    @gluon.constexpr_function
    def __init__(self, tables, items, q, k, v, options):
        self.tables = tables
        self.items = items
        self.q = q
        self.k = k
        self.v = v
        self.options = options


@gluon.constexpr_function
def state_pieces(BLOCK_N):
    """Return in how many pieces, side by side, a consumer's rows of the old state lie.

    They take the room of blocks of K and V, in turn: piece p of all lies in K if p is even, in V if
    odd, p // 2 turns on.
    """
    return 128 // BLOCK_N


@gluon.constexpr_function
def state_columns(BLOCK_D, BLOCK_N):
    """Return the columns of a piece: ROWS of float32 fill a slot of BLOCK_N rows of 16 bits."""
    return BLOCK_D * BLOCK_N // 128


@gluon.constexpr_function
def state_turns(CONSUMERS, BLOCK_N):
    """Return how many slots of K, and of V, the old state takes."""
    return (CONSUMERS * (128 // BLOCK_N) + 1) // 2


@gluon.constexpr_function
def piece_at(turn, side, CONSUMERS, BLOCK_N):
    """Return the piece of a slot of K (side 0) or V; after an odd number V has the last again."""
    return min(2 * turn + side, CONSUMERS * (128 // BLOCK_N) - 1)


@gluon.jit
def state_piece(slots, slot, COLUMNS: gl.constexpr):
    """Return a slot of K or V as a piece of the old state [1, 1, ROWS, COLUMNS] float32."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, ROWS, COLUMNS], gl.float32)
    return slots.buffers.index(slot)._reinterpret(gl.float32, [1, 1, ROWS, COLUMNS], layout)
