"""What the warpgroups of a Hopper kernel share: slots in shared memory, and what is compiled in."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.core import _aggregate as aggregate

from .tiles import Tables

ROWS = gl.constexpr(64)  # query rows of a consumer: what one warpgroup's wgmma multiplies


@aggregate
class Slots:
    """Slots in shared memory, each with a barrier that it is full and one that it is empty."""

    buffers: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, buffers, full, empty):
        self.buffers = buffers
        self.full = full
        self.empty = empty


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
    STAGES: gl.constexpr
    PING_PONG: gl.constexpr
    RESCALE_LATE: gl.constexpr

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
        STAGES,
        PING_PONG,
        RESCALE_LATE,
    ):
        self.HEAD_DIM = gl.constexpr(HEAD_DIM)
        self.BLOCK_D = gl.constexpr(BLOCK_D)
        self.BLOCK_N = gl.constexpr(BLOCK_N)
        self.CARRY = gl.constexpr(CARRY)
        self.DOCUMENTS = gl.constexpr(DOCUMENTS)
        self.ONE_ENTRY = gl.constexpr(ONE_ENTRY)
        self.CONSUMERS = gl.constexpr(CONSUMERS)
        self.STAGES = gl.constexpr(STAGES)
        self.PING_PONG = gl.constexpr(PING_PONG)
        self.RESCALE_LATE = gl.constexpr(RESCALE_LATE)


@aggregate
class Program:
    """What producer and consumers share."""

    tables: Tables
    items: Slots
    q: Slots
    k: Slots
    v: Slots
    options: Options

    @gluon.constexpr_function
    def __init__(self, tables, items, q, k, v, options):
        self.tables = tables
        self.items = items
        self.q = q
        self.k = k
        self.v = v
        self.options = options


@gluon.jit
def make_slots(N: gl.constexpr, READERS: gl.constexpr, desc, BLOCK: gl.constexpr):
    """Return N slots for the boxes of a descriptor, each emptied by READERS partitions."""
    buffers = gl.allocate_shared_memory(desc.dtype, [N] + BLOCK, desc.layout)
    full, empty = make_bars(N, READERS)
    return Slots(buffers, full, empty)


@gluon.jit
def make_bars(N: gl.constexpr, READERS: gl.constexpr):
    full = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=READERS)
    return full, empty


@gluon.jit
def await_full(slots, slot, turn):
    """Wait until a slot is filled for the turn-th time."""
    mbarrier.wait(slots.full.index(slot), turn & 1)


@gluon.jit
def await_empty(slots, slot, turn):
    """Wait until a slot is free to be filled for the turn-th time."""
    mbarrier.wait(slots.empty.index(slot), turn & 1 ^ 1)


@gluon.jit
def release(slots, slot):
    mbarrier.arrive(slots.empty.index(slot), count=1)


@gluon.jit
def load(desc, coordinates, slots, slot, turn):
    """Load a box into a slot, once that is free."""
    await_empty(slots, slot, turn)
    mbarrier.expect(slots.full.index(slot), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(
        desc, coordinates, slots.full.index(slot), slots.buffers.index(slot)
    )


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
