"""The Gluon emulator runs partitions as a GPU does, and finds the bugs that it claims to find."""

import os
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from gluon_emulator import Deadlock, EmulationError, load_module
from gluon_source import IMPORTS, Load, loader, random

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


@pytest.fixture
def load(tmp_path: Path) -> Load:
    return loader(tmp_path)


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
