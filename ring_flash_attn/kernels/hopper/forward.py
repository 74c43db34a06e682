"""The forward for Hopper (sm_90) in Gluon: one source's K, V folded into (out, lse).

Computes what kernels/forward.py computes, from the same tables, in the way of FlashAttention-3
(Shah et al. 2024, section 3): one warp, the producer, loads tiles by TMA while two or three
warpgroups, the consumers, of 64 query rows each multiply. A consumer issues the scores of block
i + 1 before the product of block i, and does the softmax of i + 1 while that runs. Programs are
persistent: the producer draws tiles from a counter and hands their numbers to the consumers.

    ring of slots   slots          filled by   what
    items           2              producer    number of a work item; the last one is past all
    q               CONSUMERS      TMA         64 rows of Q for each consumer
    k, v            STAGES each    TMA         BLOCK_N rows of K or V for all consumers
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

from .epilogue import LOG2_E, Outputs, store_tile
from .slots import (
    FAR,
    Slots,
    await_empty,
    await_full,
    load,
    make_bars,
    make_slots,
    meet,
    release,
)
from .tiles import (
    Tables,
    block_start,
    draw,
    leave,
    load_band,
    load_work,
    next_work,
    skipped,
)

ROWS = gl.constexpr(64)  # query rows of a consumer: what one warpgroup's wgmma multiplies
# The first named barrier of the consumers' turns. The compiler takes its own from 0 up.
FIRST_TURN = gl.constexpr(8)


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
def _load_v(program, v, count, batch, key_head, start, end):
    """Load V from row `start` on for the count-th block. DOCUMENTS: zeros from row `end` on."""
    STAGES: gl.constexpr = program.options.STAGES
    if program.options.DOCUMENTS:
        coordinates = [FAR, end, FAR - end + start, key_head, 0]
        load(v, coordinates, program.v, count % STAGES, count // STAGES)
    else:
        load(v, [batch, key_head, start, 0], program.v, count % STAGES, count // STAGES)


@gluon.jit
def _load_blocks(program, k, v, count, begin, band, batch, key_head):
    """Load K and V of an entry's blocks from the begin-th on; return the count after them."""
    STAGES: gl.constexpr = program.options.STAGES
    end, n_full, n_edge = band[2], band[6], band[7]
    for i in range(begin, n_edge + n_full):
        start = block_start(band, i, program.options.BLOCK_N)
        load(k, [batch, key_head, start, 0], program.k, count % STAGES, count // STAGES)
        _load_v(program, v, count, batch, key_head, start, end)
        count += 1
    return count


@gluon.jit
def _publish(items, index, tile):
    """Tell the consumers the work item of this program's tile-th tile."""
    slot = tile & 1
    await_empty(items, slot, tile >> 1)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    items.buffers.index(slot).store(gl.full([1], index, gl.int32, layout))
    mbarrier.arrive(items.full.index(slot), count=1)


@gluon.jit
def _published(items, tile):
    """Return the work item of this program's tile-th tile, once the producer knows it."""
    slot = tile & 1
    await_full(items, slot, tile >> 1)
    index = gl.sum(items.buffers.index(slot).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
    release(items, slot)
    return index


@gluon.jit
def _produce(program, q, k, v, counter_ptr):
    """Load, tile by tile, Q and then K and V of every block, in the order the consumers walk."""
    tables = program.tables
    BLOCK_N: gl.constexpr = program.options.BLOCK_N
    STAGES: gl.constexpr = program.options.STAGES
    count = 0  # of blocks
    tile = 0
    index = next_work(tables, gl.program_id(0), counter_ptr)
    _publish(program.items, index, tile)
    while index < tables.n_items():
        row, row_end, entry, end_entry, _, head = load_work(tables, index)
        batch, head = head // tables.heads, head % tables.heads
        key_head = head // tables.group
        # The first block, which a tile that meets nothing has too, with nothing seen in it.
        band = load_band(tables, entry, end_entry, row, row_end, BLOCK_N)
        start = block_start(band, 0, BLOCK_N)
        load(k, [batch, key_head, start, 0], program.k, count % STAGES, count // STAGES)
        for c in gl.static_range(program.options.CONSUMERS):
            load(q, [batch, head, row + c * ROWS, 0], program.q, c, tile)
        _load_v(program, v, count, batch, key_head, start, band[2])
        count += 1
        # Drawn now, so that the consumers know it when they finish this tile.
        index = next_work(tables, draw(counter_ptr), counter_ptr)
        tile += 1
        _publish(program.items, index, tile)
        if program.options.ONE_ENTRY:
            count = _load_blocks(program, k, v, count, 1, band, batch, key_head)
        else:
            for e in range(entry, end_entry):
                band = load_band(tables, e, end_entry, row, row_end, BLOCK_N)
                begin = skipped(e, entry)
                count = _load_blocks(program, k, v, count, begin, band, batch, key_head)
    leave(counter_ptr)


@gluon.jit
def _give_turn(BARRIER: gl.constexpr):
    x = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    asm: gl.constexpr = f"bar.arrive {BARRIER}, 256;\n mov.b32 $0, $1;"
    gl.inline_asm_elementwise(asm, "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _softmax(s, m_i, l_i, qk_scale, start, left, width, MASK: gl.constexpr):
    """Return (p, alpha, m_i, l_i) after scores s [ROWS, BLOCK_N].

    l_i [ROWS, 8] is the row sum in parts that lie in one thread each: no shuffles in the loop.
    MASK: column c is seen iff 0 <= c - left < width, one unsigned compare.
    """
    N: gl.constexpr = s.shape[1]
    if MASK:
        offs_n = start + gl.arange(0, N, gl.SliceLayout(0, s.type.layout))
        distance = offs_n[None, :] - left[:, None]
        s = gl.where(distance.to(gl.uint32) < width[:, None].to(gl.uint32), s, float("-inf"))
    m_new = gl.maximum(m_i, gl.max(s, 1) * qk_scale)
    shift = m_new
    if MASK:
        # A row that has seen nothing yet must compute -inf - 0, not -inf - -inf.
        shift = gl.where(m_new == float("-inf"), 0.0, m_new)
    p = gl.exp2(s * qk_scale - shift[:, None])
    alpha = gl.exp2(m_i - shift)
    parts = gl.sum(gl.reshape(p, [ROWS, N // 8, 8]), 1)
    scale = gl.convert_layout(alpha, gl.SliceLayout(1, parts.type.layout))
    return p, alpha, m_new, l_i * scale[:, None] + parts


@gluon.jit
def _pack(p, dtype: gl.constexpr):
    """Return float32 p rounded to `dtype`, two numbers an int32.

    Carried round the loop as the operand of a product, it would cost 64 PRMT a block (ptxas 12.8).
    """
    low, high = gl.split(gl.reshape(p, [p.shape[0], p.shape[1] // 2, 2]))
    kind: gl.constexpr = "bf16x2" if dtype == gl.bfloat16 else "f16x2"
    asm: gl.constexpr = f"cvt.rn.{kind}.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(
        asm, "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _unpack(packed, layout: gl.constexpr, dtype: gl.constexpr):
    """Return the numbers of _pack as an operand."""
    low = packed.to(gl.int16).to(dtype, bitcast=True)
    high = (packed >> 16).to(gl.int16).to(dtype, bitcast=True)
    pairs = gl.join(low, high)
    return gl.convert_layout(gl.reshape(pairs, [packed.shape[0], packed.shape[1] * 2]), layout)


@gluon.jit
def _issue_scores(program, slot, CONSUMER: gl.constexpr):
    """Issue q k^T [ROWS, BLOCK_N] with the K of a slot; wait before reading it."""
    BLOCK_N: gl.constexpr = program.options.BLOCK_N
    BLOCK_D: gl.constexpr = program.options.BLOCK_D
    q_tile = program.q.buffers.index(CONSUMER).reshape([ROWS, BLOCK_D])
    k_tile = program.k.buffers.index(slot).reshape([BLOCK_N, BLOCK_D]).permute((1, 0))
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
    return warpgroup_mma(q_tile, k_tile, zeros, use_acc=False, is_async=True)


@gluon.jit
def _issue_product(program, slot, packed, acc):
    """Issue acc + p v with the V of a slot; wait before reading it."""
    BLOCK_N: gl.constexpr = program.options.BLOCK_N
    BLOCK_D: gl.constexpr = program.options.BLOCK_D
    v_tile = program.v.buffers.index(slot).reshape([BLOCK_N, BLOCK_D])
    layout: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    p = _unpack(packed, layout, program.v.buffers.dtype)
    return warpgroup_mma(p, v_tile, acc, is_async=True)


@gluon.jit
def _rescale(acc, alpha):
    return acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]


@gluon.jit
def _step(
    program,
    count,
    state,
    qk_scale,
    start,
    left,
    width,
    MASK: gl.constexpr,
    CONSUMER: gl.constexpr,
):
    """Take block `count`: its scores, beside them the product of the block before, its softmax.

    `state` is (acc, packed, m_i, l_i, alpha): the product of all blocks but the one before, whose
    p is packed, and whose alpha is due if RESCALE_LATE.
    """
    acc, packed, m_i, l_i, alpha = state
    STAGES: gl.constexpr = program.options.STAGES
    PING_PONG: gl.constexpr = program.options.PING_PONG
    slot, previous = count % STAGES, (count - 1) % STAGES
    await_full(program.k, slot, count // STAGES)
    if PING_PONG:
        meet(FIRST_TURN + CONSUMER)
    s = _issue_scores(program, slot, CONSUMER)
    if program.options.RESCALE_LATE:
        acc = _rescale(acc, alpha)
    await_full(program.v, previous, (count - 1) // STAGES)
    acc = _issue_product(program, previous, packed, acc)
    if PING_PONG:
        _give_turn(FIRST_TURN + (CONSUMER + 1) % program.options.CONSUMERS)
    s = warpgroup_mma_wait(1, [s])
    release(program.k, slot)
    p, alpha, m_i, l_i = _softmax(s, m_i, l_i, qk_scale, start, left, width, MASK)
    acc = warpgroup_mma_wait(0, [acc])
    release(program.v, previous)
    packed = _pack(p, program.v.buffers.dtype)
    if not program.options.RESCALE_LATE:
        acc = _rescale(acc, alpha)
    return acc, packed, m_i, l_i, alpha


@gluon.jit
def _limits(band, offs_m):
    """Return (left, width) of the columns that each row sees, see _softmax."""
    last, lo, hi = band[1], band[3], band[4]
    left = offs_m + lo
    return left, gl.maximum(gl.minimum(offs_m + hi + 1, last) - left, 0)


@gluon.jit
def _walk(program, count, begin, band, offs_m, state, qk_scale, CONSUMER: gl.constexpr):
    """Take an entry's blocks from the begin-th on, those with a mask first; return count, state."""
    left, width = _limits(band, offs_m)
    n_full, n_edge = band[6], band[7]
    for i in range(begin, n_edge):
        start = block_start(band, i, program.options.BLOCK_N)
        state = _step(program, count, state, qk_scale, start, left, width, True, CONSUMER)
        count += 1
    for _ in range(gl.maximum(begin, n_edge), n_edge + n_full):
        state = _step(program, count, state, qk_scale, 0, left, width, False, CONSUMER)
        count += 1
    return count, state


@gluon.jit
def _consume(program, outputs, qk_scale, CONSUMER: gl.constexpr):
    """Attend rows [CONSUMER * ROWS, (CONSUMER + 1) * ROWS) of every tile of this program."""
    tables = program.tables
    BLOCK_N: gl.constexpr = program.options.BLOCK_N
    BLOCK_D: gl.constexpr = program.options.BLOCK_D
    STAGES: gl.constexpr = program.options.STAGES
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    if program.options.PING_PONG and CONSUMER == program.options.CONSUMERS - 1:
        _give_turn(FIRST_TURN)
    count = 0  # of blocks
    tile = 0
    index = _published(program.items, tile)
    while index < tables.n_items():
        row, row_end, entry, end_entry, finishes, head = load_work(tables, index)
        offs_m = row + CONSUMER * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
        band = load_band(tables, entry, end_entry, row, row_end, BLOCK_N)
        # The first block has no product before it.
        left, width = _limits(band, offs_m)
        start = block_start(band, 0, BLOCK_N)
        await_full(program.q, CONSUMER, tile)
        await_full(program.k, count % STAGES, count // STAGES)
        s = warpgroup_mma_wait(0, [_issue_scores(program, count % STAGES, CONSUMER)])
        release(program.k, count % STAGES)
        m_i = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
        zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
        l_i = gl.sum(gl.reshape(zeros, [ROWS, BLOCK_N // 8, 8]), 1)
        p, alpha, m_i, l_i = _softmax(s, m_i, l_i, qk_scale, start, left, width, True)
        acc = gl.zeros([ROWS, BLOCK_D], gl.float32, o_layout)
        state = (acc, _pack(p, program.v.buffers.dtype), m_i, l_i, alpha)
        count += 1
        if program.options.ONE_ENTRY:
            count, state = _walk(program, count, 1, band, offs_m, state, qk_scale, CONSUMER)
        else:
            for e in range(entry, end_entry):
                band = load_band(tables, e, end_entry, row, row_end, BLOCK_N)
                begin = skipped(e, entry)
                count, state = _walk(program, count, begin, band, offs_m, state, qk_scale, CONSUMER)
        release(program.q, CONSUMER)
        acc, packed, m_i, l_i, alpha = state
        # The last block's product.
        if program.options.RESCALE_LATE:
            acc = _rescale(acc, alpha)
        await_full(program.v, (count - 1) % STAGES, (count - 1) // STAGES)
        acc = _issue_product(program, (count - 1) % STAGES, packed, acc)
        acc = warpgroup_mma_wait(0, [acc])
        release(program.v, (count - 1) % STAGES)
        store_tile(
            acc,
            m_i,
            l_i,
            outputs,
            head // tables.heads,
            head % tables.heads,
            row + CONSUMER * ROWS,
            row_end,
            finishes,
            program.options.HEAD_DIM,
            program.options.CARRY,
        )
        tile += 1
        index = _published(program.items, tile)
    if program.options.PING_PONG and CONSUMER == 0:
        meet(FIRST_TURN)  # what the last consumer has given


@gluon.jit(
    do_not_specialize=[
        "lse_stride_batch",
        "lse_stride_head",
        "n_tiles",
        "n_heads",
        "heads_in_flight",
        "heads",
        "group",
    ]
)
def _hopper_fwd_kernel(
    q,
    k,
    v,
    out_ptr,
    result_ptr,
    lse_ptr,
    out_strides,
    lse_stride_batch,
    lse_stride_head,
    tiles_ptr,
    entries_ptr,
    counter_ptr,
    n_tiles,
    n_heads,
    heads_in_flight,
    heads,
    group,
    softmax_scale,
    HEAD_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    CARRY: gl.constexpr,
    DOCUMENTS: gl.constexpr,
    ONE_ENTRY: gl.constexpr,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    PING_PONG: gl.constexpr,
    RESCALE_LATE: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """out = softmax(softmax_scale q k^T + band) v, lse = log sum exp(softmax_scale q k^T + band).

    Grid: any number of programs up to n_tiles * B * H, of CONSUMERS + 1 warpgroups each.
    As in kernels/forward.py: tables (with tiles of CONSUMERS * 64 rows), out, result, lse, their
    strides, heads, CARRY. Writes out or result [B, L, H, D] and lse [B, H, L].
    q, k, v: descriptors of [B, H, L, D] with box [1, 1, rows, BLOCK_D]; rows are 64 for q, BLOCK_N
    for k and v. With DOCUMENTS v is the cut descriptor of backends/hopper.py, and no row past an
    entry reaches a product.
    counter: [2] int32, zero before and after. One launch at a time may use it.
    ONE_ENTRY: no tile has more. PING_PONG: consumers issue products in turn. RESCALE_LATE: an
    accumulator is rescaled after the next scores are issued, not at the end of a step.
    """
    q_slots = make_slots(CONSUMERS, 1, q, [1, 1, ROWS, BLOCK_D])
    k_slots = make_slots(STAGES, CONSUMERS, k, [1, 1, BLOCK_N, BLOCK_D])
    if DOCUMENTS:
        v_slots = make_slots(STAGES, CONSUMERS, v, [1, 1, BLOCK_N, 1, BLOCK_D])
    else:
        v_slots = make_slots(STAGES, CONSUMERS, v, [1, 1, BLOCK_N, BLOCK_D])
    numbers = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full, empty = make_bars(2, CONSUMERS)
    fence_async_shared()
    options = Options(
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
    )
    tables = Tables(tiles_ptr, entries_ptr, n_tiles, n_heads, heads_in_flight, heads, group)
    items = Slots(numbers, full, empty)
    program = Program(tables, items, q_slots, k_slots, v_slots, options)
    outputs = Outputs(out_ptr, result_ptr, lse_ptr, out_strides, lse_stride_batch, lse_stride_head)
    qk_scale = softmax_scale * LOG2_E
    # A constant must be spelled inside the call: in a tuple with a name it becomes a tensor.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (program, outputs, qk_scale, 0)),
                (_consume, (program, outputs, qk_scale, 1)),
                (_produce, (program, q, k, v, counter_ptr)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (program, outputs, qk_scale, 0)),
                (_consume, (program, outputs, qk_scale, 1)),
                (_consume, (program, outputs, qk_scale, 2)),
                (_produce, (program, q, k, v, counter_ptr)),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
