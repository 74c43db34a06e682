"""The Gluon emulator's copies by TMA, fences, mbarriers, named barriers and inline assembly."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gluon_emulator import Deadlock, EmulationError
from gluon_memory import TensorDescriptor
from gluon_source import Load, loader, random


@pytest.fixture
def load(tmp_path: Path) -> Load:
    return loader(tmp_path)


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
