"""What a consumer of the Hopper backward does: the products of its 64 key rows, block by block."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .epilogue import LOG2_E, store_gradient
from .slots import arrive_at, await_full, meet
from .walk import begin_walk, column, next_place

CONSUMERS = gl.constexpr(2)
ROWS = gl.constexpr(64)  # key rows of a consumer: what one warpgroup's wgmma multiplies
# Named barriers at which the consumers meet. The compiler takes its own from 0 up, to 4 here.
DS_FULL = gl.constexpr(5)
DS_EMPTY = gl.constexpr(6)
# The first one that says a slot of q is empty; those of dout follow, then those of a full dq.
FIRST_EMPTY = gl.constexpr(7)
# Further than any query row, and near enough for the difference to fit.
NOWHERE = gl.constexpr(1 << 30)


@gluon.jit
def consume(program, dk_ptr, dv_ptr, dk_strides, dv_strides, CONSUMER: gl.constexpr):
    """Compute dk and dv of rows [CONSUMER * ROWS, (CONSUMER + 1) * ROWS) of the program's tile."""
    walk = program.walk
    HEAD_DIM: gl.constexpr = program.options.HEAD_DIM
    BLOCK_D: gl.constexpr = program.options.BLOCK_D
    BLOCK_M: gl.constexpr = program.options.BLOCK_M
    ADD: gl.constexpr = program.options.ADD
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    dk = gl.zeros([ROWS, BLOCK_D], gl.float32, layout)
    dv = gl.zeros([ROWS, BLOCK_D], gl.float32, layout)
    if program.total > 0:
        for c in gl.static_range(CONSUMERS):
            await_full(program.k, c, 0)
        await_full(program.v, CONSUMER, 0)
    place = begin_walk(walk, program.first_head, BLOCK_M)
    for t in range(program.total):
        dk, dv = _step(program, t, column(place, BLOCK_M), place[3], dk, dv, CONSUMER)
        place = next_place(walk, place, BLOCK_M)
    if program.k.buffers.dtype == gl.float16:
        dk *= program.softmax_scale
    row = walk.row + CONSUMER * ROWS
    batch, head = program.batch, program.out_head
    store_gradient(dv, dv_ptr, dv_strides, batch, head, row, walk.row_end, HEAD_DIM, ADD)
    store_gradient(dk, dk_ptr, dk_strides, batch, head, row, walk.row_end, HEAD_DIM, ADD)


@gluon.jit
def _step(program, t, start, queries, dk, dv, CONSUMER: gl.constexpr):
    """Take block t, which starts at query row `start`: add its share to dk, dv, and hand on dq.

    ds carries softmax_scale in bfloat16, where that is free: one FMA in place of a subtraction. In
    float16 it would lose the last bits of small numbers; there dq and dk are scaled.
    """
    BLOCK_M: gl.constexpr = program.options.BLOCK_M
    BLOCK_D: gl.constexpr = program.options.BLOCK_D
    Q_STAGES: gl.constexpr = program.options.Q_STAGES
    DOUT_STAGES: gl.constexpr = program.options.DOUT_STAGES
    EARLY: gl.constexpr = program.options.EARLY
    dtype: gl.constexpr = program.k.buffers.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    columns: gl.constexpr = gl.SliceLayout(0, s_layout)
    operand: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    scale = program.softmax_scale
    # Always 0, but ptxas does not know: else it keeps the descriptors of K and V in registers.
    zero = t >> 30
    q_slot, dout_slot = t % Q_STAGES, t % DOUT_STAGES
    k_tile = program.k.buffers.index(CONSUMER + zero).reshape([ROWS, BLOCK_D])
    v_tile = program.v.buffers.index(CONSUMER + zero).reshape([ROWS, BLOCK_D])
    q_tile = program.q.buffers.index(q_slot).reshape([BLOCK_M, BLOCK_D])
    dout_tile = program.dout.buffers.index(dout_slot).reshape([BLOCK_M, BLOCK_D])
    zeros = gl.zeros([ROWS, BLOCK_M], gl.float32, s_layout)
    await_full(program.q, q_slot, t // Q_STAGES)
    s_t = warpgroup_mma(k_tile, q_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
    await_full(program.dout, dout_slot, t // DOUT_STAGES)
    dp_t = warpgroup_mma(v_tile, dout_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
    lse2 = program.statistics.index(q_slot).load(columns)
    s_t = warpgroup_mma_wait(1, [s_t])
    p_t = gl.exp2(s_t * (scale * LOG2_E) - lse2[None, :])
    p_t = masked(p_t, start, queries, program.walk, CONSUMER)
    p_operand = gl.convert_layout(p_t.to(dtype), operand)
    if EARLY:
        dv = warpgroup_mma(p_operand, dout_tile, dv, is_async=True)
    delta = program.statistics.index(Q_STAGES + q_slot).load(columns)
    dp_t = warpgroup_mma_wait(1 if EARLY else 0, [dp_t])
    if dtype == gl.float16:
        ds_t = (p_t * (dp_t - delta[None, :])).to(dtype)
    else:
        ds_t = (p_t * (dp_t * scale - delta[None, :])).to(dtype)
    _publish_ds(program, t, ds_t, CONSUMER)
    if not EARLY:
        dv = warpgroup_mma(p_operand, dout_tile, dv, is_async=True)
    fence_async_shared()
    meet(DS_FULL)
    dq = _issue_dq(program, t, zero, CONSUMER)
    dk = warpgroup_mma(gl.convert_layout(ds_t, operand), q_tile, dk, is_async=True)
    dv = warpgroup_mma_wait(CONSUMERS + 1, [dv])
    program.dout.release(dout_slot)
    dq = warpgroup_mma_wait(1, [dq])
    if dtype == gl.float16:
        dq *= scale
    _publish_dq(program, t, dq, CONSUMER)
    dk = warpgroup_mma_wait(0, [dk])
    program.q.release(q_slot)
    return dk, dv


@gluon.jit
def masked(p_t, start, queries, walk, CONSUMER: gl.constexpr):
    """Return p^T [ROWS, BLOCK_M] with 0 where key row and query row do not meet.

    Query rows past the entry have p 0 already, see Statistics.
    """
    BLOCK_M: gl.constexpr = p_t.shape[1]
    lo, hi = queries[2], queries[3]
    row = walk.row + CONSUMER * ROWS
    last = row + ROWS - 1
    # One if over the whole condition: a loop of its own for the blocks without a mask spills.
    if (start < last + lo) | (start + BLOCK_M - 1 > row + hi) | (last >= walk.row_end):
        offs_n = row + gl.arange(0, ROWS, gl.SliceLayout(1, p_t.type.layout))
        offs_m = start + gl.arange(0, BLOCK_M, gl.SliceLayout(0, p_t.type.layout))
        left = gl.where(offs_n < walk.row_end, offs_n + lo, NOWHERE)
        distance = offs_m[None, :] - left[:, None]
        p_t = gl.where(distance.to(gl.uint32) < (hi - lo + 1).to(gl.uint32), p_t, 0.0)
    return p_t


@gluon.jit
def _publish_ds(program, t, ds_t, CONSUMER: gl.constexpr):
    """Put this consumer's ds^T where both find it; with one slot, once both have read the last."""
    DS_STAGES: gl.constexpr = program.options.DS_STAGES
    if DS_STAGES == 1:
        meet(DS_EMPTY)
    program.ds.index(t % DS_STAGES * CONSUMERS + CONSUMER).store(ds_t)


@gluon.jit
def _issue_dq(program, t, zero, CONSUMER: gl.constexpr):
    """Issue ds k: of a block of 64 queries half the columns, of one of 128 half the rows."""
    BLOCK_M: gl.constexpr = program.options.BLOCK_M
    BLOCK_D: gl.constexpr = program.options.BLOCK_D
    COLUMNS: gl.constexpr = BLOCK_D // CONSUMERS if BLOCK_M == 64 else BLOCK_D
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    dq = gl.zeros([64, COLUMNS], gl.float32, layout)
    for c in gl.static_range(CONSUMERS):
        ds_t = program.ds.index(t % program.options.DS_STAGES * CONSUMERS + c)
        k_tile = program.k.buffers.index(c + zero).reshape([ROWS, BLOCK_D])
        if BLOCK_M == 64:
            k_tile = k_tile.slice(CONSUMER * COLUMNS, COLUMNS, 1)
        else:
            ds_t = ds_t.slice(CONSUMER * 64, 64, 1)
        dq = warpgroup_mma(ds_t.permute((1, 0)), k_tile, dq, use_acc=c > 0, is_async=True)
    return dq


@gluon.jit
def _publish_dq(program, t, dq, CONSUMER: gl.constexpr):
    """Hand this consumer's part of a block's dq to the writer."""
    DQ_STAGES: gl.constexpr = program.options.DQ_STAGES
    slot = t % DQ_STAGES * CONSUMERS + CONSUMER
    program.dq.await_empty(slot, t // DQ_STAGES)
    program.dq.buffers.index(slot).reshape([dq.shape[0], dq.shape[1]]).store(dq)
    fence_async_shared()
    arrive_at(dq_full(program.options) + slot, 128 + 32)


@gluon.jit
def dq_full(options):
    """Return the named barrier that says the first slot of dq is full."""
    return FIRST_EMPTY + options.Q_STAGES + options.DOUT_STAGES
