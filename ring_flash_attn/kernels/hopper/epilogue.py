"""How the Hopper kernels end a tile: what they merge with or add to, and where it is stored."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared
from triton.language.core import _aggregate as aggregate

from .forward_program import ROWS, state_columns, state_piece, state_pieces, state_turns
from .slots import await_full

LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _wide(x, stride):
    """Return x * stride in 64 bits, for 32-bit x and stride >= 0.

    Unsigned: the upper halves of signed ones lie in registers that the loops have none left of.
    """
    return x.to(gl.uint32).to(gl.uint64) * stride.to(gl.uint32).to(gl.uint64)


@gluon.jit
def at_source(dk_ptr, dv_ptr, offsets_ptr, row, span):
    """Return where dk and dv of a tile of keys go, as source_offset of kernels/tile.py has it."""
    if offsets_ptr is not None:
        offset = gl.load(offsets_ptr + row // span) * 4
        dk_ptr += offset
        dv_ptr += offset
    return dk_ptr, dv_ptr


@aggregate
class Outputs:
    """State and result [B, L, H, D] of the same strides, lse [B, H, L] float32."""

    state_ptr: gl.tensor
    result_ptr: gl.tensor
    lse_ptr: gl.tensor
    stride_batch: gl.tensor
    stride_head: gl.tensor
    stride_row: gl.tensor
    lse_stride_batch: gl.tensor
    lse_stride_head: gl.tensor

    @gluon.constexpr_function
    def __init__(self, state_ptr, result_ptr, lse_ptr, strides, lse_stride_batch, lse_stride_head):
        self.state_ptr = state_ptr
        self.result_ptr = result_ptr
        self.lse_ptr = lse_ptr
        self.stride_batch, self.stride_head, self.stride_row = strides
        self.lse_stride_batch = lse_stride_batch
        self.lse_stride_head = lse_stride_head

    @gluon.jit
    def at(self, batch, head):
        """Return (state_ptr, result_ptr, lse_ptr) of a head's row 0."""
        offset = _wide(batch, self.stride_batch) + _wide(head, self.stride_head)
        lse_offset = _wide(batch, self.lse_stride_batch) + _wide(head, self.lse_stride_head)
        return self.state_ptr + offset, self.result_ptr + offset, self.lse_ptr + lse_offset


@gluon.jit
def load_lse2(m_i, target, CONSUMER: gl.constexpr, CARRY: gl.constexpr):
    """Return the carried lse of a consumer's rows in base 2, without CARRY anything."""
    outputs, batch, head, row, row_end, _ = target
    lse2 = m_i
    if CARRY:
        lse_ptr = outputs.at(batch, head)[2]
        offs_m = row + CONSUMER * ROWS + gl.arange(0, ROWS, m_i.type.layout)
        lse = gl.load(lse_ptr + offs_m, mask=offs_m < row_end, other=float("-inf"))
        lse2 = lse * LOG2_E
    return lse2


@gluon.jit
def store_tile(acc, m_i, l_i, old_lse2, target, program, count, CONSUMER: gl.constexpr):
    """Store out and lse of a consumer's rows; return the count of blocks after the old state.

    Args:
        acc: [ROWS, BLOCK_D] float32, sum of p v. m_i: [ROWS] maximum, in base 2. l_i: [ROWS, 8]
            parts of the sum of p.
        old_lse2: what load_lse2 returned. With CARRY it and the old state, which comes through the
            slots of K and V from `count` on, are merged with.
        target: (outputs, batch, head, row, row_end, finishes) of the tile. With `finishes` out goes
            to the result, not to the state.
    """
    CARRY: gl.constexpr = program.options.CARRY
    HEAD_DIM: gl.constexpr = program.options.HEAD_DIM
    SHUFFLES: gl.constexpr = program.options.SHUFFLES
    outputs, batch, head, row, row_end, finishes = target
    row += CONSUMER * ROWS
    stat_layout: gl.constexpr = m_i.type.layout
    l_i = gl.convert_layout(gl.sum(l_i, 1), stat_layout)
    l_safe = gl.where(l_i == 0.0, 1.0, l_i)
    lse2 = gl.where(l_i == 0.0, float("-inf"), m_i + gl.log2(l_safe))
    # A row that saw nothing adds 0 even where V is not finite.
    weight = gl.where(l_i == 0.0, 0.0, 1.0 / l_safe)
    old_weight = weight
    state_ptr, result_ptr, lse_ptr = outputs.at(batch, head)
    offs_m = row + gl.arange(0, ROWS, stat_layout)
    if CARRY:
        # Here and not as the loop's initial state: an accumulator that is loaded makes ptxas
        # serialise the wgmmas (C7514).
        # Four threads have loaded each row of lse: all must, before one stores it.
        gl.thread_barrier()
        top = gl.maximum(old_lse2, lse2)
        top = gl.where(top == float("-inf"), 0.0, top)
        old = gl.exp2(old_lse2 - top)
        new = gl.exp2(lse2 - top)
        total = old + new
        total_safe = gl.where(total == 0.0, 1.0, total)
        lse2 = gl.where(total == 0.0, float("-inf"), top + gl.log2(total_safe))
        weight *= new / total_safe
        old_weight = old / total_safe
    gl.store(lse_ptr + offs_m, lse2 * LN_2, mask=offs_m < row_end)
    place = (state_ptr, result_ptr, outputs.stride_row, row, row_end, finishes)
    if CARRY:
        # In parts: all old rows beside all of acc would spill.
        parts = _parts(acc)
        count = _merge_parts(parts, weight, old_weight, place, program, count, CONSUMER)
    else:
        _store_columns(acc, acc, weight, old_weight, place, 0, HEAD_DIM, SHUFFLES, False)
    return count


@gluon.jit
def _merge_parts(parts, weight, old_weight, place, program, count, CONSUMER: gl.constexpr):
    """Merge acc, cut in parts, with the old state in the slots of K and V, and store it."""
    BLOCK_N: gl.constexpr = program.options.BLOCK_N
    HEAD_DIM: gl.constexpr = program.options.HEAD_DIM
    PIECES: gl.constexpr = state_pieces(BLOCK_N)
    COLUMNS: gl.constexpr = state_columns(program.options.BLOCK_D, BLOCK_N)
    WIDTH: gl.constexpr = parts[0].shape[1]
    for turn in gl.static_range(state_turns(program.options.CONSUMERS, BLOCK_N)):
        for side in gl.static_range(2):
            slots = program.v if side == 1 else program.k
            slot = count % slots.STAGES
            # Also for what others read: a slot must be seen full before it may be released.
            await_full(slots, slot, count // slots.STAGES)
            if (2 * turn + side) // PIECES == CONSUMER:
                piece = state_piece(slots, slot, COLUMNS).reshape([ROWS, COLUMNS])
                for i in gl.static_range(COLUMNS // WIDTH):
                    x = parts[(2 * turn + side) % PIECES * (COLUMNS // WIDTH) + i]
                    _store_columns(
                        x,
                        piece.slice(i * WIDTH, WIDTH, 1).load(x.type.layout),
                        weight,
                        old_weight,
                        place,
                        (2 * turn + side) % PIECES * COLUMNS + i * WIDTH,
                        HEAD_DIM,
                        program.options.SHUFFLES,
                        True,
                    )
                fence_async_shared()  # see release in slots.py
            slots.release(slot)
        count += 1
    return count


@gluon.jit
def _parts(acc):
    """Cut acc into parts of 32 columns; 256 columns into four."""
    left, right = _halves(acc)
    if acc.shape[1] == 64:
        return left, right
    else:
        x0, x1 = _halves(left)
        x2, x3 = _halves(right)
        return x0, x1, x2, x3


@gluon.jit
def store_gradient(
    x,
    ptr,
    strides,
    batch,
    head,
    row,
    row_end,
    HEAD_DIM: gl.constexpr,
    ADD: gl.constexpr,
):
    """Store x [rows, BLOCK_D] float32 in the rows of a head from `row` on that lie before row_end.

    Args:
        ptr: [B, L, H, D] float32, strides (batch, head, row).
        ADD: add to what is there, in quarters: the old rows beside all of x would spill.
    """
    ptr += _wide(batch, strides[0]) + _wide(head, strides[1])
    if ADD:
        QUARTER: gl.constexpr = x.shape[1] // 4
        left, right = _halves(x)
        x0, x1 = _halves(left)
        x2, x3 = _halves(right)
        _add_columns(x0, ptr, strides[2], row, row_end, 0, HEAD_DIM)
        _add_columns(x1, ptr, strides[2], row, row_end, QUARTER, HEAD_DIM)
        _add_columns(x2, ptr, strides[2], row, row_end, QUARTER * 2, HEAD_DIM)
        _add_columns(x3, ptr, strides[2], row, row_end, QUARTER * 3, HEAD_DIM)
    else:
        _store(x, ptr, strides[2], row, row_end, 0, HEAD_DIM, False)


@gluon.jit
def store_dq(
    x,
    state_ptr,
    result_ptr,
    strides,
    batch,
    head,
    row,
    row_end,
    finishes,
    HEAD_DIM: gl.constexpr,
    ADD: gl.constexpr,
):
    """Store x [rows, BLOCK_D] float32 as store_gradient does, in the result if it finishes.

    Args:
        state_ptr, result_ptr: [B, L, H, D] of the same strides. ADD adds what is in the state.
    """
    offset = _wide(batch, strides[0]) + _wide(head, strides[1])
    target = (state_ptr + offset, result_ptr + offset, strides[2], row, row_end, finishes)
    QUARTER: gl.constexpr = x.shape[1] // 4
    left, right = _halves(x)
    x0, x1 = _halves(left)
    x2, x3 = _halves(right)
    _store_or_finish(x0, target, 0, HEAD_DIM, ADD)
    _store_or_finish(x1, target, QUARTER, HEAD_DIM, ADD)
    _store_or_finish(x2, target, QUARTER * 2, HEAD_DIM, ADD)
    _store_or_finish(x3, target, QUARTER * 3, HEAD_DIM, ADD)


@gluon.jit
def _store_or_finish(x, target, COLUMN: gl.constexpr, HEAD_DIM: gl.constexpr, ADD: gl.constexpr):
    """Store x, with ADD plus the state, in columns from COLUMN on of the state or the result.

    Two numbers a thread: to store eight, as _store does, takes shared memory that is in use.
    """
    state_ptr, result_ptr, stride, row, row_end, finishes = target
    if COLUMN < HEAD_DIM:
        states, mask = _elements(state_ptr, stride, row, row_end, x, COLUMN, HEAD_DIM)
        if ADD:
            x += gl.load(states, mask=mask, other=0.0).to(gl.float32)
        if finishes > 0:
            results, mask = _elements(result_ptr, stride, row, row_end, x, COLUMN, HEAD_DIM)
            gl.store(results, x.to(result_ptr.dtype.element_ty), mask=mask)
        else:
            gl.store(states, x.to(state_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def _add_columns(x, ptr, stride, row, row_end, COLUMN: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Add x to the columns from COLUMN on."""
    if COLUMN < HEAD_DIM:
        pointers, mask = _elements(ptr, stride, row, row_end, x, COLUMN, HEAD_DIM)
        gl.store(pointers, x + gl.load(pointers, mask=mask, other=0.0), mask=mask)


@gluon.jit
def _halves(x):
    """Return the left and the right half of x's columns, cut in registers."""
    pairs = gl.permute(gl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1))
    return gl.split(pairs)


@gluon.jit
def _store_columns(
    x,
    old,
    weight,
    old_weight,
    place,
    COLUMN: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    SHUFFLES: gl.constexpr,
    ADD: gl.constexpr,
):
    """Store x * weight, with ADD plus old * old_weight, in columns from COLUMN on."""
    state_ptr, result_ptr, stride, row, row_end, finishes = place
    layout: gl.constexpr = x.type.layout
    if COLUMN < HEAD_DIM:
        keep = gl.convert_layout(weight, gl.SliceLayout(1, layout))[:, None]
        x = gl.where(keep == 0.0, 0.0, x * keep)
        if ADD:
            x += old * gl.convert_layout(old_weight, gl.SliceLayout(1, layout))[:, None]
        if state_ptr.dtype == result_ptr.dtype:
            if finishes > 0:
                state_ptr = result_ptr
            _store(x, state_ptr, stride, row, row_end, COLUMN, HEAD_DIM, SHUFFLES)
        else:
            if finishes > 0:
                _store(x, result_ptr, stride, row, row_end, COLUMN, HEAD_DIM, SHUFFLES)
            else:
                _store(x, state_ptr, stride, row, row_end, COLUMN, HEAD_DIM, SHUFFLES)


@gluon.jit
def _store(
    x,
    ptr,
    stride,
    row,
    row_end,
    COLUMN: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    SHUFFLES: gl.constexpr,
):
    """Store x [rows, N] in the element type of ptr.

    Of 16 bits eight in a row a thread, by way of shared memory; with SHUFFLES four.
    """
    N: gl.constexpr = x.shape[1]
    if ptr.dtype.element_ty == gl.float32:
        pointers, mask = _elements(ptr, stride, row, row_end, x, COLUMN, HEAD_DIM)
        gl.store(pointers, x, mask=mask)
    else:
        wide: gl.constexpr = wide_layout(N, SHUFFLES)
        rounded = gl.convert_layout(x.to(ptr.dtype.element_ty), wide)
        pointers, mask = _elements(ptr, stride, row, row_end, rounded, COLUMN, HEAD_DIM)
        gl.store(pointers, rounded, mask=mask)


@gluon.constexpr_function
def wide_layout(N, SHUFFLES):
    """Return the layout in which a result [64, N] is stored.

    That of SHUFFLES differs from a wgmma's result in one bit of the lane and one of the register,
    which Triton 3.6 exchanges by shuffles; two it takes through shared memory. Four threads store
    32 bytes in a row.
    """
    if not SHUFFLES:
        return gl.BlockedLayout([1, 8], [256 // N, N // 8], [4, 1], [1, 0])
    registers = [[0, 1], [0, 2], [8, 0]] + [[0, 16 << i] for i in range(N.bit_length() - 5)]
    lanes = [[0, 8], [0, 4], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, N])


@gluon.jit
def _elements(ptr, stride, row, row_end, x, COLUMN: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Return pointers to where x [rows, N] goes, from column COLUMN on, and which exist."""
    layout: gl.constexpr = x.type.layout
    # From `row` on, which changes: else the compiler keeps all these offsets through the loops.
    rows = row + gl.arange(0, x.shape[0], gl.SliceLayout(1, layout))
    columns = COLUMN + gl.arange(0, x.shape[1], gl.SliceLayout(0, layout))
    mask = (rows < row_end)[:, None]
    if COLUMN + x.shape[1] > HEAD_DIM:
        mask = mask & (columns < HEAD_DIM)[None, :]
    return ptr + _wide(rows, stride)[:, None] + columns[None, :], mask
