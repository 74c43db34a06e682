"""The Gluon emulator computes what a GPU does, and finds the bugs that it claims to find."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from gluon_emulator import Deadlock, EmulationError, load_module
from gluon_memory import TensorDescriptor
from gluon_types import BFLOAT16, FLOAT16, round_to

IMPORTS = """
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate
"""

# A producer hands tiles of a and b to a consumer, which stores the sum of a b^T.
PIPELINE = """
@gluon.jit
def _make_bars(N: gl.constexpr, COUNT: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(bars.index(i), count=COUNT)
    return bars

@gluon.jit
def _produce(a, b, a_tiles, b_tiles, full, empty, n_tiles, STAGES: gl.constexpr):
    for i in range(n_tiles):
        slot = i % STAGES
        mbarrier.wait(empty.index(slot), i // STAGES & 1 ^ 1)
        mbarrier.expect(full.index(slot), a.block_type.nbytes + b.block_type.nbytes)
        tma.async_copy_global_to_shared(a, [i * 16, 0], full.index(slot), a_tiles.index(slot))
        tma.async_copy_global_to_shared(b, [i * 16, 0], full.index(slot), b_tiles.index(slot))

@gluon.jit
def _consume(out, a_tiles, b_tiles, full, empty, n_tiles, STAGES: gl.constexpr):
    acc = gl.zeros([16, 16], gl.float32, None)
    for i in range(n_tiles):
        slot = i % STAGES
        mbarrier.wait(full.index(slot), i // STAGES & 1)
        acc = warpgroup_mma(
            a_tiles.index(slot), b_tiles.index(slot).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(empty.index(slot), count=1)
    rows, columns = gl.arange(0, 16, None), gl.arange(0, 16, None)
    gl.store(out + rows[:, None] * 16 + columns[None, :], acc)

@gluon.jit(do_not_specialize=["n_tiles"])
def kernel(a, b, out, n_tiles, STAGES: gl.constexpr):
    a_tiles = gl.allocate_shared_memory(a.dtype, [STAGES, 16, 16], a.layout)
    b_tiles = gl.allocate_shared_memory(b.dtype, [STAGES, 16, 16], b.layout)
    full = _make_bars(STAGES, 1)
    empty = _make_bars(STAGES, 1)
    fence_async_shared()
    gl.warp_specialize([
        (_consume, (out, a_tiles, b_tiles, full, empty, n_tiles, STAGES)),
        (_produce, (a, b, a_tiles, b_tiles, full, empty, n_tiles, STAGES)),
    ], [1], [24])
"""

Load = Callable[..., ModuleType]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load Gluon source, with arguments of load_module."""

    def load_source(source: str, *args, **kwargs) -> ModuleType:
        file = tmp_path / "kernel.py"
        file.write_text(IMPORTS + source)
        return load_module(file, *args, **kwargs)

    return load_source


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def run_pipeline(
    module: ModuleType, dtype: torch.dtype = torch.bfloat16, n_tiles: int = 6
) -> tuple[Tensor, Tensor]:
    """Return (what the kernel computes, what it should) for tiles that go through two slots."""
    rows = n_tiles * 16
    a, b = random(2, rows, 16, dtype=dtype)
    out = torch.full((16, 16), torch.nan)
    layout = module.gl.NVMMASharedLayout.get_default_for([16, 16], module.gl.bfloat16)
    descriptors = [
        module.TensorDescriptor(x, [rows, 16], [16, 1], [16, 16], layout) for x in (a, b)
    ]
    module.kernel[(1,)](*descriptors, out, n_tiles=n_tiles, STAGES=2, num_warps=4, maxnreg=168)
    tiles = zip(a.double().split(16), b.double().split(16), strict=True)
    return out.double(), sum((x @ y.T for x, y in tiles), torch.zeros(16, 16).double())


@pytest.mark.parametrize("seed", [None, 0, 1], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_pipeline_of_copies_and_products(load, dtype, seed):
    got, want = run_pipeline(load(PIPELINE, seed=seed), dtype)
    assert (got - want).abs().max() < 1e-4


WAIT_FULL = "mbarrier.wait(full.index(slot), i // STAGES & 1)"
WAIT_EMPTY = "mbarrier.wait(empty.index(slot), i // STAGES & 1 ^ 1)"
RELEASE = "        mbarrier.arrive(empty.index(slot), count=1)\n"
WAIT_PRODUCT = "        acc = warpgroup_mma_wait(0, [acc])\n"


@pytest.mark.parametrize(
    ("fragment", "planted", "message"),
    [
        (WAIT_EMPTY, "pass", "over-arrive"),
        (WAIT_PRODUCT, "", "used before warpgroup_mma_wait"),
        (WAIT_PRODUCT, WAIT_PRODUCT.replace("0", "1"), "does not cover"),
        (RELEASE, "", "deadlock"),
        (RELEASE, RELEASE.replace("count=1", "count=2"), "over-arrive"),
        ("empty = _make_bars(STAGES, 1)", "empty = _make_bars(STAGES, 2)", "deadlock"),
        ("+ b.block_type.nbytes", "+ b.block_type.nbytes + 2", "deadlock"),
        ("out, n_tiles, STAGES: gl", "out, n_tiles, STAGES, x: gl", "missing"),
    ],
    ids=["no wait", "no product wait", "too short a product wait", "no release", "two releases",
         "arrivals", "bytes", "arguments"],
)  # fmt: skip
def test_a_planted_bug_raises(load, fragment, planted, message):
    with pytest.raises((EmulationError, TypeError), match=message):
        run_pipeline(load(PIPELINE, {fragment: planted}))


@pytest.mark.parametrize(
    ("fragment", "planted", "n_tiles"),
    [
        (WAIT_PRODUCT + RELEASE, RELEASE + WAIT_PRODUCT, 3),
        (WAIT_FULL, "pass", 1),
        (WAIT_FULL, WAIT_FULL[:-1] + " ^ 1)", 1),
    ],
    ids=["released before the product", "no wait", "wrong parity"],
)
def test_a_buffer_used_too_early_gives_wrong_numbers(load, fragment, planted, n_tiles):
    got, want = run_pipeline(load(PIPELINE, {fragment: planted}), n_tiles=n_tiles)
    assert not (got - want).abs().max() < 1e-2


def test_a_deadlock_is_named_at_once(load):
    module = load(PIPELINE, {RELEASE: ""}, timeout_s=100)
    begin = time.monotonic()
    with pytest.raises(Deadlock) as caught:
        run_pipeline(module)
    assert time.monotonic() - begin < 5
    message = str(caught.value)
    assert "partition 0 (_consume) of program (0, 0, 0)" in message
    assert "partition 1 (_produce)" in message
    assert "lacks 1 of 1 arrivals" in message and "in _produce" in message


def test_a_loop_without_end_is_stopped(load):
    source = """
@gluon.jit
def kernel(counter):
    while gl.atomic_add(counter, 0) < 1:
        pass
"""
    with pytest.raises(EmulationError, match=r"not done after 0\.2 s"):
        load(source, timeout_s=0.2).kernel[(1,)](torch.zeros(1, dtype=torch.int32))


COPY = """
@gluon.jit
def _coordinates(start, end, head, RAGGED: gl.constexpr):
    if RAGGED:
        return [1 << 30, end, (1 << 30) - end + start, head, 0]
    return [start, end]

@gluon.jit(do_not_specialize=["start", "end", "head"])
def kernel(source, out, start, end, head, ROWS: gl.constexpr, D: gl.constexpr,
           RAGGED: gl.constexpr):
    tile = gl.allocate_shared_memory(source.dtype, source.block_type.shape, source.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    mbarrier.expect(bar, source.block_type.nbytes)
    tma.async_copy_global_to_shared(source, _coordinates(start, end, head, RAGGED), bar, tile)
    mbarrier.wait(bar, 0)
    offsets = gl.arange(0, ROWS)[:, None] * D + gl.arange(0, D)[None, :]
    gl.store(out + offsets, tile.reshape([ROWS, D]).load(None))
"""


def test_a_copy_past_the_end_gives_zeros(load):
    x, out = random(20, 24), torch.full((16, 32), torch.nan, dtype=torch.bfloat16)
    descriptor = TensorDescriptor(x, [20, 24], [24, 1], [16, 32], None)
    load(COPY).kernel[(1,)](descriptor, out, 10, 8, 0, ROWS=16, D=32, RAGGED=False)
    want = torch.zeros(16, 32, dtype=torch.bfloat16)
    want[:10, :16] = x[10:, 8:]
    assert torch.equal(out, want)


def test_a_copy_from_before_the_start_gives_zeros(load):
    x, out = random(20, 16), torch.full((16, 16), torch.nan, dtype=torch.bfloat16)
    descriptor = TensorDescriptor(x, [20, 16], [16, 1], [16, 16], None)
    load(COPY).kernel[(1,)](descriptor, out, -4, 0, 0, ROWS=16, D=16, RAGGED=False)
    want = torch.cat([torch.zeros(4, 16, dtype=torch.bfloat16), x[:12]])
    assert torch.equal(out, want)


def test_a_descriptor_made_by_triton_is_taken(load):
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as TritonDescriptor

    x, out = random(16, 16), torch.zeros(16, 16, dtype=torch.bfloat16)
    layout = gl.NVMMASharedLayout(128, 16, 2)
    descriptor = TritonDescriptor.from_tensor(x, [16, 16], layout)
    load(COPY).kernel[(1,)](descriptor, out, 0, 0, 0, ROWS=16, D=16, RAGGED=False)
    assert torch.equal(out, x)


def copy_ragged(load: Load, v: Tensor, start: int, end: int, head: int) -> Tensor:
    """Return the box of 16 rows from `start` on of a head of v [T, H, D], a strided view."""
    (_, heads, dim), (row, step, _) = v.shape, v.stride()
    shape, strides = (0x7FFF0000, 0x7FFF0000, 0x40000000, heads, dim), (2**34 - row, row, row, step)
    descriptor = TensorDescriptor(v, shape, (*strides, 1), [1, 1, 16, 1, dim], None)
    out = torch.full((16, dim), torch.nan, dtype=v.dtype)
    load(COPY).kernel[(1,)](descriptor, out, start, end, head, ROWS=16, D=dim, RAGGED=True)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("start", "end"), [(5, 40), (0, 16), (30, 40), (38, 39), (40, 40)])
def test_rows_past_the_end_of_a_ragged_descriptor_are_zeros(load, dtype, start, end):
    v = random(50, 3, 4, 16, dtype=dtype)[:, 1:].flatten(1, 2)[:40].unflatten(1, (2, 4))[:, 1]
    assert not v.is_contiguous()
    out = copy_ragged(load, v, start, end, head=2)
    want = torch.zeros(16, 16, dtype=dtype)
    rows = v[start : min(start + 16, end), 2]
    want[: len(rows)] = rows
    assert torch.equal(out, want)


@pytest.mark.parametrize(("start", "end"), [(-1, 40), (44, 60)], ids=["before", "after"])
def test_a_copy_from_outside_the_storage_raises(load, start, end):
    with pytest.raises(EmulationError, match="TMA read outside the tensor"):
        copy_ragged(load, random(45, 1, 16), start, end, head=0)


@pytest.mark.parametrize(
    ("strides", "box", "message"),
    [
        ([12, 1], [16, 8], "16 bytes"),
        ([16, 2], [16, 8], "last stride"),
        ([16, 1], [24, 8], "power of two"),
        ([2**39, 1], [16, 8], r"2\*\*40"),
        ([16, 16, 1], [16, 8], "one rank"),
    ],
)
def test_a_descriptor_that_no_gpu_takes_raises(strides, box, message):
    with pytest.raises(ValueError, match=message):
        TensorDescriptor(random(20, 16), [20, 16], strides, box, None)


def test_a_copy_to_global_memory_and_a_reduction(load):
    source = """
from triton._C.libtriton import ir
from triton.experimental.gluon.language._core import builtin

@builtin
def reduce_add(desc, coord, src, _semantic=None):
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, desc.handle, coord, src.handle)

@gluon.jit
def kernel(out, total):
    ones = gl.allocate_shared_memory(gl.float32, [8, 8], None, gl.full([8, 8], 1.0, gl.float32))
    fence_async_shared()
    tma.async_copy_shared_to_global(out, [4, 0], ones)
    for i in range(3):
        reduce_add(total, [i, 0], ones)
    tma.store_wait(0)
"""
    out, total = torch.zeros(9, 12), torch.zeros(9, 12)
    descriptors = [TensorDescriptor(x, [9, 12], [12, 1], [8, 8], None) for x in (out, total)]
    load(source).kernel[(1,)](*descriptors)
    assert torch.equal(out[4:, :8], torch.ones(5, 8)) and out.sum() == 40
    rows = torch.tensor([1.0, 2, 3, 3, 3, 3, 3, 3, 2])
    assert torch.equal(total[:, :8], rows[:, None].expand(9, 8)) and total[:, 8:].sum() == 0
    with pytest.raises(EmulationError, match="4 TMA stores in flight"):
        load(source, {"    tma.store_wait(0)\n": ""}).kernel[(1,)](*descriptors)
    with pytest.raises(EmulationError, match=r"TMA store reads what .* stored without a fence"):
        load(source, {"    fence_async_shared()\n": ""}).kernel[(1,)](*descriptors)


def test_a_fence_counts_for_the_partition_that_stored(load):
    source = """
@gluon.jit
def _fence(tile, full):
    mbarrier.wait(full, 0)
    fence_async_shared()

@gluon.jit
def _store(tile, full):
    tile.store(gl.full([64, 16], 1.0, gl.bfloat16))
    mbarrier.arrive(full, count=1)

@gluon.jit
def kernel(out):
    tile = gl.allocate_shared_memory(gl.bfloat16, [64, 16], None)
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    gl.warp_specialize([(_fence, (tile, full)), (_store, (tile, full))], [4], [24])
    acc = gl.zeros([64, 64], gl.float32, None)
    acc = warpgroup_mma(tile, tile.permute((1, 0)), acc)
    gl.store(out, gl.max(acc))
"""
    out = torch.zeros(1)
    with pytest.raises(EmulationError, match=r"wgmma reads what .*_store.* without a fence"):
        load(source).kernel[(1,)](out)
    there = {"    mbarrier.arrive(": "    fence_async_shared()\n    mbarrier.arrive("}
    load(source, there).kernel[(1,)](out)
    assert out.tolist() == [16]


def test_what_is_loaded_is_fenced_before_the_tma_writes_over_it(load):
    source = """
@gluon.jit
def _consume(out, tile, full, empty):
    for i in range(2):
        mbarrier.wait(full, i)
        gl.store(out + i, gl.max(tile.load(None)))
        fence_async_shared()
        mbarrier.arrive(empty, count=1)

@gluon.jit
def _produce(x, tile, full, empty):
    for i in range(2):
        mbarrier.wait(empty, i & 1 ^ 1)
        mbarrier.expect(full, x.block_type.nbytes)
        tma.async_copy_global_to_shared(x, [8 * i, 0], full, tile)

@gluon.jit
def kernel(x, out):
    tile = gl.allocate_shared_memory(gl.float32, [8, 8], None)
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    mbarrier.init(empty, count=1)
    given = (tile, full, empty)
    gl.warp_specialize([(_consume, (out, *given)), (_produce, (x, *given))], [1], [24])
"""
    x, out = torch.arange(128.0).view(16, 8), torch.zeros(2)
    descriptor = TensorDescriptor(x, [16, 8], [8, 1], [8, 8], None)
    load(source).kernel[(1,)](descriptor, out)
    assert out.tolist() == [63, 127]
    with pytest.raises(EmulationError, match=r"TMA load writes over what .*_consume.* has read"):
        load(source, {"        fence_async_shared()\n": ""}).kernel[(1,)](descriptor, out)


def test_a_linear_layout_in_place_of_the_swizzle_of_a_box(load):
    source = """
@gluon.jit
def kernel(out, BASES: gl.constexpr):
    box = gl.allocate_shared_memory(gl.float32, [1, 8, 64], None)
    layout: gl.constexpr = gl.SharedLinearLayout(BASES, alignment=1024)
    x = gl.arange(0, 8)[:, None] * 64 + gl.arange(0, 64)[None, :]
    view = box.index(0)._reinterpret(gl.float32, [8, 64], layout)
    view.store(x.to(gl.float32))
    again = view.load(None)
    gl.store(out + x, box.index(0).load(None))
    gl.store(out + 512 + x, again)
"""
    swizzle = [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16], [1, 4], [2, 8], [4, 16], [0, 32]]
    swapped = [[1, 20] if base == [1, 4] else base for base in swizzle]
    want = torch.arange(512.0).view(8, 64)
    for bases in (swizzle, swapped):
        out = torch.zeros(2, 8, 64)
        load(source).kernel[(1,)](out, bases)
        assert torch.equal(out[1], want)
        if bases is swapped:
            want = want.clone()
            want[1::2] = want[1::2].view(4, 2, 2, 16).flip(2).reshape(4, 64)
        assert torch.equal(out[0], want)


TURNS = """
@gluon.jit
def _bar(KIND: gl.constexpr, ID: gl.constexpr):
    x = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    asm: gl.constexpr = f"bar.{KIND} {ID}, 256;\\n mov.b32 $0, $1;"
    gl.inline_asm_elementwise(asm, "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)

@gluon.jit
def _wait(out, N: gl.constexpr):
    for i in range(N):
        _bar("sync", 8)
        gl.store(out + i, gl.load(out + i) + 1)

@gluon.jit
def _give(out, N: gl.constexpr):
    for i in range(N):
        gl.store(out + i, 10)
        _bar("arrive", 8)

@gluon.jit
def kernel(out, WAITS: gl.constexpr, GIFTS: gl.constexpr):
    gl.warp_specialize([(_wait, (out, WAITS)), (_give, (out, GIFTS))], [4], [24])
"""


@pytest.mark.parametrize("at", [2, 3])
def test_a_named_barrier_that_is_arrived_at_on_a_condition(load, at):
    source = """
@gluon.jit
def _wait(out, AT: gl.constexpr):
    x = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    asm: gl.constexpr = "bar.sync 8, 256;\\n mov.b32 $0, $1;"
    gl.inline_asm_elementwise(asm, "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)
    gl.store(out + 1, gl.load(out))

@gluon.jit
def _give(out, AT: gl.constexpr):
    x = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0])) * 0
    asm: gl.constexpr = (
        "{.reg .pred p; setp.ne.b32 p, $2, 0; @p bar.arrive $1, 256; mov.b32 $0, $1;}")
    for i in range(3):
        gl.store(out, i)
        gl.inline_asm_elementwise(asm, "=r,r,r", [x + 8, x + (i == AT).to(gl.int32)],
                                  dtype=gl.int32, is_pure=False, pack=1)

@gluon.jit
def kernel(out, AT: gl.constexpr):
    gl.warp_specialize([(_wait, (out, AT)), (_give, (out, AT))], [4], [24])
"""
    out = torch.zeros(2, dtype=torch.int32)
    if at > 2:
        with pytest.raises(Deadlock, match="named barrier 8"):
            load(source).kernel[(1,)](out, at)
    else:
        load(source).kernel[(1,)](out, at)
        assert out.tolist() == [2, 2]


def test_a_named_barrier_orders_two_partitions(load):
    out = torch.zeros(1, dtype=torch.int32)
    load(TURNS).kernel[(1,)](out, 1, 1)
    assert out.tolist() == [11]


@pytest.mark.parametrize(
    ("waits", "gifts", "error", "message"),
    [
        (1, 2, EmulationError, "named barrier 8 was left unbalanced: 128 of 256"),
        (2, 1, Deadlock, r"waits for named barrier 8 \(128 of 256"),
        (0, 3, EmulationError, "unbalanced"),
    ],
)
def test_a_named_barrier_out_of_balance_raises(load, waits, gifts, error, message):
    with pytest.raises(error, match=message):
        load(TURNS).kernel[(1,)](torch.zeros(3, dtype=torch.int32), waits, gifts)


POINTERS = """
@gluon.jit
def kernel(source, out, n, strides, start):
    i = gl.arange(0, 8)
    kept = (i < n) & (start >= 0)
    x = gl.load(source + start + i * strides[0], mask=kept, other=-7.0)
    gl.store(out + i * strides[1], x * 2, mask=kept)
    one = gl.load(source, mask=start < 0, other=5)
    gl.store(out + 1, one, mask=n < 8)
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.int64])
def test_masked_loads_and_stores(load, dtype):
    source, out = (torch.arange(20) * 3).to(dtype), torch.full((16,), 9).to(dtype)
    load(POINTERS).kernel[(1,)](source, out, 4, (3, 2), 5)
    want = torch.full((16,), 9).to(dtype)
    want[torch.tensor([0, 2, 4, 6])] = source[torch.tensor([5, 8, 11, 14])] * 2
    want[1] = 5
    assert torch.equal(out, want)


@pytest.mark.parametrize(
    ("source", "out", "what"),
    [
        (torch.ones(30), torch.ones(64)[::4], "gl.store"),
        (torch.ones(25), torch.ones(16), "gl.load"),
        (torch.ones(30, 2)[:, 0], torch.ones(16), "gl.load"),
    ],
    ids=["into a gap", "past the end", "from a gap"],
)
def test_an_access_outside_of_a_tensor_raises(load, source, out, what):
    with pytest.raises(EmulationError, match=f"{what} outside the tensor"):
        load(POINTERS).kernel[(1,)](source, out, 8, (3, 2), 5)


def test_programs_draw_every_number_once(load):
    source = """
@gluon.jit(do_not_specialize=["n"])
def kernel(counter, drawn, n):
    i = gl.program_id(0)
    while i < n:
        gl.store(drawn + i, gl.load(drawn + i) + gl.program_id(0) + 1)
        i = gl.atomic_add(counter, 1, sem="relaxed") + gl.num_programs(0)
    if gl.atomic_add(counter + 1, 1) == gl.num_programs(0) - 1:
        gl.store(counter, 0)
"""
    counter, drawn = torch.zeros(2, dtype=torch.int32), torch.zeros(20, dtype=torch.int64)
    load(source).kernel[(3,)](counter, drawn, 20)
    assert counter.tolist() == [0, 3]
    assert set(drawn.tolist()) == {1, 2, 3}


def test_integers_are_those_of_the_gpu(load):
    source = """
@gluon.jit(do_not_specialize=["x", "y"])
def kernel(out, x, y):
    zero = 0
    gl.store(out, x // y)
    gl.store(out + 1, x % y)
    gl.store(out + 2, (zero - 7) // 2)
    zero %= 5
    zero -= 7
    zero //= 2
    gl.store(out + 3, zero)
    gl.store(out + 4, x.to(gl.uint32) < y.to(gl.uint32))
    gl.store(out + 5, x.to(gl.uint32, bitcast=True).to(gl.int64))
    gl.store(out + 6, (x + 0x7fffffff + 0x7fffffff).to(gl.int64))
    gl.store(out + 7, x.to(gl.int64) * 0x7fffffff)
    gl.store(out + 8, gl.minimum(x, -9) * gl.maximum(3, y) + gl.where(x < 0, 100, 200))
    gl.store(out + 9, (x >> 1).to(gl.int16) & 0xff)
    for i in range(x, 0, 3):
        zero = i // 2
    gl.store(out + 10, zero)
    gl.store(out + 11, gl.cdiv(10, y))

def on_host():
    return [-7 // 2, [i // 2 for i in range(-3, 0)]]
"""
    module, out = load(source), torch.zeros(12, dtype=torch.int64)
    module.kernel[(1,)](out, -7, 2)
    wrapped = (-7 + 2 * 0x7FFFFFFF + 2**31) % 2**32 - 2**31
    want = [-3, -1, -3, -3, 0, 2**32 - 7, wrapped, -7 * 0x7FFFFFFF, -9 * 3 + 100, 252, 0, 5]
    assert out.tolist() == want
    assert module.on_host() == [-4, [-2, -1, -1]]


def test_an_argument_that_is_one_is_a_constant(load):
    source = """
@gluon.jit(do_not_specialize=["free"])
def kernel(out, free, bound):
    gl.store(out, free.to(gl.int64) + bound.to(gl.int64))
"""
    kernel, out = load(source).kernel, torch.zeros(1, dtype=torch.int64)
    kernel[(1,)](out, 1, 2)
    assert out.item() == 3
    with pytest.raises(AttributeError):
        kernel[(1,)](out, 2, 1)


def test_arrays_keep_their_order_through_shapes_and_packing(load):
    source = """
@gluon.jit
def kernel(x_ptr, packed_ptr, back_ptr, halves_ptr, stats_ptr):
    i, j = gl.arange(0, 4), gl.arange(0, 8)
    x = gl.load(x_ptr + i[:, None] * 8 + j[None, :])
    low, high = gl.split(gl.reshape(x, [4, 4, 2]))
    packed = gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high],
                                       dtype=gl.int32, is_pure=True, pack=1)
    gl.store(packed_ptr + i[:, None] * 4 + i[None, :], packed)
    pair = gl.join(packed.to(gl.int16).to(gl.bfloat16, bitcast=True),
                   (packed >> 16).to(gl.int16).to(gl.bfloat16, bitcast=True))
    gl.store(back_ptr + i[:, None] * 8 + j[None, :], gl.reshape(pair, [4, 8]))
    left, right = gl.split(gl.permute(gl.reshape(x, [4, 2, 4]), (0, 2, 1)))
    gl.store(halves_ptr + i[:, None] * 4 + i[None, :], left - right)
    gl.store(stats_ptr + i, gl.max(x, 1))
    gl.store(stats_ptr + 4 + i, gl.sum(x, axis=1))
    gl.store(stats_ptr + 8 + i, gl.log2(gl.exp2(gl.max(x, 1))))
"""
    x, packed = random(4, 8, dtype=torch.float32), torch.zeros(4, 4, dtype=torch.int32)
    back, halves = torch.zeros(4, 8, dtype=torch.bfloat16), torch.zeros(4, 4)
    stats = torch.zeros(3, 4)
    load(source).kernel[(1,)](x, packed, back, halves, stats)
    assert torch.equal(back, x.bfloat16())
    assert torch.equal(packed.view(torch.bfloat16), x.bfloat16())
    assert torch.equal(halves, x[:, :4] - x[:, 4:])
    assert torch.equal(stats[0], x.amax(1))
    torch.testing.assert_close(stats[1:], torch.stack([x.sum(1), x.amax(1)]))


SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 65519.9, 65520.0, 1e-40, 6e-8, 3e-8]


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=repr)
def test_rounding_is_that_of_torch(dtype):
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint32)
    # Half-way between two numbers of 16 bits, and its neighbours.
    ties = (bits & np.uint32(0xFFFF0000)) + np.uint32(0x7FFF) + np.arange(len(bits)) % 3
    small = np.random.default_rng(1).standard_normal(100_000, np.float32)
    values = [bits, ties.astype(np.uint32), (small.view(np.uint32) & 0xFFFFE000) | 0x1000]
    floats = [x.astype(np.uint32).view(np.float32) for x in values]
    given = np.concatenate([*floats, small, np.array(SPECIAL, np.float32)])
    with np.errstate(all="ignore"):
        got = torch.from_numpy(round_to(given, dtype))
    want = torch.from_numpy(given).to(getattr(torch, dtype.name)).float()
    assert torch.equal(got.isnan(), want.isnan())
    whole = ~want.isnan()
    assert torch.equal(got[whole].view(torch.int32), want[whole].view(torch.int32))


def test_shared_memory_that_nobody_wrote_is_nan(load):
    source = """
@gluon.jit
def kernel(out):
    tile = gl.allocate_shared_memory(gl.float32, [2, 8, 4], None)
    tile.index(1).slice(2, 4).store(gl.zeros([4, 4], gl.float32))
    offsets = gl.arange(0, 8)[:, None] * 4 + gl.arange(0, 4)[None, :]
    gl.store(out + offsets, tile.index(1).load(None))
"""
    out = torch.zeros(8, 4)
    load(source).kernel[(1,)](out)
    assert out[2:6].eq(0).all() and out.isnan().sum() == 16


AGGREGATE = """
@aggregate
class Pair:
    pointer: gl.tensor
    n: gl.tensor

    @gluon.constexpr_function
    def __init__(self, pointer, n):
        self.pointer = pointer
        self.n = n

    @gluon.jit
    def half(self):
        return (0 - self.n) // 2

@gluon.jit
def kernel(out, n):
    pair = Pair(out, n)
    gl.store(pair.pointer, pair.half())
"""


def test_an_aggregate_has_methods_and_typed_fields(load):
    module, out = load(AGGREGATE), torch.zeros(1, dtype=torch.int32)
    module.kernel[(1,)](out, 7)
    assert out.item() == -3
    with pytest.raises(TypeError, match=r"Pair\.n must be"):
        module.kernel[(1,)](out, 1)


def test_a_file_may_import_its_neighbours(tmp_path):
    package = tmp_path / "kernels" / "deep"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").write_text("raise RuntimeError('a package was executed')")
    (package.parent / "numbers.py").write_text("from triton.experimental import gluon\nTWO = 2\n")
    body = "@gluon.jit\ndef double(x):\n    return x * TWO\n"
    imports = "from triton.experimental import gluon\nfrom ..numbers import TWO\n"
    (package / "parts.py").write_text(imports + body)
    kernel = "from .parts import double\n@gluon.jit\ndef kernel(out):\n"
    kernel += "    gl.store(out, double(gl.load(out)))\n"
    (package / "main.py").write_text(IMPORTS + kernel)
    for replace, want in (({}, 6), ({"x * TWO": "x * TWO + 1"}, 7)):
        out = torch.full((1,), 3, dtype=torch.int32)
        load_module(package / "main.py", replace).kernel[(1,)](out)
        assert out.item() == want


@pytest.mark.parametrize(
    ("fragment", "times"), [("no such text", 0), ("bars.index(i)", 1), ("slot = i % STAGES", 2)]
)
def test_a_replaced_fragment_must_occur_once(load, fragment, times):
    if times == 1:
        load(PIPELINE, {fragment: fragment})
        return
    with pytest.raises(ValueError, match=f"occurs {times} times"):
        load(PIPELINE, {fragment: ""})


def test_loading_leaves_the_process_as_it_was(load, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    modules, path, meta_path = dict(sys.modules), list(sys.path), list(sys.meta_path)
    run_pipeline(load(PIPELINE))
    with pytest.raises(ZeroDivisionError):
        load("1 / 0")
    assert sys.modules == modules
    assert sys.path == path and sys.meta_path == meta_path
    assert "TRITON_INTERPRET" not in os.environ


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("mbarrier.arrive(bar, count=1)\n    mbarrier.arrive(bar, count=2)", "over-arrive"),
        ("mbarrier.arrive(bar, count=3)", "over-arrive"),
        ("mbarrier.wait(bar, 2)", "parity"),
        ("mbarrier.invalidate(bar)\n    mbarrier.arrive(bar)", "before mbarrier.init"),
        ("mbarrier.wait(bar, 0)", "deadlock: kernel of program"),
        ("gl.load(out).load(None)", "no attribute 'load'"),
    ],
)
def test_a_misused_barrier_raises(load, body, message):
    source = f"""
@gluon.jit
def kernel(out):
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=2)
    mbarrier.wait(bar, 1)
    {body}
"""
    with pytest.raises((EmulationError, AttributeError), match=message):
        load(source).kernel[(1,)](torch.zeros(1))


def test_unknown_assembly_raises(load):
    source = """
@gluon.jit
def kernel(out):
    gl.inline_asm_elementwise("add.s32 $0, $1, 1;", "=r,r", [gl.arange(0, 128)], dtype=gl.int32,
                              is_pure=True, pack=1)
"""
    with pytest.raises(NotImplementedError, match=r"add\.s32"):
        load(source).kernel[(1,)](torch.zeros(1))
