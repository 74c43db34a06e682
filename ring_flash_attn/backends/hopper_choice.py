"""How the fused Hopper backward is cut, by a step's length, mask and heads.

Ratios are to FlashAttention-3's whole backward, bfloat16, D 128, one H200, 2026-11-28; 8k and 32k
have 32 query and 8 key heads, 16k has 16 and 16. The causal ones were measured with a tile's
queries from the first up; from the last down, as they are walked now, two slots and no copies gave
8k 1.000, 16k .945, 32k .960.
"""

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from ..kernels.hopper.configs import BackwardConfig
from .work import L2_BYTES

# Where there are fewer programs a multiprocessor than this they are cut into several. Under a mask
# the longest of them takes about twice the average's time, and alone at the end.
FEW_PROGRAMS, FEW_MASKED_PROGRAMS = 0.5, 2.0
# q and dout of 16 bits and the float32 dq, of which a block is read, read and added to.
_BYTES = 8


class Work(NamedTuple):
    """A step's work.

    Attributes:
        programs: tiles of key rows times key heads times batch.
        group: query heads of a key head.
        full: whether every query sees every key of what it meets.
        head_numbers: of one head of q that tiles walk together: rows times head dim. 0 for
            documents, of which a tile meets its own alone.
    """

    programs: int
    group: int
    full: bool
    head_numbers: int


@lru_cache(maxsize=256)
def config_for(config: BackwardConfig, full: bool, group: int) -> BackwardConfig:
    """Return a row with as many slots of dq as a step is fastest with.

    One where every query sees every key, or a key head has one query head; else as many as the row
    says. Ratio with two -> one: full 8k .956 -> .959, 16k .927 -> .950, 32k .957 -> .961; causal
    16k .931 -> .942, 8k .982 -> .981, but 32k .955 -> .928.
    """
    if config.one_dq_stage and (full or group == 1):
        return replace(config, dq_stages=1)
    return config


def copies_for(work: Work, multiprocessors: int) -> int:
    """Return into how many parts to cut the query heads of a key head, a divisor of their number.

    Each is a program with dk and dv of its own, which are summed afterwards. For two reasons:

    * Few programs leave multiprocessors idle: FEW_PROGRAMS.
    * Under a mask tiles walk queries of different numbers, so from their second head on they no
      longer read the same blocks at the same time. Where one head fills L2 a program a query head
      is faster: causal 32k .955 -> .975.

    Copies take 2 * 4 bytes * B * Lk * Hk * copies * D until they are summed: with a program a query
    head 8 bytes a number of q, twice a float32 dq. At 32k and 32 heads of 128 that is 1.07 GB.
    """
    if not work.full and work.head_numbers * _BYTES >= L2_BYTES:
        return work.group
    few = FEW_PROGRAMS if work.full else FEW_MASKED_PROGRAMS
    copies = 1
    while work.programs * copies < few * multiprocessors and work.group % (2 * copies) == 0:
        copies *= 2
    return copies
