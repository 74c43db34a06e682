"""What moves the tiles of the Hopper backward: its producer's loads, its writer's adds."""

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.core import _aggregate as aggregate

from .backward_consumer import ROWS, dq_full
from .epilogue import LOG2_E
from .slots import await_at, box_at, load, load_first
from .walk import begin_walk, column, next_place


@builtin
def tma_reduce_add(tensor_desc, coord, src, _semantic=None):
    """Add a box in shared memory to global memory. Triton 3.6 has this, but no name for it."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(
        ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle
    )


@aggregate
class Statistics:
    """lse and delta [B, H, L] float32."""

    lse_ptr: gl.tensor
    delta_ptr: gl.tensor
    lse_stride_batch: gl.tensor
    lse_stride_head: gl.tensor
    delta_stride_batch: gl.tensor
    delta_stride_head: gl.tensor

    @gluon.constexpr_function
    def __init__(self, lse_ptr, delta_ptr, lse_strides, delta_strides):
        self.lse_ptr = lse_ptr
        self.delta_ptr = delta_ptr
        self.lse_stride_batch, self.lse_stride_head = lse_strides
        self.delta_stride_batch, self.delta_stride_head = delta_strides

    @gluon.jit
    def load(self, batch, head, rows, end):
        """Return lse in base 2 and delta of `rows`.

        Of rows from `end` on and of those that saw nothing lse is +inf, which makes their p 0.
        """
        lse_ptr = self.lse_ptr + batch.to(gl.int64) * self.lse_stride_batch
        delta_ptr = self.delta_ptr + batch.to(gl.int64) * self.delta_stride_batch
        lse_ptr += head.to(gl.int64) * self.lse_stride_head
        delta_ptr += head.to(gl.int64) * self.delta_stride_head
        inside = rows < end
        lse = gl.load(lse_ptr + rows, mask=inside, other=float("-inf"))
        delta = gl.load(delta_ptr + rows, mask=inside, other=0.0)
        return gl.where(lse == float("-inf"), float("inf"), lse * LOG2_E), delta


@gluon.jit
def load_keys(walk, batch, head, desc, slots, TILES: gl.constexpr, DOCUMENTS: gl.constexpr):
    """Load the tile's rows of K or of V, if it meets anything."""
    if walk.first_entry < walk.end_entry:
        for c in gl.static_range(TILES):
            row = walk.row + c * ROWS
            box = box_at(batch, head, row, walk.row_end, 0, DOCUMENTS)
            load_first(desc, box, slots, c)


@gluon.jit
def produce(program, statistics, q, dout):
    """Load of every block Q, lse, delta and dout, in the order the consumers walk.

    p comes out as 2**P_SHIFT p = p / P_UNIT: lse is handed on less P_SHIFT, delta times P_UNIT.
    """
    walk = program.walk
    BLOCK_M: gl.constexpr = program.options.BLOCK_M
    Q_STAGES: gl.constexpr = program.options.Q_STAGES
    DOUT_STAGES: gl.constexpr = program.options.DOUT_STAGES
    DOCUMENTS: gl.constexpr = program.options.DOCUMENTS
    layout: gl.constexpr = gl.BlockedLayout([BLOCK_M // 32], [32], [1], [0])
    place = begin_walk(walk, BLOCK_M)
    for t in range(program.total):
        head, end, row = place[0], place[3][1], column(walk, place, BLOCK_M)
        # Asked for before the wait for a slot, which hides how long they take.
        rows = row + gl.arange(0, BLOCK_M, layout)
        lse2, delta = statistics.load(program.batch, head, rows, end)
        slot = t % Q_STAGES
        box = box_at(program.batch, head, row, end, 0, DOCUMENTS)
        load(q, box, program.q, slot, t // Q_STAGES)
        program.statistics.index(slot).store(lse2 - program.options.P_SHIFT)
        if q.dtype != gl.float16:
            delta *= program.softmax_scale  # as ds, see backward_consumer.py
        if program.options.P_SHIFT > 0:
            delta *= program.options.P_UNIT
        program.statistics.index(Q_STAGES + slot).store(delta)
        mbarrier.arrive(program.q.full.index(slot), count=1)
        load(dout, box, program.dout, t % DOUT_STAGES, t // DOUT_STAGES)
        place = next_place(walk, place, BLOCK_M)
    program.q.drain(program.total, Q_STAGES)
    program.dout.drain(program.total, DOUT_STAGES)


@gluon.jit
def write(program, dq):
    """Add every block's dq to memory: what lies in the slots that the consumers fill in turns."""
    walk = program.walk
    BLOCK_M: gl.constexpr = program.options.BLOCK_M
    DQ_STAGES: gl.constexpr = program.options.DQ_STAGES
    DOCUMENTS: gl.constexpr = program.options.DOCUMENTS
    place = begin_walk(walk, BLOCK_M)
    for t in range(program.total):
        head, end, row = place[0], place[3][1], column(walk, place, BLOCK_M)
        stage = t % DQ_STAGES
        await_at(dq_full(program.options) + stage, 128 + 32)
        box = box_at(program.batch, head, row, end, 0, DOCUMENTS)
        tma_reduce_add(dq, box, program.dq.buffers.index(stage))
        tma.store_wait(DQ_STAGES - 1)
        # What has been read is the oldest slot, once all are in use.
        if t >= DQ_STAGES - 1:
            program.dq.release((t + 1) % DQ_STAGES)
        place = next_place(walk, place, BLOCK_M)
    tma.store_wait(0)
