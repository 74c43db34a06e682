"""The forward for Hopper (sm_90) in Gluon: one source's K, V folded into (out, lse).

Computes what kernels/forward.py computes, from the same tables, in the way of FlashAttention-3
(Shah et al. 2024, section 3): one warp, the producer, loads tiles by TMA while two or three
warpgroups, the consumers, of 64 query rows each multiply. A consumer issues the scores of block
i + 1 before the product of block i, and does the softmax of i + 1 while that runs. Programs are
persistent: the producer draws tiles from a counter and hands their numbers to the consumers.

    ring of slots   slots          filled by   what
    items           2              producer    what a work item is; the last one does not exist
    q               CONSUMERS      TMA         64 rows of Q for each consumer
    k, v            K_, V_STAGES   TMA         BLOCK_N rows of K or V for all consumers
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .epilogue import LOG2_E, Outputs
from .forward_consumer import consume
from .forward_program import (
    FIELDS,
    ROWS,
    WORK_FIELDS,
    Options,
    Program,
    piece_at,
    state_columns,
    state_piece,
    state_pieces,
    state_turns,
)
from .slots import FAR, Slots, box_shape, load, make_bars, make_blocks, make_slots
from .tiles import Tables, block_start, draw, leave, load_band, next_work, skipped

# The first named barrier that says a slot of K is empty; those of V follow.
FIRST_EMPTY = gl.constexpr(11)


@gluon.jit
def _load_v(program, v, count, batch, key_head, start, end):
    """Load V from row `start` on for the count-th block. DOCUMENTS: zeros from row `end` on."""
    STAGES: gl.constexpr = program.v.STAGES
    if program.options.DOCUMENTS:
        coordinates = [FAR, end, FAR - end + start, key_head, 0]
        load(v, coordinates, program.v, count % STAGES, count // STAGES)
    else:
        load(v, [batch, key_head, start, 0], program.v, count % STAGES, count // STAGES)


@gluon.jit
def _load_blocks(program, k, v, count, begin, band, batch, key_head):
    """Load K and V of an entry's blocks from the begin-th on; return the count after them."""
    STAGES: gl.constexpr = program.k.STAGES
    end, n_full, n_edge = band[2], band[6], band[7]
    for i in range(begin, n_edge + n_full):
        start = block_start(band, i, program.options.BLOCK_N)
        load(k, [batch, key_head, start, 0], program.k, count % STAGES, count // STAGES)
        _load_v(program, v, count, batch, key_head, start, end)
        count += 1
    return count


@gluon.jit
def _load_state(program, state, count, batch, head, row):
    """Load a tile's old state into the next slots of K and V; return the count after them."""
    BLOCK_N: gl.constexpr = program.options.BLOCK_N
    CONSUMERS: gl.constexpr = program.options.CONSUMERS
    for i in gl.static_range(state_turns(CONSUMERS, BLOCK_N)):
        place = (batch, head, row, count)
        _load_piece(program, state, program.k, place, piece_at(i, 0, CONSUMERS, BLOCK_N))
        _load_piece(program, state, program.v, place, piece_at(i, 1, CONSUMERS, BLOCK_N))
        count += 1
    return count


@gluon.jit
def _load_piece(program, state, slots, place, PIECE: gl.constexpr):
    """Load a piece of the old state into the slot of the count-th block."""
    BLOCK_N: gl.constexpr = program.options.BLOCK_N
    STAGES: gl.constexpr = slots.STAGES
    PIECES: gl.constexpr = state_pieces(BLOCK_N)
    COLUMNS: gl.constexpr = state_columns(program.options.BLOCK_D, BLOCK_N)
    batch, head, row, count = place
    slot = count % STAGES
    slots.await_empty(slot, count // STAGES)
    mbarrier.expect(slots.full.index(slot), state.block_type.nbytes)
    tma.async_copy_global_to_shared(
        state,
        [batch, head, row + PIECE // PIECES * ROWS, PIECE % PIECES * COLUMNS],
        slots.full.index(slot),
        state_piece(slots, slot, COLUMNS),
    )


@gluon.jit
def _publish(items, tile, work, band):
    """Tell the consumers this program's tile-th tile: what next_work returned."""
    slot = tile & 1
    items.await_empty(slot, tile >> 1)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    for i in gl.static_range(WORK_FIELDS):
        place = items.buffers.index(slot * FIELDS + i)
        place.store(gl.full([1], work[i], gl.int32, layout))
    for i in gl.static_range(FIELDS - WORK_FIELDS):
        place = items.buffers.index(slot * FIELDS + WORK_FIELDS + i)
        place.store(gl.full([1], band[i], gl.int32, layout))
    mbarrier.arrive(items.full.index(slot), count=1)


@gluon.jit
def _produce(program, q, k, v, state, counter_ptr):
    """Load, tile by tile, Q and then K and V of every block, in the order the consumers walk."""
    tables = program.tables
    BLOCK_N: gl.constexpr = program.options.BLOCK_N
    STAGES: gl.constexpr = program.k.STAGES
    count = 0  # of blocks
    tile = 0
    work, band = next_work(tables, gl.program_id(0), counter_ptr, BLOCK_N)
    _publish(program.items, tile, work, band)
    while work[0] > 0:
        _, row, row_end, entry, end_entry, _, head = work
        batch, head = head // tables.heads, head % tables.heads
        key_head = head // tables.group
        # The first block, which a tile that meets nothing has too, with nothing seen in it.
        start = block_start(band, 0, BLOCK_N)
        load(k, [batch, key_head, start, 0], program.k, count % STAGES, count // STAGES)
        for c in gl.static_range(program.options.CONSUMERS):
            load(q, [batch, head, row + c * ROWS, 0], program.q, c, tile)
        _load_v(program, v, count, batch, key_head, start, band[2])
        count += 1
        # Drawn now, so that the consumers know it when they finish this tile.
        work, next_band = next_work(tables, draw(counter_ptr), counter_ptr, BLOCK_N)
        tile += 1
        _publish(program.items, tile, work, next_band)
        if program.options.ONE_ENTRY:
            count = _load_blocks(program, k, v, count, 1, band, batch, key_head)
        else:
            for e in range(entry, end_entry):
                band = load_band(tables, e, end_entry, row, row_end, BLOCK_N)
                begin = skipped(e, entry)
                count = _load_blocks(program, k, v, count, begin, band, batch, key_head)
        if program.options.CARRY:
            count = _load_state(program, state, count, batch, head, row)
        band = next_band
    program.k.drain(count, STAGES)
    program.v.drain(count, program.v.STAGES)
    leave(counter_ptr)


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
    state,
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
    K_STAGES: gl.constexpr,
    V_STAGES: gl.constexpr,
    PING_PONG: gl.constexpr,
    RESCALE_LATE: gl.constexpr,
    Q_COLUMNS: gl.constexpr,
    SHUFFLES: gl.constexpr,
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
    accumulator is rescaled after the next scores are issued, not at the end of a step. Q_COLUMNS:
    of Q that consumers hold in registers. SHUFFLES: how 16-bit results get in order, see
    wide_layout in epilogue.py.
    """
    q_slots = make_slots(CONSUMERS, 1, q, [1, 1, ROWS, BLOCK_D])
    k_slots = make_blocks(K_STAGES, CONSUMERS, k, [1, 1, BLOCK_N, BLOCK_D], FIRST_EMPTY)
    v_box: gl.constexpr = box_shape(BLOCK_N, BLOCK_D, DOCUMENTS)
    v_slots = make_blocks(V_STAGES, CONSUMERS, v, v_box, FIRST_EMPTY + K_STAGES)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    numbers = gl.allocate_shared_memory(gl.int32, [2 * FIELDS, 1], flat)
    fence_async_shared()
    options = Options(
        HEAD_DIM,
        BLOCK_D,
        BLOCK_N,
        CARRY,
        DOCUMENTS,
        ONE_ENTRY,
        CONSUMERS,
        PING_PONG,
        RESCALE_LATE,
        Q_COLUMNS,
        SHUFFLES,
    )
    tables = Tables(tiles_ptr, entries_ptr, n_tiles, n_heads, heads_in_flight, heads, group)
    items = Slots(numbers, make_bars(2, 1), make_bars(2, CONSUMERS))
    program = Program(tables, items, q_slots, k_slots, v_slots, options)
    outputs = Outputs(out_ptr, result_ptr, lse_ptr, out_strides, lse_stride_batch, lse_stride_head)
    qk_scale = softmax_scale * LOG2_E
    # A constant must be spelled inside the call: in a tuple with a name it becomes a tensor.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (program, outputs, qk_scale, 0)),
                (consume, (program, outputs, qk_scale, 1)),
                (_produce, (program, q, k, v, state, counter_ptr)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (program, outputs, qk_scale, 0)),
                (consume, (program, outputs, qk_scale, 1)),
                (consume, (program, outputs, qk_scale, 2)),
                (_produce, (program, q, k, v, state, counter_ptr)),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
