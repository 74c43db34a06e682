"""dq for Hopper (sm_90) in Gluon, of heads of up to 256: one source's K, V.

Computes what kernels/dq.py computes, from the same tables, and is as repeatable. A program owns 128
query rows of one head, 64 for each of two consumers; one warp, the producer, loads by TMA.

    slots     number   filled by   what
    q, dout   2 each   TMA         64 rows for each consumer, once
    kv        STAGES   TMA         64 rows of K, then of V, of one block after the other
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import _aggregate as aggregate

from .backward_transfer import Statistics
from .epilogue import LOG2_E, store_dq
from .operands import left_operand, multiply_rows
from .slots import Slots, await_full, box_at, load, make_box_slots
from .tiles import Tables, load_work
from .walk import Walk, begin_walk, column, count_blocks, next_place

ROWS = gl.constexpr(64)  # query rows of a consumer, and key rows of a block


@aggregate
class QueryProgram:
    """What the partitions share; `total` is how many blocks they go through."""

    walk: Walk
    batch: gl.tensor
    head: gl.tensor
    key_head: gl.tensor
    finishes: gl.tensor
    total: gl.tensor
    q: Slots
    dout: Slots
    kv: Slots
    softmax_scale: gl.tensor
    HEAD_DIM: gl.constexpr
    BLOCK_D: gl.constexpr
    ADD: gl.constexpr
    DOCUMENTS: gl.constexpr
    STAGES: gl.constexpr
    COLUMNS: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, walk, heads, finishes, total, slots, softmax_scale, options):
        self.walk = walk
        self.batch, self.head, self.key_head = heads
        self.finishes = finishes
        self.total = total
        self.q, self.dout, self.kv = slots
        self.softmax_scale = softmax_scale
        self.HEAD_DIM = gl.constexpr(options[0])
        self.BLOCK_D = gl.constexpr(options[1])
        self.ADD = gl.constexpr(options[2])
        self.DOCUMENTS = gl.constexpr(options[3])
        self.STAGES = gl.constexpr(options[4])
        self.COLUMNS = gl.constexpr(options[5])


@gluon.jit
def _load_queries(program, desc, slots):
    """Load the tile's rows of Q or of dout."""
    walk = program.walk
    for c in gl.static_range(2):
        row = walk.row + c * ROWS
        box = box_at(program.batch, program.head, row, walk.row_end, 0, program.DOCUMENTS)
        load(desc, box, slots, c, 0)


@gluon.jit
def _produce(program, q, k, v, dout):
    """Load Q and dout, and of every block K and V."""
    STAGES: gl.constexpr = program.STAGES
    walk = program.walk
    if program.total > 0:
        _load_queries(program, q, program.q)
    place = begin_walk(walk, ROWS)
    for t in range(program.total):
        end, row = place[3][1], column(walk, place, ROWS)
        box = box_at(program.batch, program.key_head, row, end, 0, program.DOCUMENTS)
        load(k, box, program.kv, 2 * t % STAGES, 2 * t // STAGES)
        if t == 0:
            _load_queries(program, dout, program.dout)
        load(v, box, program.kv, (2 * t + 1) % STAGES, (2 * t + 1) // STAGES)
        place = next_place(walk, place, ROWS)


@gluon.jit
def _tile(slots, slot, BLOCK_D: gl.constexpr):
    """Return a slot's box as [ROWS, BLOCK_D]."""
    return slots.buffers.index(slot).reshape([ROWS, BLOCK_D])


@gluon.jit
def _consume(program, statistics, dq_ptr, result_ptr, dq_strides, CONSUMER: gl.constexpr):
    """Compute dq of rows [CONSUMER * ROWS, (CONSUMER + 1) * ROWS) of the program's tile."""
    walk = program.walk
    BLOCK_D: gl.constexpr = program.BLOCK_D
    STAGES: gl.constexpr = program.STAGES
    COLUMNS: gl.constexpr = program.COLUMNS
    dtype: gl.constexpr = program.q.buffers.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    scale = program.softmax_scale
    row = walk.row + CONSUMER * ROWS
    offs_m = row + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
    lse2, delta = statistics.load(program.batch, program.head, offs_m, walk.row_end)
    dq = gl.zeros([ROWS, BLOCK_D], gl.float32, layout)
    zeros = gl.zeros([ROWS, ROWS], gl.float32, s_layout)
    if program.total > 0:
        await_full(program.q, CONSUMER, 0)
        await_full(program.dout, CONSUMER, 0)
    q_left = left_operand(_tile(program.q, CONSUMER, BLOCK_D), s_layout, COLUMNS)
    place = begin_walk(walk, ROWS)
    for t in range(program.total):
        zero = t >> 30  # see backward_consumer.py
        k_slot, v_slot = 2 * t % STAGES, (2 * t + 1) % STAGES
        k_tile, v_tile = _tile(program.kv, k_slot, BLOCK_D), _tile(program.kv, v_slot, BLOCK_D)
        q_tile = _tile(program.q, CONSUMER + zero, BLOCK_D)
        dout_tile = _tile(program.dout, CONSUMER + zero, BLOCK_D)
        await_full(program.kv, k_slot, 2 * t // STAGES)
        s = multiply_rows(q_left, q_tile, k_tile, s_layout, COLUMNS)
        await_full(program.kv, v_slot, (2 * t + 1) // STAGES)
        dp = warpgroup_mma(dout_tile, v_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, [s])
        p = gl.exp2(s * (scale * LOG2_E) - lse2[:, None])
        p = _masked(p, offs_m, row, column(program.walk, place, ROWS), place[3])
        dp = warpgroup_mma_wait(0, [dp])
        program.kv.release(v_slot)
        ds = gl.convert_layout((p * (dp - delta[:, None])).to(dtype), operand)
        dq = warpgroup_mma(ds, k_tile, dq, is_async=True)
        place = next_place(walk, place, ROWS)
        dq = warpgroup_mma_wait(0, [dq])
        program.kv.release(k_slot)
    store_dq(
        dq * scale,
        dq_ptr,
        result_ptr,
        dq_strides,
        program.batch,
        program.head,
        row,
        walk.row_end,
        program.finishes,
        program.HEAD_DIM,
        program.ADD,
    )


@gluon.jit
def _masked(p, offs_m, row, start, columns):
    """Return p [ROWS, ROWS] with 0 where query row and key row do not meet."""
    end, lo, hi = columns[1], columns[2], columns[3]
    last = row + ROWS - 1
    if (start < last + lo) | (start + ROWS - 1 > row + hi) | (start + ROWS > end):
        offs_n = start + gl.arange(0, ROWS, gl.SliceLayout(0, p.type.layout))
        left = offs_m + lo
        width = gl.maximum(gl.minimum(offs_m + hi + 1, end) - left, 0)
        distance = offs_n[None, :] - left[:, None]
        p = gl.where(distance.to(gl.uint32) < width[:, None].to(gl.uint32), p, 0.0)
    return p


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
    ]
)
def _hopper_dq_kernel(
    q,
    k,
    v,
    dout,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    result_ptr,
    lse_stride_batch,
    lse_stride_head,
    delta_stride_batch,
    delta_stride_head,
    dq_strides,
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
    STAGES: gl.constexpr,
    QUERY_COLUMNS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """dq = softmax_scale ds k, ds = p (dout v^T - delta), p = exp(softmax_scale q k^T - lse).

    Grid: n_tiles * B * H, one program a tile of up to 128 query rows and query head. As in
    kernels/dq.py: tables, lse, delta, dq, result, their strides, heads, ADD.
    q, k, v, dout: descriptors as in _hopper_bwd_kernel; all boxes have 64 rows.
    """
    row, row_end, first_entry, end_entry, finishes, head = load_work(
        Tables(tiles_ptr, entries_ptr, n_tiles, n_heads, heads_in_flight, heads, group),
        gl.program_id(0),
    )
    tile, met = (row, row_end), (first_entry, end_entry)
    walk = Walk(entries_ptr, tile, met, row * 0, n_tiles, head % heads, row * 0 + 1, False, False)
    q_slots = make_box_slots(2, 1, q, ROWS, BLOCK_D, DOCUMENTS)
    dout_slots = make_box_slots(2, 1, dout, ROWS, BLOCK_D, DOCUMENTS)
    kv_slots = make_box_slots(STAGES, 2, k, ROWS, BLOCK_D, DOCUMENTS)
    fence_async_shared()
    program = QueryProgram(
        walk,
        (head // heads, head % heads, head % heads // group),
        finishes,
        count_blocks(walk, ROWS),
        (q_slots, dout_slots, kv_slots),
        softmax_scale,
        (HEAD_DIM, BLOCK_D, ADD, DOCUMENTS, STAGES, QUERY_COLUMNS),
    )
    rows = Statistics(
        lse_ptr,
        delta_ptr,
        (lse_stride_batch, lse_stride_head),
        (delta_stride_batch, delta_stride_head),
    )
    # A constant must be spelled inside the call: in a tuple with a name it becomes a tensor.
    gl.warp_specialize(
        [
            (_consume, (program, rows, dq_ptr, result_ptr, dq_strides, 0)),
            (_consume, (program, rows, dq_ptr, result_ptr, dq_strides, 1)),
            (_produce, (program, q, k, v, dout)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
