"""How the fused Hopper backward is cut, by a step's length, mask and heads.

The design document has what the choices are from: section "What was tried on Hopper".
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
        windowed: whether queries see keys between two bounds, so that tiles meet as many blocks
            each, but others.
        head_numbers: of one head of q that tiles walk together: rows times head dim. 0 for
            documents, of which a tile meets its own alone.
    """

    programs: int
    group: int
    full: bool
    windowed: bool
    head_numbers: int


@lru_cache(maxsize=256)
def config_for(config: BackwardConfig, work: Work) -> BackwardConfig:
    """Return a row with the order of heads, and as many slots of dq, as a step is fastest with.

    Heads together, a tile meets rows of all of them at a time: under a window those of the tiles
    that run together do not fit in L2. By themselves they do; so they go also under another mask
    where all of them fit, then with one slot. One slot also where a key head has one query head, or
    where every query sees every key and one head's rows fit; else as many as the row says.
    """
    if not config.one_dq_stage:
        return config
    head = work.head_numbers * _BYTES
    if work.windowed:
        return replace(config, heads_apart=True)
    masked_in_l2 = 0 < head * work.group <= L2_BYTES and not work.full
    if work.group == 1 or (work.full and head < L2_BYTES) or masked_in_l2:
        return replace(config, dq_stages=1, heads_apart=masked_in_l2 and work.group > 1)
    return config


def copies_for(work: Work, multiprocessors: int) -> int:
    """Return into how many parts to cut the query heads of a key head, a divisor of their number.

    Few programs leave multiprocessors idle. Each part is a program with dk and dv of its own, 2 * 4
    bytes * B * Lk * Hk * copies * D, which are summed afterwards.
    """
    few = FEW_PROGRAMS if work.full else FEW_MASKED_PROGRAMS
    copies = 1
    while work.programs * copies < few * multiprocessors and work.group % (2 * copies) == 0:
        copies *= 2
    return copies
