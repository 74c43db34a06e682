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
    ds            CONSUMERS, CONSUMERS  a consumer, for both       its 64 rows of ds^T, of this turn
                                                                   and of the other's
    dq            DQ_STAGES             the consumers in turns,    BLOCK_M rows of dq
                                        for the writer
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared
from triton.language.core import _aggregate as aggregate

from .backward_consumer import CONSUMERS, FIRST_EMPTY, ROWS, consume
from .backward_transfer import Statistics, load_keys, produce, write
from .slots import Blocks, Inlets, Outlets, box_shape, make_blocks, make_inlets, make_outlets
from .tiles import Tables, load_work
from .walk import Walk, count_blocks


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
    DQ_STAGES: gl.constexpr
    KEYS_IN_REGISTERS: gl.constexpr
    P_SHIFT: gl.constexpr
    P_UNIT: gl.constexpr

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
        DQ_STAGES,
        KEYS_IN_REGISTERS,
    ):
        self.HEAD_DIM = gl.constexpr(HEAD_DIM)
        self.BLOCK_D = gl.constexpr(BLOCK_D)
        self.BLOCK_M = gl.constexpr(BLOCK_M)
        self.ADD = gl.constexpr(ADD)
        self.DOCUMENTS = gl.constexpr(DOCUMENTS)
        self.Q_STAGES = gl.constexpr(Q_STAGES)
        self.DOUT_STAGES = gl.constexpr(DOUT_STAGES)
        self.DQ_STAGES = gl.constexpr(DQ_STAGES)
        self.KEYS_IN_REGISTERS = gl.constexpr(KEYS_IN_REGISTERS)
        # What produce wants to know: tiles of 64 key rows; p is not shifted.
        self.P_SHIFT = gl.constexpr(0.0)
        self.P_UNIT = gl.constexpr(1.0)


@aggregate
class Program:
    """What the partitions share; `total` is how many blocks they go through.

    key_head is that of K and V, out_head where dk and dv go.
    """

    walk: Walk
    batch: gl.tensor
    key_head: gl.tensor
    out_head: gl.tensor
    total: gl.tensor
    k: Inlets
    v: Inlets
    q: Blocks
    statistics: gl.shared_memory_descriptor
    dout: Blocks
    ds: gl.shared_memory_descriptor
    dq: Outlets
    softmax_scale: gl.tensor
    options: Options

    @gluon.constexpr_function
    def __init__(self, walk, heads, total, k, v, q, statistics, dout, ds, dq, scale, options):
        self.walk = walk
        self.batch, self.key_head, self.out_head = heads
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
        "copies",
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
    offsets_ptr,
    span,
    tiles_ptr,
    entries_ptr,
    n_tiles,
    n_heads,
    heads_in_flight,
    heads,
    group,
    copies,
    rotate,
    softmax_scale,
    HEAD_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_M: gl.constexpr,
    ADD: gl.constexpr,
    DOCUMENTS: gl.constexpr,
    Q_STAGES: gl.constexpr,
    DOUT_STAGES: gl.constexpr,
    DQ_STAGES: gl.constexpr,
    KEYS_IN_REGISTERS: gl.constexpr,
    HEADS_APART: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    OTHER_REGISTERS: gl.constexpr,
):
    """dv = p^T dout, dk = softmax_scale ds^T q, dq += softmax_scale ds k.

    p = exp(softmax_scale q k^T - lse), ds = p (dout v^T - delta).
    Grid: n_tiles * B * heads, one program a tile of up to 128 key rows and head of dk and dv,
    summing over `group` query heads, of CONSUMERS + 1 warpgroups. `copies` heads of dk and dv
    belong to one of k and v: heads = Hk * copies, group = H / heads.
    As in kernels/dkv.py: tables, lse, delta, dk, dv, their strides and offsets, heads, ADD: dk and
    dv are float32 and stored, or with ADD added, in the rows of the tiles.
    q, k, v, dout, dq: descriptors of [B, H, L, D] with box [1, 1, rows, BLOCK_D]; rows are 64 for
    k and v, BLOCK_M for the others. dq is float32 and added to. With DOCUMENTS all are the cut
    descriptors of backends/descriptors.py: no row past an entry is read or added to.
    rotate: 1 starts every tile at another block of an entry, 0 all at the first: tiles that meet
    the same queries would add to the same dq at the same time.
    """
    row, row_end, first_entry, end_entry, _, head = load_work(
        Tables(tiles_ptr, entries_ptr, n_tiles, n_heads, heads_in_flight, heads, group),
        gl.program_id(0),
    )
    shift = row // (CONSUMERS * ROWS) % n_tiles * rotate
    out_head = head % heads
    tile, met = (row, row_end), (first_entry, end_entry)
    walk = Walk(
        entries_ptr, tile, met, shift, n_tiles, out_head * group, group, True, True, HEADS_APART
    )
    k_slots = make_inlets(CONSUMERS, k, ROWS, BLOCK_D, DOCUMENTS)
    v_slots = make_inlets(CONSUMERS, v, ROWS, BLOCK_D, DOCUMENTS)
    box: gl.constexpr = box_shape(BLOCK_M, BLOCK_D, DOCUMENTS)
    q_slots = make_blocks(Q_STAGES, CONSUMERS, q, box, FIRST_EMPTY, 2)
    dout_slots = make_blocks(DOUT_STAGES, CONSUMERS, dout, box, FIRST_EMPTY + Q_STAGES)
    dq_slots = make_outlets(DQ_STAGES, dq, box)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    statistics = gl.allocate_shared_memory(gl.float32, [2 * Q_STAGES, BLOCK_M], flat)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_M], q.dtype)
    ds = gl.allocate_shared_memory(q.dtype, [CONSUMERS * CONSUMERS, ROWS, BLOCK_M], ds_layout)
    fence_async_shared()
    batch, key_head = head // heads, out_head // copies
    # Before the partitions begin, so that they travel while the entries are read.
    load_keys(walk, batch, key_head, k, k_slots, CONSUMERS, DOCUMENTS)
    load_keys(walk, batch, key_head, v, v_slots, CONSUMERS, DOCUMENTS)
    options = Options(
        HEAD_DIM,
        BLOCK_D,
        BLOCK_M,
        ADD,
        DOCUMENTS,
        Q_STAGES,
        DOUT_STAGES,
        DQ_STAGES,
        KEYS_IN_REGISTERS,
    )
    program = Program(
        walk,
        (batch, key_head, out_head),
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
            (consume, (program, dk_ptr, dv_ptr, dk_strides, dv_strides, offsets_ptr, span, 0)),
            (consume, (program, dk_ptr, dv_ptr, dk_strides, dv_strides, offsets_ptr, span, 1)),
            (produce, (program, rows, q, dout)),
            (write, (program, dq)),
        ],
        [4, 1, 1],
        [CONSUMER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS],
    )
