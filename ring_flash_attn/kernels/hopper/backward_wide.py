"""dk and dv for Hopper (sm_90) in Gluon, of heads of up to 256: one source's K, V.

Computes what kernels/dkv.py computes, from the same tables, and is as repeatable. dk and dv of 64
key rows of 256 fill the registers of a warpgroup each, so one consumer has the scores, p and dv,
the other dp, ds and dk; p passes through shared memory. One warp, the producer, loads by TMA.

    slots     number   filled by              read by
    k, v      1        TMA                    the one consumer, the other
    q, dout   2 each   TMA and the producer   both
    p         2        the first consumer     the second
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import _aggregate as aggregate

from .backward_consumer import masked
from .backward_transfer import Statistics, load_keys, produce
from .epilogue import LOG2_E, at_source, store_gradient
from .slots import Inlets, Slots, await_full, make_bars, make_box_slots, make_inlets
from .tiles import Tables, load_work
from .walk import Walk, begin_walk, column, count_blocks, next_place

ROWS = gl.constexpr(64)  # key rows of a tile, and query rows of a block
# p is kept as float16, times 2**15: p <= 1, and float16 has 11 bits only from 2**-14 on.
P_UNIT = gl.constexpr(1.0 / (1 << 15))


@aggregate
class WideOptions:
    """What is compiled in, see _hopper_dkv_kernel."""

    HEAD_DIM: gl.constexpr
    BLOCK_D: gl.constexpr
    BLOCK_M: gl.constexpr
    ADD: gl.constexpr
    DOCUMENTS: gl.constexpr
    Q_STAGES: gl.constexpr
    DOUT_STAGES: gl.constexpr
    P_SHIFT: gl.constexpr
    P_UNIT: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, HEAD_DIM, BLOCK_D, ADD, DOCUMENTS):
        self.HEAD_DIM = gl.constexpr(HEAD_DIM)
        self.BLOCK_D = gl.constexpr(BLOCK_D)
        self.BLOCK_M = gl.constexpr(64)
        self.ADD = gl.constexpr(ADD)
        self.DOCUMENTS = gl.constexpr(DOCUMENTS)
        self.Q_STAGES = gl.constexpr(2)
        self.DOUT_STAGES = gl.constexpr(2)
        self.P_SHIFT = gl.constexpr(15.0)
        self.P_UNIT = gl.constexpr(1.0 / (1 << 15))


@aggregate
class WideProgram:
    """What the partitions share; `total` is how many blocks they go through."""

    walk: Walk
    batch: gl.tensor
    key_head: gl.tensor
    total: gl.tensor
    k: Inlets
    v: Inlets
    q: Slots
    statistics: gl.shared_memory_descriptor
    dout: Slots
    p: Inlets
    softmax_scale: gl.tensor
    options: WideOptions

    @gluon.constexpr_function
    def __init__(self, walk, heads, total, k, v, q, statistics, dout, p, scale, options):
        self.walk = walk
        self.batch, self.key_head = heads
        self.total = total
        self.k = k
        self.v = v
        self.q = q
        self.statistics = statistics
        self.dout = dout
        self.p = p
        self.softmax_scale = scale
        self.options = options


@gluon.jit
def _tile(slots, slot, BLOCK_D: gl.constexpr):
    """Return a slot's box as [ROWS, BLOCK_D]."""
    return slots.buffers.index(slot).reshape([ROWS, BLOCK_D])


@gluon.jit
def _produce(program, statistics, q, k, v, dout):
    """Load K and V, and what produce loads of every block."""
    walk = program.walk
    DOCUMENTS: gl.constexpr = program.options.DOCUMENTS
    load_keys(walk, program.batch, program.key_head, k, program.k, 1, DOCUMENTS)
    load_keys(walk, program.batch, program.key_head, v, program.v, 1, DOCUMENTS)
    produce(program, statistics, q, dout)


@gluon.jit
def _consume_p(program, dv_ptr, dv_strides):
    """Compute p and dv. The product of a block's p runs beside the next block's softmax."""
    walk = program.walk
    BLOCK_D: gl.constexpr = program.options.BLOCK_D
    dtype: gl.constexpr = program.k.buffers.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    dv = gl.zeros([ROWS, BLOCK_D], gl.float32, layout)
    zeros = gl.zeros([ROWS, ROWS], gl.float32, s_layout)
    p = gl.convert_layout(zeros.to(dtype), operand)
    if program.total > 0:
        await_full(program.k, 0, 0)
        await_full(program.dout, 0, 0)
    place = begin_walk(walk, ROWS)
    for t in range(program.total):
        zero = t >> 30  # see backward_consumer.py
        slot = t % 2
        # Of the block before; at the first, the first with p = 0.
        previous = gl.maximum(t - 1, 0) % 2
        await_full(program.q, slot, t // 2)
        k_tile, q_tile = _tile(program.k, zero, BLOCK_D), _tile(program.q, slot, BLOCK_D)
        s_t = warpgroup_mma(k_tile, q_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
        dv = warpgroup_mma(p, _tile(program.dout, previous, BLOCK_D), dv, is_async=True)
        lse2 = program.statistics.index(slot).load(gl.SliceLayout(0, s_layout))
        s_t = warpgroup_mma_wait(1, [s_t])
        p_t = gl.exp2(s_t * (program.softmax_scale * LOG2_E) - lse2[None, :])
        p_t = masked(p_t, column(walk, place, ROWS), place[3], walk, 0)
        # The slot is free: Q has come into its own, so the other consumer is at most a block back.
        program.p.buffers.index(slot).store(p_t.to(gl.float16))
        mbarrier.arrive(program.p.full.index(slot), count=1)
        dv = warpgroup_mma_wait(0, [dv])
        program.q.release(slot)
        if t > 0:
            program.dout.release(previous)
            await_full(program.dout, slot, t // 2)
        p = gl.convert_layout(p_t.to(dtype), operand)
        place = next_place(walk, place, ROWS)
    if program.total > 0:
        last = (program.total - 1) % 2
        dv = warpgroup_mma(p, _tile(program.dout, last, BLOCK_D), dv, is_async=True)
        dv = warpgroup_mma_wait(0, [dv])
    HEAD_DIM: gl.constexpr = program.options.HEAD_DIM
    ADD: gl.constexpr = program.options.ADD
    batch, head = program.batch, program.key_head
    store_gradient(
        dv * P_UNIT, dv_ptr, dv_strides, batch, head, walk.row, walk.row_end, HEAD_DIM, ADD
    )


@gluon.jit
def _consume_ds(program, dk_ptr, dk_strides):
    """Compute ds and dk. The product of a block's ds runs before the next block's dp.

    Not beside the next block's arithmetic, as that of p does: Q is wanted by the other consumer
    first and by this product last, and until then its slot cannot be filled again.
    """
    walk = program.walk
    BLOCK_D: gl.constexpr = program.options.BLOCK_D
    dtype: gl.constexpr = program.k.buffers.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    dk = gl.zeros([ROWS, BLOCK_D], gl.float32, layout)
    zeros = gl.zeros([ROWS, ROWS], gl.float32, s_layout)
    ds = gl.convert_layout(zeros.to(dtype), operand)
    scale = program.softmax_scale
    if program.total > 0:
        await_full(program.v, 0, 0)
        await_full(program.q, 0, 0)
    for t in range(program.total):
        zero = t >> 30
        slot = t % 2
        previous = gl.maximum(t - 1, 0) % 2
        v_tile, dout_tile = _tile(program.v, zero, BLOCK_D), _tile(program.dout, slot, BLOCK_D)
        dk = warpgroup_mma(ds, _tile(program.q, previous, BLOCK_D), dk, is_async=True)
        await_full(program.dout, slot, t // 2)
        dp_t = warpgroup_mma(v_tile, dout_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
        dk = warpgroup_mma_wait(1, [dk])
        if t > 0:
            program.q.release(previous)
        await_full(program.q, slot, t // 2)
        delta = program.statistics.index(2 + slot).load(gl.SliceLayout(0, s_layout))
        await_full(program.p, slot, t // 2)
        p_t = program.p.buffers.index(slot).load(s_layout).to(gl.float32)
        dp_t = warpgroup_mma_wait(0, [dp_t])
        program.dout.release(slot)
        # As in backward_consumer.py: float16 is scaled at the end.
        if dtype == gl.float16:
            ds_t = p_t * (dp_t * P_UNIT - delta[None, :])
        else:
            ds_t = p_t * (dp_t * (scale * P_UNIT) - delta[None, :])
        ds = gl.convert_layout(ds_t.to(dtype), operand)
    if program.total > 0:
        last = (program.total - 1) % 2
        dk = warpgroup_mma(ds, _tile(program.q, last, BLOCK_D), dk, is_async=True)
        dk = warpgroup_mma_wait(0, [dk])
    if dtype == gl.float16:
        dk *= scale
    HEAD_DIM: gl.constexpr = program.options.HEAD_DIM
    ADD: gl.constexpr = program.options.ADD
    batch, head = program.batch, program.key_head
    store_gradient(dk, dk_ptr, dk_strides, batch, head, walk.row, walk.row_end, HEAD_DIM, ADD)


@gluon.jit(
    do_not_specialize=[
        "lse_stride_batch",
        "lse_stride_head",
        "delta_stride_batch",
        "delta_stride_head",
        "n_tiles",
        "n_heads",
        "heads_in_flight",
        "heads",
        "group",
        "span",
    ]
)
def _hopper_dkv_kernel(
    q,
    k,
    v,
    dout,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    lse_stride_batch,
    lse_stride_head,
    delta_stride_batch,
    delta_stride_head,
    dk_strides,
    dv_strides,
    offsets_ptr,
    span,
    tiles_ptr,
    entries_ptr,
    n_tiles,
    n_heads,
    heads_in_flight,
    heads,
    group,
    softmax_scale,
    HEAD_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr,
    ADD: gl.constexpr,
    DOCUMENTS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """dv = p^T dout, dk = softmax_scale ds^T q, with p and ds as in _hopper_bwd_kernel.

    Grid: n_tiles * B * Hk, one program a tile of up to 64 key rows and key head. Arguments as
    there; all boxes have 64 rows.
    """
    row, row_end, first_entry, end_entry, _, head = load_work(
        Tables(tiles_ptr, entries_ptr, n_tiles, n_heads, heads_in_flight, heads, group),
        gl.program_id(0),
    )
    key_head = head % heads
    tile, met = (row, row_end), (first_entry, end_entry)
    walk = Walk(entries_ptr, tile, met, row * 0, n_tiles, key_head * group, group, True, False)
    k_slots = make_inlets(1, k, ROWS, BLOCK_D, DOCUMENTS)
    v_slots = make_inlets(1, v, ROWS, BLOCK_D, DOCUMENTS)
    q_slots = make_box_slots(2, 2, q, ROWS, BLOCK_D, DOCUMENTS, 2)
    dout_slots = make_box_slots(2, 2, dout, ROWS, BLOCK_D, DOCUMENTS)
    p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, ROWS], gl.float16)
    p_buffers = gl.allocate_shared_memory(gl.float16, [2, ROWS, ROWS], p_layout)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    statistics = gl.allocate_shared_memory(gl.float32, [4, ROWS], flat)
    fence_async_shared()
    program = WideProgram(
        walk,
        (head // heads, key_head),
        count_blocks(walk, ROWS) * group,
        k_slots,
        v_slots,
        q_slots,
        statistics,
        dout_slots,
        Inlets(p_buffers, make_bars(2, 1)),
        softmax_scale,
        WideOptions(HEAD_DIM, BLOCK_D, ADD, DOCUMENTS),
    )
    rows = Statistics(
        lse_ptr,
        delta_ptr,
        (lse_stride_batch, lse_stride_head),
        (delta_stride_batch, delta_stride_head),
    )
    dk_ptr, dv_ptr = at_source(dk_ptr, dv_ptr, offsets_ptr, row, span)
    gl.warp_specialize(
        [
            (_consume_p, (program, dv_ptr, dv_strides)),
            (_consume_ds, (program, dk_ptr, dk_strides)),
            (_produce, (program, rows, q, k, v, dout)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
