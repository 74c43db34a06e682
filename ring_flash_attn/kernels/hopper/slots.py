"""How the partitions of a Hopper kernel hand each other what lies in shared memory."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.core import _aggregate as aggregate

# A cut descriptor starts its rows so far below zero that 2**30 of its steps wrap to zero.
FAR = gl.constexpr(1 << 30)


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

    @gluon.jit
    def release(self, slot):
        """Say that this partition has read a slot.

        What it has read into registers, and the TMA fills next, behind fence_async_shared: loads
        and the TMA go different ways, so that without one what the TMA brings next can be what the
        loads return, also where all warps have met after them. Products in shared memory are over
        at their wait.
        """
        mbarrier.arrive(self.empty.index(slot), count=1)

    @gluon.jit
    def await_empty(self, slot, turn):
        """Wait until a slot is free to be filled for the turn-th time."""
        _await_turn(self.empty, slot, turn)

    @gluon.jit
    def drain(self, count, STAGES: gl.constexpr):
        """As Blocks; mbarriers may be left as they are."""


@aggregate
class Outlets:
    """Slots with a barrier that one is empty; who fills it says so in another way."""

    buffers: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, buffers, empty):
        self.buffers = buffers
        self.empty = empty

    @gluon.jit
    def release(self, slot):
        """Say that a slot has been read."""
        mbarrier.arrive(self.empty.index(slot), count=1)

    @gluon.jit
    def await_empty(self, slot, turn):
        """As Slots.await_empty."""
        _await_turn(self.empty, slot, turn)


@aggregate
class Inlets:
    """Slots with a barrier that one is full; that it is empty follows from other waits.

    Or from nothing having been there: what a program loads once needs no other barrier.
    """

    buffers: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, buffers, full):
        self.buffers = buffers
        self.full = full


@aggregate
class Blocks:
    """Slots that named barriers say are empty: FIRST for slot 0, FIRST + 1 for slot 1, ...

    To arrive at an mbarrier, Triton 3.6 first makes the warps of a partition meet. Arriving at a
    named barrier takes one instruction, and no warp waits for another. There are 16, so this is for
    what is handed over in the inner loop.
    """

    buffers: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    STAGES: gl.constexpr
    FIRST: gl.constexpr
    THREADS: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, buffers, full, STAGES, FIRST, THREADS):
        self.buffers = buffers
        self.full = full
        self.STAGES = gl.constexpr(STAGES)
        self.FIRST = gl.constexpr(FIRST)
        self.THREADS = gl.constexpr(THREADS)

    @gluon.jit
    def release(self, slot):
        """Say that this warpgroup has read a slot, which it has seen full; see Slots.release."""
        arrive_at(slot + self.FIRST, self.THREADS)

    @gluon.jit
    def await_empty(self, slot, turn):
        """Wait, as the one warp that fills the slots, until one may be filled again."""
        if turn > 0:
            await_at(slot + self.FIRST, self.THREADS)

    @gluon.jit
    def drain(self, count, STAGES: gl.constexpr):
        """Wait until all `count` fillings are read, so that no barrier is left half full."""
        for i in gl.static_range(STAGES):
            self.await_empty((count + i) % STAGES, (count + i) // STAGES)


@gluon.jit
def _await_turn(empty, slot, turn):
    mbarrier.wait(empty.index(slot), turn & 1 ^ 1)


@gluon.jit
def arrive_at(barrier, THREADS: gl.constexpr):
    """Arrive at a named barrier as a warpgroup: one of THREADS threads each, without waiting."""
    x = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0])) * 0 + barrier
    asm: gl.constexpr = f"bar.arrive $1, {THREADS};\n mov.b32 $0, $1;"
    gl.inline_asm_elementwise(asm, "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def arrive_if(barrier, condition, THREADS: gl.constexpr):
    """As arrive_at, if a scalar condition holds: wgmmas in flight may not cross a branch."""
    x = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0])) * 0
    asm: gl.constexpr = (
        f"{{.reg .pred p; setp.ne.b32 p, $2, 0; @p bar.arrive $1, {THREADS}; mov.b32 $0, $1;}}"
    )
    arguments = [x + barrier, x + condition.to(gl.int32)]
    gl.inline_asm_elementwise(asm, "=r,r,r", arguments, dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def await_at(barrier, THREADS: gl.constexpr):
    """Wait at a named barrier as a single warp."""
    x = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0])) * 0 + barrier
    asm: gl.constexpr = f"bar.sync $1, {THREADS};\n mov.b32 $0, $1;"
    gl.inline_asm_elementwise(asm, "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def make_slots(
    N: gl.constexpr, READERS: gl.constexpr, desc, BLOCK: gl.constexpr, WRITERS: gl.constexpr = 1
):
    """Return N slots for the boxes of a descriptor, each emptied by READERS partitions.

    WRITERS: arrivals that fill a slot, that of a load's `expect` among them.
    """
    buffers = gl.allocate_shared_memory(desc.dtype, [N] + BLOCK, desc.layout)
    return Slots(buffers, make_bars(N, WRITERS), make_bars(N, READERS))


@gluon.jit
def make_blocks(
    N: gl.constexpr,
    READERS: gl.constexpr,
    desc,
    BLOCK: gl.constexpr,
    FIRST: gl.constexpr,
    WRITERS: gl.constexpr = 1,
):
    """Return N slots for the boxes of a descriptor, emptied by READERS warpgroups."""
    buffers = gl.allocate_shared_memory(desc.dtype, [N] + BLOCK, desc.layout)
    return Blocks(buffers, make_bars(N, WRITERS), N, FIRST, READERS * 128 + 32)


@gluon.constexpr_function
def box_shape(BLOCK, COLUMNS, DOCUMENTS):
    """Return the box of a descriptor of BLOCK rows and COLUMNS, plain or cut."""
    return [1, 1, BLOCK, 1, COLUMNS] if DOCUMENTS else [1, 1, BLOCK, COLUMNS]


@gluon.jit
def make_box_slots(
    N: gl.constexpr,
    READERS: gl.constexpr,
    desc,
    BLOCK: gl.constexpr,
    COLUMNS: gl.constexpr,
    DOCUMENTS: gl.constexpr,
    WRITERS: gl.constexpr = 1,
):
    """Return slots for boxes of BLOCK rows and COLUMNS, plain or of a cut descriptor."""
    return make_slots(N, READERS, desc, box_shape(BLOCK, COLUMNS, DOCUMENTS), WRITERS)


@gluon.jit
def make_inlets(
    N: gl.constexpr, desc, BLOCK: gl.constexpr, COLUMNS: gl.constexpr, DOCUMENTS: gl.constexpr
):
    """Return N slots for boxes of BLOCK rows and COLUMNS, each of which is filled once."""
    box: gl.constexpr = box_shape(BLOCK, COLUMNS, DOCUMENTS)
    buffers = gl.allocate_shared_memory(desc.dtype, [N] + box, desc.layout)
    return Inlets(buffers, make_bars(N, 1))


@gluon.jit
def make_outlets(N: gl.constexpr, desc, BLOCK: gl.constexpr):
    """Return N slots for the boxes of a descriptor, emptied by one partition."""
    buffers = gl.allocate_shared_memory(desc.dtype, [N] + BLOCK, desc.layout)
    return Outlets(buffers, make_bars(N, 1))


@gluon.jit
def make_bars(N: gl.constexpr, COUNT: gl.constexpr):
    """Return N barriers of COUNT arrivals each. A partition other than the first must use each.

    Else Triton gives its memory to something else after its last use, and the hardware still takes
    it for a barrier: when another process has had the GPU for a while, it comes back changed.
    """
    bars = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(bars.index(i), count=COUNT)
    return bars


@gluon.jit
def await_full(slots, slot, turn):
    """Wait until a slot is filled for the turn-th time."""
    mbarrier.wait(slots.full.index(slot), turn & 1)


@gluon.jit
def load(desc, coordinates, slots, slot, turn):
    """Load a box into a slot, once that is free."""
    slots.await_empty(slot, turn)
    load_first(desc, coordinates, slots, slot)


@gluon.jit
def load_first(desc, coordinates, slots, slot):
    """Load a box into a slot that is free."""
    mbarrier.expect(slots.full.index(slot), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(
        desc, coordinates, slots.full.index(slot), slots.buffers.index(slot)
    )


@gluon.jit
def meet(barrier):
    """Wait at a named barrier for another warpgroup. The compiler takes its own from 0 up."""
    x = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0])) * 0 + barrier
    asm: gl.constexpr = "bar.sync $1, 256;\n mov.b32 $0, $1;"
    gl.inline_asm_elementwise(asm, "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def box_at(batch, head, row, end, column, DOCUMENTS: gl.constexpr):
    """Return the coordinates of a box that begins at a row and a column.

    DOCUMENTS: those of a cut descriptor (backends/descriptors.py), whose rows end at `end`.
    """
    if DOCUMENTS:
        return FAR, end, FAR - end + row, head, column
    else:
        return batch, head, row, column
