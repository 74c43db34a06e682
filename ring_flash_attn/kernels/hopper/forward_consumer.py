"""What a consumer warpgroup of the Hopper forward does: scores, softmax, products, tile by tile."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .epilogue import load_lse2, store_tile
from .forward_program import FIELDS, ROWS
from .operands import left_operand, multiply_rows
from .slots import await_full, meet
from .tiles import block_start, load_band, skipped, unseen_blocks

# The first named barrier of the consumers' turns. The compiler takes its own from 0 up.
FIRST_TURN = gl.constexpr(8)


@gluon.jit
def _field(items, slot, FIELD: gl.constexpr):
    place = items.buffers.index(slot * FIELDS + FIELD)
    return gl.sum(place.load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def _published(items, tile):
    """Return work and band of this program's tile-th tile, once the producer knows them.

    Through shared memory: each consumer reading the tables would wait twice for global memory, with
    nothing else to do.
    """
    slot = tile & 1
    await_full(items, slot, tile >> 1)
    exists, row, row_end = _field(items, slot, 0), _field(items, slot, 1), _field(items, slot, 2)
    entry, end_entry = _field(items, slot, 3), _field(items, slot, 4)
    finishes, head = _field(items, slot, 5), _field(items, slot, 6)
    first, last, end = _field(items, slot, 7), _field(items, slot, 8), _field(items, slot, 9)
    lo, hi = _field(items, slot, 10), _field(items, slot, 11)
    n_left, n_full = _field(items, slot, 12), _field(items, slot, 13)
    n_edge = _field(items, slot, 14)
    items.release(slot)
    work = (exists, row, row_end, entry, end_entry, finishes, head)
    return work, (first, last, end, lo, hi, n_left, n_full, n_edge)


@gluon.jit
def _give_turn(BARRIER: gl.constexpr):
    x = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    asm: gl.constexpr = f"bar.arrive {BARRIER}, 256;\n mov.b32 $0, $1;"
    gl.inline_asm_elementwise(asm, "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _count_below(x):
    """Return how many of the columns 0, 1, 8, 9, 16, 17, .. up to 121 lie below x."""
    return gl.minimum(gl.maximum((x >> 3) * 2 + gl.minimum(x & 7, 2), 0), 32)


@gluon.jit
def _lowest(n):
    """Return an int32 with the n lowest bits set, for n from 0 to 32.

    In two shifts: one by 32 is undefined, and LLVM copies a select into each test of a bit.
    """
    half = n >> 1
    return ((1 << half) << (n - half)) - 1


@gluon.jit
def _seen(s, start, left, right):
    """Return which scores s of columns [start, ..) each row sees: those in [left, right).

    In a wgmma's result a thread holds two columns in every eight of a row, 2 q and 2 q + 1. One
    int32 has a bit for each, found once a row. Compared one by one, ptxas computes all predicates
    before the scores are there, and packs and unpacks them: 881 instructions a block, not 449.
    """
    N: gl.constexpr = s.shape[1]
    offs_n = gl.arange(0, N, gl.SliceLayout(0, s.type.layout))
    origin = start + (offs_n & 6)[None, :]
    below = _lowest(_count_below(right[:, None] - origin))
    bits = below & ~_lowest(_count_below(left[:, None] - origin))
    place = (offs_n >> 3) * 2 + (offs_n & 1)
    return (bits >> place[None, :]) & 1 != 0


@gluon.jit
def _softmax(s, m_i, l_i, qk_scale, start, left, right, MASK: gl.constexpr):
    """Return (p, alpha, m_i, l_i) after scores s [ROWS, BLOCK_N].

    l_i [ROWS, 8] is the row sum in parts that lie in one thread each: no shuffles in the loop.
    MASK: only columns [left, right) are seen.
    """
    N: gl.constexpr = s.shape[1]
    if MASK:
        s = gl.where(_seen(s, start, left, right), s, float("-inf"))
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
def _issue_scores(program, count, q_left, CONSUMER: gl.constexpr):
    """Issue q k^T [ROWS, BLOCK_N] with the K of the count-th block; wait before reading it."""
    BLOCK_N: gl.constexpr = program.options.BLOCK_N
    BLOCK_D: gl.constexpr = program.options.BLOCK_D
    # Always 0, but ptxas does not know: else it keeps the descriptors in registers.
    zero = count >> 30
    q_tile = program.q.buffers.index(CONSUMER + zero).reshape([ROWS, BLOCK_D])
    k_tile = program.k.buffers.index(count % program.k.STAGES).reshape([BLOCK_N, BLOCK_D])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    return multiply_rows(q_left, q_tile, k_tile, layout, program.options.Q_COLUMNS)


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
    q_left,
    state,
    qk_scale,
    start,
    left,
    right,
    MASK: gl.constexpr,
    CONSUMER: gl.constexpr,
):
    """Take block `count`: its scores, beside them the product of the block before, its softmax.

    `state` is (acc, packed, m_i, l_i, alpha): the product of all blocks but the one before, whose
    p is packed, and whose alpha is due if RESCALE_LATE.
    """
    acc, packed, m_i, l_i, alpha = state
    K_STAGES: gl.constexpr = program.k.STAGES
    V_STAGES: gl.constexpr = program.v.STAGES
    PING_PONG: gl.constexpr = program.options.PING_PONG
    slot, previous = count % K_STAGES, (count - 1) % V_STAGES
    await_full(program.k, slot, count // K_STAGES)
    if PING_PONG:
        meet(FIRST_TURN + CONSUMER)
    s = _issue_scores(program, count, q_left, CONSUMER)
    if program.options.RESCALE_LATE:
        acc = _rescale(acc, alpha)
    await_full(program.v, previous, (count - 1) // V_STAGES)
    acc = _issue_product(program, previous, packed, acc)
    if PING_PONG:
        _give_turn(FIRST_TURN + (CONSUMER + 1) % program.options.CONSUMERS)
    s = warpgroup_mma_wait(1, [s])
    program.k.release(slot)
    p, alpha, m_i, l_i = _softmax(s, m_i, l_i, qk_scale, start, left, right, MASK)
    acc = warpgroup_mma_wait(0, [acc])
    program.v.release(previous)
    packed = _pack(p, program.v.buffers.dtype)
    if not program.options.RESCALE_LATE:
        acc = _rescale(acc, alpha)
    return acc, packed, m_i, l_i, alpha


@gluon.jit
def _limits(band, offs_m):
    """Return (left, right): each row sees columns [left, right) of a band's entry."""
    last, lo, hi = band[1], band[3], band[4]
    return offs_m + lo, gl.minimum(offs_m + hi + 1, last)


@gluon.jit
def _walk(program, count, begin, band, offs_m, q_left, state, qk_scale, CONSUMER: gl.constexpr):
    """Take an entry's blocks from the begin-th on, those with a mask first; return count, state."""
    left, right = _limits(band, offs_m)
    n_full, n_edge = band[6], band[7]
    for i in range(begin, n_edge):
        start = block_start(band, i, program.options.BLOCK_N)
        state = _step(program, count, q_left, state, qk_scale, start, left, right, True, CONSUMER)
        count += 1
    for _ in range(gl.maximum(begin, n_edge), n_edge + n_full):
        state = _step(program, count, q_left, state, qk_scale, 0, left, right, False, CONSUMER)
        count += 1
    return count, state


@gluon.jit
def _pass_over(program, count, n, CONSUMER: gl.constexpr):
    """Leave n blocks to the others, with the turns that go with them; return the count after."""
    K_STAGES: gl.constexpr = program.k.STAGES
    V_STAGES: gl.constexpr = program.v.STAGES
    for _ in range(n):
        # Seen full first: else a slot could be released before its last filling was.
        await_full(program.k, count % K_STAGES, count // K_STAGES)
        program.k.release(count % K_STAGES)
        if program.options.PING_PONG:
            meet(FIRST_TURN + CONSUMER)
            _give_turn(FIRST_TURN + (CONSUMER + 1) % program.options.CONSUMERS)
        await_full(program.v, count % V_STAGES, count // V_STAGES)
        program.v.release(count % V_STAGES)
        count += 1
    return count


@gluon.jit
def consume(program, outputs, qk_scale, CONSUMER: gl.constexpr):
    """Attend rows [CONSUMER * ROWS, (CONSUMER + 1) * ROWS) of every tile of this program."""
    tables = program.tables
    BLOCK_N: gl.constexpr = program.options.BLOCK_N
    BLOCK_D: gl.constexpr = program.options.BLOCK_D
    K_STAGES: gl.constexpr = program.k.STAGES
    V_STAGES: gl.constexpr = program.v.STAGES
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    if program.options.PING_PONG and CONSUMER == program.options.CONSUMERS - 1:
        _give_turn(FIRST_TURN)
    count = 0  # of blocks
    tile = 0
    work, band = _published(program.items, tile)
    while work[0] > 0:
        _, row, row_end, entry, end_entry, finishes, head = work
        offs_m = row + CONSUMER * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
        # The first block has no product before it.
        left, right = _limits(band, offs_m)
        begin = unseen_blocks(band, row + CONSUMER * ROWS, row_end, ROWS, BLOCK_N)
        count = _pass_over(program, count, begin, CONSUMER)
        start = block_start(band, begin, BLOCK_N)
        await_full(program.q, CONSUMER, tile)
        # As in _issue_scores, 0: else ptxas finds the addresses once, and spills them.
        q_tile = program.q.buffers.index(CONSUMER + (tile >> 30)).reshape([ROWS, BLOCK_D])
        q_left = left_operand(q_tile, s_layout, program.options.Q_COLUMNS)
        if program.options.Q_COLUMNS == BLOCK_D:
            program.q.release(CONSUMER)
        await_full(program.k, count % K_STAGES, count // K_STAGES)
        s = warpgroup_mma_wait(0, [_issue_scores(program, count, q_left, CONSUMER)])
        program.k.release(count % K_STAGES)
        m_i = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
        zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
        l_i = gl.sum(gl.reshape(zeros, [ROWS, BLOCK_N // 8, 8]), 1)
        p, alpha, m_i, l_i = _softmax(s, m_i, l_i, qk_scale, start, left, right, True)
        acc = gl.zeros([ROWS, BLOCK_D], gl.float32, o_layout)
        state = (acc, _pack(p, program.v.buffers.dtype), m_i, l_i, alpha)
        count += 1
        if program.options.ONE_ENTRY:
            count, state = _walk(
                program, count, begin + 1, band, offs_m, q_left, state, qk_scale, CONSUMER
            )
        else:
            for e in range(entry, end_entry):
                band = load_band(tables, e, end_entry, row, row_end, BLOCK_N)
                taken = skipped(e, entry) * (begin + 1)
                count, state = _walk(
                    program, count, taken, band, offs_m, q_left, state, qk_scale, CONSUMER
                )
        if program.options.Q_COLUMNS < BLOCK_D:
            program.q.release(CONSUMER)
        acc, packed, m_i, l_i, alpha = state
        target = (outputs, head // tables.heads, head % tables.heads, row, row_end, finishes)
        # Before the last product, which runs while it arrives.
        old_lse2 = load_lse2(m_i, target, CONSUMER, program.options.CARRY)
        # The last block's product.
        if program.options.RESCALE_LATE:
            acc = _rescale(acc, alpha)
        last = (count - 1) % V_STAGES
        await_full(program.v, last, (count - 1) // V_STAGES)
        acc = _issue_product(program, last, packed, acc)
        acc = warpgroup_mma_wait(0, [acc])
        program.v.release(last)
        count = store_tile(acc, m_i, l_i, old_lse2, target, program, count, CONSUMER)
        tile += 1
        work, band = _published(program.items, tile)
    if program.options.PING_PONG and CONSUMER == 0:
        meet(FIRST_TURN)  # what the last consumer has given
