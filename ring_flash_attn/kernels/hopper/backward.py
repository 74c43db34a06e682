"""The backward for Hopper (sm_90) in Gluon: one source's K, V; dq, dk and dv in one kernel.

Computes what kernels/dq.py and kernels/dkv.py compute, from the tables of dkv, in the way of
FlashAttention-3 (Shah et al. 2024, and its mainloop_bwd_sm90): a program owns a tile of key rows
and walks the query rows that meet it. One warp, the producer, loads by TMA, two warpgroups, the
consumers, of 64 key rows each multiply, and one warp, the writer, adds their dq to memory. dk and
dv stay in registers, dq is summed over the programs by the TMA, in any order.

    slots         number                filled by                  what
    k, v          CONSUMERS             TMA                        64 rows of K or V, once
    q             Q_STAGES              TMA and the producer       BLOCK_M rows of Q, lse and delta
    dout          DOUT_STAGES           TMA                        BLOCK_M rows of dout
    ds            DS_STAGES, CONSUMERS  a consumer, for both       its 64 rows of ds^T
    dq            DQ_STAGES, CONSUMERS  a consumer, for the writer its columns (BLOCK_M 128: its
                                                                   rows) of a block's dq
"""

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.language.core import _aggregate as aggregate

from .backward_consumer import consume
from .epilogue import LOG2_E
from .slots import (
    Slots,
    await_full,
    box_at,
    load,
    make_slots,
    release,
)
from .tiles import Tables, load_work
from .walk import Walk, begin_walk, count_blocks, next_place, query_row

CONSUMERS = gl.constexpr(2)
ROWS = gl.constexpr(64)  # key rows of a consumer


@builtin
def tma_reduce_add(tensor_desc, coord, src, _semantic=None):
    """Add a box in shared memory to global memory. Triton 3.6 has this, but no name for it."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(
        ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle
    )


@aggregate
class Options:
    """What is compiled in, see _hopper_bwd_kernel."""

    HEAD_DIM: gl.constexpr
    BLOCK_D: gl.constexpr
    BLOCK_M: gl.constexpr
    ADD: gl.constexpr
    DOCUMENTS: gl.constexpr
    Q_STAGES: gl.constexpr
    DOUT_STAGES: gl.constexpr
    DS_STAGES: gl.constexpr
    DQ_STAGES: gl.constexpr
    EARLY: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self,
        HEAD_DIM,
        BLOCK_D,
        BLOCK_M,
        ADD,
        DOCUMENTS,
        Q_STAGES,
        DOUT_STAGES,
        DS_STAGES,
        DQ_STAGES,
        EARLY,
    ):
        self.HEAD_DIM = gl.constexpr(HEAD_DIM)
        self.BLOCK_D = gl.constexpr(BLOCK_D)
        self.BLOCK_M = gl.constexpr(BLOCK_M)
        self.ADD = gl.constexpr(ADD)
        self.DOCUMENTS = gl.constexpr(DOCUMENTS)
        self.Q_STAGES = gl.constexpr(Q_STAGES)
        self.DOUT_STAGES = gl.constexpr(DOUT_STAGES)
        self.DS_STAGES = gl.constexpr(DS_STAGES)
        self.DQ_STAGES = gl.constexpr(DQ_STAGES)
        self.EARLY = gl.constexpr(EARLY)


@aggregate
class Program:
    """What the partitions share; `total` is how many blocks they go through."""

    walk: Walk
    batch: gl.tensor
    key_head: gl.tensor
    first_head: gl.tensor
    total: gl.tensor
    k: Slots
    v: Slots
    q: Slots
    statistics: gl.shared_memory_descriptor
    dout: Slots
    ds: gl.shared_memory_descriptor
    dq: Slots
    softmax_scale: gl.tensor
    options: Options

    @gluon.constexpr_function
    def __init__(self, walk, heads, total, k, v, q, statistics, dout, ds, dq, scale, options):
        self.walk = walk
        self.batch, self.key_head, self.first_head = heads
        self.total = total
        self.k = k
        self.v = v
        self.q = q
        self.statistics = statistics
        self.dout = dout
        self.ds = ds
        self.dq = dq
        self.softmax_scale = scale
        self.options = options


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
def _slots(
    N: gl.constexpr,
    READERS: gl.constexpr,
    desc,
    BLOCK: gl.constexpr,
    COLUMNS: gl.constexpr,
    DOCUMENTS: gl.constexpr,
    WRITERS: gl.constexpr = 1,
):
    """Return slots for boxes of BLOCK rows, see make_slots."""
    if DOCUMENTS:
        return make_slots(N, READERS, desc, [1, 1, BLOCK, 1, COLUMNS], WRITERS)
    else:
        return make_slots(N, READERS, desc, [1, 1, BLOCK, COLUMNS], WRITERS)


@gluon.jit
def _load_keys(program, desc, slots):
    """Load the tile's rows of K or of V."""
    walk = program.walk
    for c in gl.static_range(CONSUMERS):
        row = walk.row + c * ROWS
        place = box_at(
            program.batch, program.key_head, row, walk.row_end, 0, program.options.DOCUMENTS
        )
        load(desc, place, slots, c, 0)


@gluon.jit
def _produce(program, statistics, q, k, v, dout):
    """Load K and V, and of every block Q, lse, delta and dout, in the order the consumers walk."""
    walk = program.walk
    BLOCK_M: gl.constexpr = program.options.BLOCK_M
    Q_STAGES: gl.constexpr = program.options.Q_STAGES
    DOUT_STAGES: gl.constexpr = program.options.DOUT_STAGES
    DOCUMENTS: gl.constexpr = program.options.DOCUMENTS
    layout: gl.constexpr = gl.BlockedLayout([BLOCK_M // 32], [32], [1], [0])
    if program.total > 0:
        _load_keys(program, k, program.k)
    place = begin_walk(walk, program.first_head, BLOCK_M)
    for t in range(program.total):
        head, end, row = place[0], place[3][1], query_row(place, BLOCK_M)
        # Asked for before the wait for a slot, which hides how long they take.
        rows = row + gl.arange(0, BLOCK_M, layout)
        lse2, delta = statistics.load(program.batch, head, rows, end)
        slot = t % Q_STAGES
        box = box_at(program.batch, head, row, end, 0, DOCUMENTS)
        load(q, box, program.q, slot, t // Q_STAGES)
        program.statistics.index(slot).store(lse2)
        if q.dtype != gl.float16:
            delta *= program.softmax_scale  # as ds, see backward_consumer.py
        program.statistics.index(Q_STAGES + slot).store(delta)
        mbarrier.arrive(program.q.full.index(slot), count=1)
        if t == 0:
            _load_keys(program, v, program.v)
        load(dout, box, program.dout, t % DOUT_STAGES, t // DOUT_STAGES)
        place = next_place(walk, place, BLOCK_M)


@gluon.jit
def _write(program, dq):
    """Add every block's dq to memory: what lies in the slots that the consumers fill."""
    walk = program.walk
    BLOCK_M: gl.constexpr = program.options.BLOCK_M
    DQ_STAGES: gl.constexpr = program.options.DQ_STAGES
    COLUMNS: gl.constexpr = program.options.BLOCK_D // CONSUMERS if BLOCK_M == 64 else 0
    DOWN: gl.constexpr = 0 if BLOCK_M == 64 else 64
    place = begin_walk(walk, program.first_head, BLOCK_M)
    for t in range(program.total):
        head, end, row = place[0], place[3][1], query_row(place, BLOCK_M)
        stage = t % DQ_STAGES
        for c in gl.static_range(CONSUMERS):
            slot = stage * CONSUMERS + c
            await_full(program.dq, slot, t // DQ_STAGES)
            box = box_at(
                program.batch, head, row + c * DOWN, end, c * COLUMNS, program.options.DOCUMENTS
            )
            tma_reduce_add(dq, box, program.dq.buffers.index(slot))
        if DQ_STAGES == 1:
            for c in gl.static_range(CONSUMERS):
                tma.store_wait(CONSUMERS - 1 - c)
                release(program.dq, c)
        else:
            # Those of the turn before have been read.
            tma.store_wait(CONSUMERS)
            if t > 0:
                for c in gl.static_range(CONSUMERS):
                    release(program.dq, (t - 1) % DQ_STAGES * CONSUMERS + c)
        place = next_place(walk, place, BLOCK_M)
    tma.store_wait(0)


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
        "rotate",
    ]
)
def _hopper_bwd_kernel(
    q,
    k,
    v,
    dout,
    dq,
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
    tiles_ptr,
    entries_ptr,
    n_tiles,
    n_heads,
    heads_in_flight,
    heads,
    group,
    rotate,
    softmax_scale,
    HEAD_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_M: gl.constexpr,
    ADD: gl.constexpr,
    DOCUMENTS: gl.constexpr,
    Q_STAGES: gl.constexpr,
    DOUT_STAGES: gl.constexpr,
    DS_STAGES: gl.constexpr,
    DQ_STAGES: gl.constexpr,
    EARLY: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    OTHER_REGISTERS: gl.constexpr,
):
    """dv = p^T dout, dk = softmax_scale ds^T q, dq += softmax_scale ds k.

    p = exp(softmax_scale q k^T - lse), ds = p (dout v^T - delta).
    Grid: n_tiles * B * Hk, one program a tile of up to 128 key rows and key head, summing over the
    head's `group` query heads, of CONSUMERS + 1 warpgroups.
    As in kernels/dkv.py: tables, lse, delta, dk, dv, their strides, heads, ADD: dk and dv are
    float32 and stored, or with ADD added, in the rows of the tiles.
    q, k, v, dout, dq: descriptors of [B, H, L, D] with box [1, 1, rows, BLOCK_D]; rows are 64 for
    k and v, BLOCK_M for q and dout. dq is float32 and added to, box [1, 1, 64, columns] with
    BLOCK_D / 2 columns where BLOCK_M is 64, else BLOCK_D. With DOCUMENTS all are the cut
    descriptors of backends/descriptors.py: no row past an entry is read or added to.
    rotate: 1 starts every tile at another block of an entry, 0 all at the first: tiles that meet
    the same queries would add to the same dq at the same time.
    EARLY: dv's product is issued before dp is waited for.
    """
    row, row_end, first_entry, end_entry, _, head = load_work(
        Tables(tiles_ptr, entries_ptr, n_tiles, n_heads, heads_in_flight, heads, group),
        gl.program_id(0),
    )
    shift = row // (CONSUMERS * ROWS) % n_tiles * rotate
    walk = Walk(entries_ptr, row, row_end, first_entry, end_entry, shift, n_tiles)
    key_head = head % heads
    COLUMNS: gl.constexpr = BLOCK_D // CONSUMERS if BLOCK_M == 64 else BLOCK_D
    k_slots = _slots(CONSUMERS, 1, k, ROWS, BLOCK_D, DOCUMENTS)
    v_slots = _slots(CONSUMERS, 1, v, ROWS, BLOCK_D, DOCUMENTS)
    q_slots = _slots(Q_STAGES, CONSUMERS, q, BLOCK_M, BLOCK_D, DOCUMENTS, 2)
    dout_slots = _slots(DOUT_STAGES, CONSUMERS, dout, BLOCK_M, BLOCK_D, DOCUMENTS)
    dq_slots = _slots(DQ_STAGES * CONSUMERS, 1, dq, 64, COLUMNS, DOCUMENTS)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    statistics = gl.allocate_shared_memory(gl.float32, [2 * Q_STAGES, BLOCK_M], flat)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_M], q.dtype)
    ds = gl.allocate_shared_memory(q.dtype, [DS_STAGES * CONSUMERS, ROWS, BLOCK_M], ds_layout)
    fence_async_shared()
    options = Options(
        HEAD_DIM,
        BLOCK_D,
        BLOCK_M,
        ADD,
        DOCUMENTS,
        Q_STAGES,
        DOUT_STAGES,
        DS_STAGES,
        DQ_STAGES,
        EARLY,
    )
    program = Program(
        walk,
        (head // heads, key_head, key_head * group),
        count_blocks(walk, BLOCK_M) * group,
        k_slots,
        v_slots,
        q_slots,
        statistics,
        dout_slots,
        ds,
        dq_slots,
        softmax_scale,
        options,
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
            (consume, (program, dk_ptr, dv_ptr, dk_strides, dv_strides, 0)),
            (consume, (program, dk_ptr, dv_ptr, dk_strides, dv_strides, 1)),
            (_produce, (program, rows, q, k, v, dout)),
            (_write, (program, dq)),
        ],
        [4, 1, 1],
        [CONSUMER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS],
    )
