"""How to launch the portable kernels: one checked-in row per (arch, head_dim, dtype, pass).

No run-time tuning: kernels add in place, so a second run of one corrupts its result, and ranks that
tune apart can deadlock. benchmark/tune.py searches offline, test/test_aot.py compiles every row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

INTERPRETER = 0
PASSES = ("forward", "dq", "dkv")
DTYPES = ("bfloat16", "float16", "float32")
MAX_HEAD_DIM = 256
# Shared memory that one program may use, in bytes. Parts not named here have 101376 (99 KiB).
SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448, 103: 232448}


@dataclass(frozen=True)
class LaunchConfig:
    """One row.

    Attributes:
        block_m, block_n: query rows and key rows of a tile.
        num_warps, num_stages: of a program, and of its software pipeline.
        tma: load through tensor descriptors where the tensors allow it.
        spills: bytes that ptxas 12.8 stores and loads for want of registers.
        tflops, gpu, date: what was measured (B 1, 16384 tokens, 16 heads, causal); None: nothing.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False
    spills: int = 0
    tflops: float | None = None
    gpu: str | None = None
    date: str | None = None

    @property
    def copies(self) -> int:
        """How often dKV must load lse and delta to have an element for every thread."""
        return max(1, 32 * self.num_warps // (2 * self.block_m))


class Choice(NamedTuple):
    """A row, the arch it was made for, and why that is not the arch asked for ("" if it is)."""

    config: LaunchConfig
    arch: int
    reason: str


# (arch, head_dim, dtype, pass, documents) -> Choice, as launch_config.
Lookup = Callable[[int, int, str, str, bool], Choice]

_ROWS = {
    (90, 16, "bfloat16", "forward"): LaunchConfig(128, 128, 8, 2, tma=True),
    (90, 16, "bfloat16", "dq"): LaunchConfig(128, 128, 8, 2, tma=True),
    (90, 16, "bfloat16", "dkv"): LaunchConfig(64, 128, 8, 2, tma=True),
    (90, 32, "bfloat16", "forward"): LaunchConfig(128, 128, 8, 2, tma=True),
    (90, 32, "bfloat16", "dq"): LaunchConfig(128, 128, 8, 2, tma=True),
    (90, 32, "bfloat16", "dkv"): LaunchConfig(64, 128, 8, 2, tma=True),
    (90, 64, "bfloat16", "forward"): LaunchConfig(128, 64, 4, 3, tma=True),
    (90, 64, "bfloat16", "dq"): LaunchConfig(128, 64, 4, 3, tma=True),
    (90, 64, "bfloat16", "dkv"): LaunchConfig(64, 64, 4, 3, tma=True),
    (90, 128, "bfloat16", "forward"): LaunchConfig(
        64, 64, 4, 3, tma=True, tflops=534, gpu="H200", date="2026-11-22"
    ),
    (90, 128, "bfloat16", "dq"): LaunchConfig(
        128, 64, 8, 3, tma=True, tflops=551, gpu="H100", date="2026-11-22"
    ),
    (90, 128, "bfloat16", "dkv"): LaunchConfig(
        32, 64, 4, 3, tma=True, tflops=542, gpu="H100", date="2026-11-22"
    ),
    (90, 256, "bfloat16", "forward"): LaunchConfig(128, 64, 8, 2, tma=True),
    (90, 256, "bfloat16", "dq"): LaunchConfig(64, 64, 8, 2, tma=True),
    (90, 256, "bfloat16", "dkv"): LaunchConfig(32, 64, 8, 2, tma=True),
    # sm_100, only where sm_90's row suits wgmma: tcgen05 wants 128 rows of queries.
    (100, 128, "bfloat16", "forward"): LaunchConfig(128, 64, 8, 3, tma=True),
    (80, 16, "bfloat16", "forward"): LaunchConfig(128, 64, 8, 3),
    (80, 16, "bfloat16", "dq"): LaunchConfig(128, 64, 8, 3),
    (80, 16, "bfloat16", "dkv"): LaunchConfig(64, 128, 8, 2),
    (80, 32, "bfloat16", "forward"): LaunchConfig(64, 64, 4, 3),
    (80, 32, "bfloat16", "dq"): LaunchConfig(128, 64, 8, 3),
    (80, 32, "bfloat16", "dkv"): LaunchConfig(64, 128, 8, 2),
    (80, 64, "bfloat16", "forward"): LaunchConfig(128, 64, 8, 3),
    (80, 64, "bfloat16", "dq"): LaunchConfig(128, 64, 8, 3),
    (80, 64, "bfloat16", "dkv"): LaunchConfig(32, 128, 8, 3),
    (80, 128, "bfloat16", "forward"): LaunchConfig(128, 64, 8, 3),
    (80, 128, "bfloat16", "dq"): LaunchConfig(128, 32, 8, 3),
    (80, 128, "bfloat16", "dkv"): LaunchConfig(64, 64, 8, 2),
    (80, 256, "bfloat16", "forward"): LaunchConfig(64, 32, 8, 2),
    (80, 256, "bfloat16", "dq"): LaunchConfig(64, 32, 8, 2),
    (80, 256, "bfloat16", "dkv"): LaunchConfig(32, 32, 8, 2),
    # sm_86 and its kind, only where sm_80's row wants more than 99 KiB.
    (86, 256, "bfloat16", "dq"): LaunchConfig(64, 32, 8, 1),
    # float32 runs on FMA units (no tf32), whose operands fill the registers: tiles are small.
    (80, 16, "float32", "forward"): LaunchConfig(64, 64, 8, 1),
    (80, 16, "float32", "dq"): LaunchConfig(64, 64, 8, 1),
    (80, 16, "float32", "dkv"): LaunchConfig(64, 64, 8, 1),
    (80, 32, "float32", "forward"): LaunchConfig(64, 32, 4, 1),
    (80, 32, "float32", "dq"): LaunchConfig(64, 32, 8, 1),
    (80, 32, "float32", "dkv"): LaunchConfig(32, 32, 4, 1),
    (80, 64, "float32", "forward"): LaunchConfig(64, 32, 8, 1),
    (80, 64, "float32", "dq"): LaunchConfig(32, 32, 8, 1),
    (80, 64, "float32", "dkv"): LaunchConfig(32, 32, 8, 1),
    (80, 128, "float32", "forward"): LaunchConfig(32, 32, 8, 1),
    (80, 128, "float32", "dq"): LaunchConfig(16, 16, 8, 1),
    (80, 128, "float32", "dkv"): LaunchConfig(16, 16, 8, 1),
    (80, 256, "float32", "forward"): LaunchConfig(32, 16, 8, 1),
    (80, 256, "float32", "dq"): LaunchConfig(16, 16, 8, 1, spills=936),
    (80, 256, "float32", "dkv"): LaunchConfig(16, 16, 8, 1, spills=1228),
}

# Packed documents: the tile at a document's end passes through registers, and the rows above would
# spill there.
_DOCUMENT_ROWS = {
    (90, 64, "bfloat16", "forward"): LaunchConfig(128, 32, 4, 3, tma=True),
    (90, 64, "bfloat16", "dq"): LaunchConfig(128, 64, 8, 3, tma=True),
    (90, 256, "bfloat16", "forward"): LaunchConfig(128, 32, 8, 2, tma=True),
    (90, 256, "bfloat16", "dq"): LaunchConfig(64, 64, 8, 1, tma=True),
    (90, 256, "bfloat16", "dkv"): LaunchConfig(16, 64, 8, 2),
}

# Small and unequal, so that short test sequences have several tiles of every kind.
_INTERPRETED = {
    "forward": LaunchConfig(32, 16, 4, 1),
    "dq": LaunchConfig(16, 32, 4, 1),
    "dkv": LaunchConfig(16, 32, 4, 1),
}


def launch_config(
    arch: int, head_dim: int, dtype: str, pass_: str, documents: bool = False
) -> Choice:
    """Choose the row for a pass on an arch, and say why if it was made for another.

    Args:
        arch: compute capability as 10 * major + minor, or INTERPRETER.
        head_dim: 1 to 256; rows are made for powers of two from 16 on.
        dtype: one of DTYPES. float16 takes bfloat16's rows: same size, same instructions.
        pass_: one of PASSES.
        documents: for packed documents.

    Raises:
        ValueError: there is no row for this.
    """
    if arch == INTERPRETER:
        return Choice(_INTERPRETED[pass_], arch, "")
    row_dim = block_d(head_dim)
    row_dtype = "bfloat16" if dtype == "float16" else dtype
    for row_arch in _row_archs(arch):
        key = row_arch, row_dim, row_dtype, pass_
        config = (_DOCUMENT_ROWS.get(key) if documents else None) or _ROWS.get(key)
        if config is not None:
            return Choice(config, row_arch, _reason(arch, row_arch, dtype))
    raise ValueError(f"no launch configuration for sm_{arch}, D {head_dim}, {dtype}, {pass_}")


def block_d(head_dim: int) -> int:
    """Return the width of the kernels' tiles: the next power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _row_archs(arch: int) -> tuple[int, ...]:
    """Return the archs whose rows an arch can run, best first."""
    if arch < 80:
        return ()
    if arch == 80:
        return (80,)
    if SHARED_MEMORY.get(arch) != SHARED_MEMORY[90]:
        return (86, 80)
    return (90, 80) if arch == 90 else (100, 90, 80)


def _reason(arch: int, row_arch: int, dtype: str) -> str:
    if arch == row_arch:
        return ""
    if dtype == "float32" and arch >= 80:
        return f"sm_{row_arch}'s row: float32 uses no tensor cores, all parts share its rows"
    if row_arch == 100:
        return f"sm_100's row, never timed on sm_{arch}"
    if row_arch == 90:
        return f"sm_90's row, compiled but never timed on sm_{arch}"
    return f"sm_{row_arch}'s row, which fits the 99 KiB of shared memory of sm_{arch}"
