"""How to launch the Hopper kernels: one checked-in row per width of their tiles.

test/test_aot.py compiles every row, benchmark/tune.py searches for better ones. Numbers are
TFLOP/s, causal and full, of run k7 in benchmark/results/kernels.csv (D 256 full: of
k6): bfloat16, H200, 2026-11-29; in brackets batch, length, query and key heads.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ForwardConfig:
    """One row.

    Attributes:
        consumers: warpgroups that multiply, 2 or 3, each 64 query rows of a tile.
        block_n: key rows of a block.
        k_stages, v_stages: blocks of each in shared memory, five in all: named barriers are few.
        ping_pong: consumers issue their products in turn, so that one multiplies while the others
            do their softmax.
        rescale_late: rescale the accumulator after the next scores are issued.
        q_columns: columns of Q that a consumer holds in registers, 0 or a power of two from 64 on.
            What it holds whole it gives back at once, so that the next tile's can come.
        shuffles: bring 16-bit results in order for their stores by shuffles, not through shared
            memory, which blocks can have instead.
    """

    consumers: int
    block_n: int
    k_stages: int
    v_stages: int
    ping_pong: bool
    rescale_late: bool = False
    q_columns: int = 0
    shuffles: bool = False

    @property
    def block_m(self) -> int:
        """Query rows of a tile."""
        return 64 * self.consumers

    @property
    def registers(self) -> tuple[int, int, int]:
        """Registers a thread: at launch, then of a consumer and of the producer.

        The warpgroups share what they were launched with, so the parts may not exceed it, and the
        launch may not exceed 65536 in all. FlashAttention-3's split.
        """
        return (168, 240, 24) if self.consumers == 2 else (128, 160, 32)


# By the width of the tiles, for both 16-bit dtypes: same size, same instructions.
FORWARD = {
    # 459, 508 (4, 4096, 32/32)
    64: ForwardConfig(3, 128, k_stages=2, v_stages=3, ping_pong=True),
    # 663, 664 (1, 16384, 16/16); 681, 660 (1, 8192, 32/8); 665, 660 (1, 32768, 32/8)
    128: ForwardConfig(2, 128, k_stages=2, v_stages=3, ping_pong=False, q_columns=128),
    # 654, 703 (1, 8192, 16/16)
    256: ForwardConfig(
        2,
        64,
        k_stages=2,
        v_stages=3,
        ping_pong=True,
        rescale_late=True,
        q_columns=128,
        shuffles=True,
    ),
}


def forward_config(head_dim: int) -> ForwardConfig | None:
    """Return the row for a head_dim, None if the portable kernel is to take it.

    Widths between two rows are padded in shared memory: D 80 and 96 multiply as 128, 160 and 192
    as 256. Up to 32 the tiles of 64 columns would be half empty.
    """
    if not 32 < head_dim <= 256 or head_dim % 8:
        return None
    return FORWARD[max(64, 1 << (head_dim - 1).bit_length())]


@dataclass(frozen=True)
class BackwardConfig:
    """One row. There are two consumers.

    Attributes:
        block_m: query rows of a block, 64 or 128.
        q_stages, dout_stages, dq_stages: blocks of each in shared memory.
        keys_in_registers: hold K and V in registers as left operands of the scores and of dp, which
            saves reading both from shared memory for every block.
        one_dq_stage: take one of dq, and heads apart, where backends/hopper_choice.py finds that
            faster.
        heads_apart: a tile walks the blocks of one query head after the other's, not a block of all
            heads after the other.
        rotate: start tiles of full attention at different blocks of queries.
        spills: bytes that ptxas 12.8 stores and loads for want of registers.
        wins: whether it is faster than the portable kernels, which run if it is not.
    """

    block_m: int = 64
    q_stages: int = 2
    dout_stages: int = 2
    dq_stages: int = 2
    one_dq_stage: bool = False
    keys_in_registers: bool = False
    heads_apart: bool = False
    rotate: bool = False
    spills: int = 0
    wins: bool = True

    @property
    def registers(self) -> tuple[int, int, int]:
        """Registers a thread: at launch, then of a consumer, and of the producer and the writer."""
        return 168, 240, 24

    @property
    def key_rows(self) -> int:
        """Key rows of a tile, 64 for each consumer."""
        return 128


# The design document has the ratios to FlashAttention-3 and to the portable kernels.
BACKWARD = {
    # 441, 487 (4, 4096, 32/32)
    64: BackwardConfig(keys_in_registers=True),
    # 568, 563 (1, 16384, 16/16); 561, 558 (1, 8192, 32/8); 576, 584 (1, 32768, 32/8)
    128: BackwardConfig(one_dq_stage=True, spills=52),
}


@dataclass(frozen=True)
class WideConfig:
    """One row of the two backward kernels for wide heads, see kernels/hopper/backward_wide.py.

    Attributes:
        stages: of dq's kernel, tiles of 64 rows of K and V in shared memory.
        query_columns: of dq's kernel, columns of Q that a consumer holds in registers.
        spills: bytes that ptxas 12.8 stores and loads for want of registers.
    """

    stages: int
    query_columns: int = 0
    spills: int = 0

    @property
    def registers(self) -> tuple[int, int, int]:
        """Registers a thread: at launch, then of a consumer and of the producer."""
        return 168, 240, 24

    @property
    def query_rows(self) -> int:
        """Query rows of a tile of dq's kernel, 64 for each consumer."""
        return 128

    @property
    def key_rows(self) -> int:
        """Key rows of a tile of dk's and dv's kernel."""
        return 64


# 454, 457 (1, 8192, 16/16)
WIDE = {256: WideConfig(stages=3, query_columns=64, spills=16)}


def backward_config(head_dim: int) -> BackwardConfig | WideConfig | None:
    """Return the row for a head_dim, None if the portable kernels are to take it.

    As forward_config. Above 128 dk and dv of 64 rows do not fit in the registers of one consumer.
    """
    if not 32 < head_dim <= 256 or head_dim % 8:
        return None
    width = max(64, 1 << (head_dim - 1).bit_length())
    return WIDE[width] if width > 128 else BACKWARD[width]
