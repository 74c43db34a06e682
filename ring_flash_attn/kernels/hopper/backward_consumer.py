"""What a consumer of the Hopper backward does: the products of its 64 key rows, block by block.

dq of a block needs the ds of both consumers. They compute it in turns, each the whole dq of every
other block, which reads ds and K from shared memory once where halves would read ds twice. The one
without a turn goes on to its next scores meanwhile, so that one's exponentials hide behind the
other's products.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .epilogue import LOG2_E, at_source, store_gradient
from .slots import arrive_if, await_full, meet
from .walk import begin_walk, column, next_place

CONSUMERS = gl.constexpr(2)
ROWS = gl.constexpr(64)  # key rows of a consumer: what one warpgroup's wgmma multiplies
# The first of two named barriers, one for each consumer's turn: the other's ds is there. It cannot
# be one, because who arrives for this turn may wait for the next before this turn's has waited.
# The compiler takes its own from 0 up, to 4 here.
DS_FULL = gl.constexpr(5)
# The first one that says a slot of q is empty; those of dout follow, then those of a full dq.
FIRST_EMPTY = gl.constexpr(7)
# Further than any query row, and near enough for the difference to fit.
NOWHERE = gl.constexpr(1 << 30)


@gluon.jit
def consume(
    program,
    dk_ptr,
    dv_ptr,
    dk_strides,
    dv_strides,
    offsets_ptr,
    span,
    CONSUMER: gl.constexpr,
):
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
    k_left, v_left = _left_operands(program, CONSUMER)
    place = begin_walk(walk, BLOCK_M)
    for t in range(program.total):
        start = column(walk, place, BLOCK_M)
        dk, dv = _step(program, t, start, place[3], k_left, v_left, dk, dv, CONSUMER)
        place = next_place(walk, place, BLOCK_M)
    fence_async_shared()
    _hand_on_dq(program, program.total, CONSUMER)
    if program.k.buffers.dtype == gl.float16:
        dk *= program.softmax_scale
    row = walk.row + CONSUMER * ROWS
    batch, head = program.batch, program.out_head
    # Only here: through the loop there is no register for it.
    dk_ptr, dv_ptr = at_source(dk_ptr, dv_ptr, offsets_ptr, walk.row, span)
    store_gradient(dv, dv_ptr, dv_strides, batch, head, row, walk.row_end, HEAD_DIM, ADD)
    store_gradient(dk, dk_ptr, dk_strides, batch, head, row, walk.row_end, HEAD_DIM, ADD)


@gluon.jit
def _left_operands(program, CONSUMER: gl.constexpr):
    """Return this consumer's rows of K and V, in registers if that is asked for."""
    BLOCK_M: gl.constexpr = program.options.BLOCK_M
    BLOCK_D: gl.constexpr = program.options.BLOCK_D
    k = program.k.buffers.index(CONSUMER).reshape([ROWS, BLOCK_D])
    v = program.v.buffers.index(CONSUMER).reshape([ROWS, BLOCK_D])
    if program.options.KEYS_IN_REGISTERS:
        scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
        operand: gl.constexpr = gl.DotOperandLayout(0, scores, 2)
        k, v = k.load(operand), v.load(operand)
    return k, v


@gluon.jit
def _step(program, t, start, queries, k_left, v_left, dk, dv, CONSUMER: gl.constexpr):
    """Take block t, which starts at query row `start`: add its share to dk, dv; if it is this
    consumer's turn, compute dq.

    ds carries softmax_scale in bfloat16, where that is free: one FMA in place of a subtraction. In
    float16 it would lose the last bits of small numbers; there dq and dk are scaled.
    """
    BLOCK_M: gl.constexpr = program.options.BLOCK_M
    BLOCK_D: gl.constexpr = program.options.BLOCK_D
    Q_STAGES: gl.constexpr = program.options.Q_STAGES
    DOUT_STAGES: gl.constexpr = program.options.DOUT_STAGES
    dtype: gl.constexpr = program.k.buffers.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    columns: gl.constexpr = gl.SliceLayout(0, s_layout)
    operand: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    scale = program.softmax_scale
    q_slot, dout_slot = t % Q_STAGES, t % DOUT_STAGES
    if not program.options.KEYS_IN_REGISTERS:
        # Always 0, but ptxas does not know: else it keeps the descriptors in registers.
        zero = t >> 30
        k_left = program.k.buffers.index(CONSUMER + zero).reshape([ROWS, BLOCK_D])
        v_left = program.v.buffers.index(CONSUMER + zero).reshape([ROWS, BLOCK_D])
    q_tile = program.q.buffers.index(q_slot).reshape([BLOCK_M, BLOCK_D])
    dout_tile = program.dout.buffers.index(dout_slot).reshape([BLOCK_M, BLOCK_D])
    zeros = gl.zeros([ROWS, BLOCK_M], gl.float32, s_layout)
    await_full(program.q, q_slot, t // Q_STAGES)
    s_t = warpgroup_mma(k_left, q_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
    await_full(program.dout, dout_slot, t // DOUT_STAGES)
    dp_t = warpgroup_mma(v_left, dout_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
    lse2 = program.statistics.index(q_slot).load(columns)
    s_t = warpgroup_mma_wait(1, [s_t])
    p_t = gl.exp2(s_t * (scale * LOG2_E) - lse2[None, :])
    p_t = masked(p_t, start, queries, program.walk, CONSUMER)
    p_operand = gl.convert_layout(p_t.to(dtype), operand)
    delta = program.statistics.index(Q_STAGES + q_slot).load(columns)
    dp_t = warpgroup_mma_wait(0, [dp_t])
    if dtype == gl.float16:
        ds_t = (p_t * (dp_t - delta[None, :])).to(dtype)
    else:
        ds_t = (p_t * (dp_t * scale - delta[None, :])).to(dtype)
    turn = t % CONSUMERS
    program.ds.index(turn * CONSUMERS + CONSUMER).store(ds_t)
    dv = warpgroup_mma(p_operand, dout_tile, dv, is_async=True)
    dk = warpgroup_mma(gl.convert_layout(ds_t, operand), q_tile, dk, is_async=True)
    # Of this block's ds, and of the last one's dq, see _hand_on_dq.
    fence_async_shared()
    _hand_on_dq(program, t, CONSUMER)
    arrive_if(DS_FULL + turn, turn != CONSUMER, CONSUMERS * 128)
    dv = warpgroup_mma_wait(1, [dv])
    program.dout.release(dout_slot)
    dk = warpgroup_mma_wait(0, [dk])
    program.q.release(q_slot)
    # Nothing is in flight here: across a branch ptxas would serialise it (C7512).
    if turn == CONSUMER:
        _compute_dq(program, t)
    return dk, dv


@gluon.jit
def _compute_dq(program, t):
    """Put dq of block t, ds k [BLOCK_M, BLOCK_D] float32, where the writer finds it."""
    BLOCK_M: gl.constexpr = program.options.BLOCK_M
    BLOCK_D: gl.constexpr = program.options.BLOCK_D
    DQ_STAGES: gl.constexpr = program.options.DQ_STAGES
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    swapped: gl.constexpr = swapped_layout(BLOCK_M, BLOCK_D)
    turn = t % CONSUMERS
    meet(DS_FULL + turn)
    dq = gl.zeros([BLOCK_M, BLOCK_D], gl.float32, layout)
    for c in gl.static_range(CONSUMERS):
        ds_t = program.ds.index(turn * CONSUMERS + c)
        k_tile = program.k.buffers.index(c + (t >> 30)).reshape([ROWS, BLOCK_D])
        dq = warpgroup_mma(ds_t.permute((1, 0)), k_tile, dq, use_acc=c > 0, is_async=True)
    dq = warpgroup_mma_wait(0, [dq])
    if program.k.buffers.dtype == gl.float16:
        dq *= program.softmax_scale
    program.dq.await_empty(t % DQ_STAGES, t // DQ_STAGES)
    slot = program.dq.buffers.index(t % DQ_STAGES)
    slot._reinterpret(gl.float32, [BLOCK_M, BLOCK_D], swapped).store(_swap_halves(dq))


@gluon.jit
def _hand_on_dq(program, t, CONSUMER: gl.constexpr):
    """Say that dq of block t - 1 is in shared memory, if this consumer has put it there.

    Its stores become visible to the TMA by a fence of the threads that stored. One right after them
    would wait for them; the one that block t's ds needs comes when they are long done.
    """
    stage = (t - 1) % program.options.DQ_STAGES
    # For t = 0 the remainder is -1: nobody's.
    mine = (t - 1) % CONSUMERS == CONSUMER
    arrive_if(dq_full(program.options) + stage, mine, 128 + 32)


@gluon.constexpr_function
def swapped_layout(ROWS, COLUMNS):
    """Return the layout of a float32 box that the TMA reads, for what _swap_halves returns.

    The TMA's swizzle of 128 bytes: 32 columns side by side, of which row r has 4 c .. 4 c + 3 at
    4 (c ^ r % 8). With columns c and c ^ 16 of odd rows changed over.
    """
    row_bits = [[1, 4 ^ 16], [2, 8], [4, 16]] + [[1 << i, 0] for i in range(3, 20)]
    column_bits = [[0, 1 << i] for i in range(20)]
    rows, columns = ROWS.bit_length() - 1, COLUMNS.bit_length() - 1
    bases = column_bits[:5] + row_bits[:rows] + column_bits[5:columns]
    return gl.SharedLinearLayout(bases, alignment=1024)


@gluon.jit
def _swap_halves(x):
    """Return x [rows, columns] of a wgmma with columns c and c ^ 16 of odd rows changed over.

    A store of a warp takes 8 columns of 8 rows. Swizzled, rows 2 r and 2 r + 1 have theirs in the
    same banks; with odd rows' 16 columns further on they have not.
    """
    ROWS: gl.constexpr = x.shape[0]
    COLUMNS: gl.constexpr = x.shape[1]
    halves = gl.permute(gl.reshape(x, [ROWS, COLUMNS // 32, 2, 16]), (0, 1, 3, 2))
    low, high = gl.split(halves)
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, low.type.layout)))
    odd = (rows % 2 == 1)[:, None][:, :, None]
    swapped = gl.join(gl.where(odd, high, low), gl.where(odd, low, high))
    return gl.reshape(gl.permute(swapped, (0, 1, 3, 2)), [ROWS, COLUMNS])


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
def dq_full(options):
    """Return the named barrier that says the first slot of dq is full."""
    return FIRST_EMPTY + options.Q_STAGES + options.DOUT_STAGES
