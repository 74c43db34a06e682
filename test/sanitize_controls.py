"""Two small kernels that show what compute-sanitizer's racecheck can tell apart.

A warp hands numbers to a warpgroup as the Hopper kernels do, through two slots with mbarriers that
one thread arrives at for its partition. In one kernel that is right, in the other the warpgroup
reads without waiting: what racecheck says of the Hopper kernels is worth what it says of these.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

COLUMNS = gl.constexpr(64)
PROGRAMS, LAPS = 8, 6


@gluon.jit
def _write(out_ptr, numbers, full, empty, laps):
    """Fill a slot with its turn, added to 0, 1, 2, .."""
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    for t in range(laps):
        slot = t % 2
        mbarrier.wait(empty.index(slot), t // 2 & 1 ^ 1)
        numbers.index(slot).store(gl.arange(0, COLUMNS, layout).to(gl.float32) + t)
        mbarrier.arrive(full.index(slot), count=1)


@gluon.jit
def _read(out_ptr, numbers, full, empty, laps, WAITS: gl.constexpr):
    """out[program] = the sum of what the slots held, turn by turn."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    total = gl.zeros([COLUMNS], gl.float32, layout)
    for t in range(laps):
        slot = t % 2
        if WAITS:
            mbarrier.wait(full.index(slot), t // 2 & 1)
        total += numbers.index(slot).load(layout)
        # Without having waited it might arrive before the writer asks, who would then never go on.
        if WAITS:
            mbarrier.arrive(empty.index(slot), count=1)
    gl.store(out_ptr + gl.program_id(0) * COLUMNS + gl.arange(0, COLUMNS, layout), total)


@gluon.jit
def _slots():
    """Return two slots of numbers and the barriers that say which are full and which empty."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    numbers = gl.allocate_shared_memory(gl.float32, [2, COLUMNS], flat)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    return numbers, full, empty


@gluon.jit(do_not_specialize=["laps"])
def _right_kernel(out_ptr, laps):
    """Grid: any. out [programs, COLUMNS] float32: written."""
    numbers, full, empty = _slots()
    gl.warp_specialize(
        [
            (_read, (out_ptr, numbers, full, empty, laps, True)),
            (_write, (out_ptr, numbers, full, empty, laps)),
        ],
        [1],
        [24],
    )


@gluon.jit(do_not_specialize=["laps"])
def _wrong_kernel(out_ptr, laps):
    """As _right_kernel, for up to two laps: no slot is given back."""
    numbers, full, empty = _slots()
    gl.warp_specialize(
        [
            (_read, (out_ptr, numbers, full, empty, laps, False)),
            (_write, (out_ptr, numbers, full, empty, laps)),
        ],
        [1],
        [24],
    )


def expected(laps: int) -> Tensor:
    """Return a program's row of what _right_kernel writes."""
    return torch.arange(64, dtype=torch.float32) * laps + laps * (laps - 1) / 2


def run(device: torch.device) -> None:
    """Launch both. What the wrong one writes is anybody's guess."""
    out = torch.empty(PROGRAMS, 64, device=device)
    _right_kernel[(PROGRAMS,)](out, LAPS, num_warps=4, maxnreg=168)
    torch.testing.assert_close(out.cpu(), expected(LAPS).expand(PROGRAMS, 64), rtol=0, atol=0)
    _wrong_kernel[(PROGRAMS,)](out, 2, num_warps=4, maxnreg=168)
    torch.cuda.synchronize()
