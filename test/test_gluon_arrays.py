"""The Gluon emulator's arithmetic, shapes, and global and shared memory are those of the GPU."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gluon_emulator import EmulationError
from gluon_source import Load, loader, random
from gluon_types import BFLOAT16, FLOAT16, round_to


@pytest.fixture
def load(tmp_path: Path) -> Load:
    return loader(tmp_path)


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
