"""Packed documents through the Triton kernels, whose tables are filled on the device.

On a CPU the kernels run in Triton's interpreter. With a GPU all ranks share it, and messages pass
through host memory.
"""

from functools import cache
from itertools import pairwise

import pytest
import torch

import oracle
from packed_cases import PackedCase, packed_errors, packed_grid
from ranks import run_ranks
from ring_cases import TENSORS
from ring_flash_attn.backends import hopper
from ring_flash_attn.backends.missed import mark_in_one_pass
from ring_flash_attn.core.attention import Attention
from ring_flash_attn.core.function import Call, run_backward, run_forward
from ring_flash_attn.core.packed import Documents, on_device, plan_packed

pytestmark = [
    pytest.mark.kernel,
    # Triton's interpreter: a loop whose bound is an argument.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]

FLOAT32_BOUND = 2e-5


def fewer_heads(case: PackedCase) -> PackedCase:
    """Halve a ring's heads, which halves the interpreter's minutes; two a key head stay two."""
    keeps = case.layout == "gather" or case.packing == "several"
    return case if keeps else case._replace(heads=2, key_heads=1)


# The interpreter takes seconds a case; the reference backend runs the whole grid.
CASES = [
    fewer_heads(case)
    for case in packed_grid()
    if (case.packing, case.mask)
    in (
        ("one", "causal-window"),
        ("several", "causal"),
        ("several", "window"),
        ("tiny", "causal-window"),
        ("odd", "causal"),
    )
]
HALF_CASES = [
    PackedCase("contiguous", "odd", "causal"),
    PackedCase("zigzag", "several", "causal", heads=4, key_heads=1, head_dim=32),
    PackedCase("zigzag", "tiny", "causal-window", heads=3, key_heads=3),
    PackedCase("stripe", "odd", "window"),
    PackedCase("gather", "several", "causal", heads=8, key_heads=4, heads_k_stride=2),
]


@cache
def measured(world_size: int, dtype: torch.dtype):
    cases = CASES if dtype == torch.float32 else HALF_CASES
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args = (world_size, cases, "triton", dtype, device)
    return run_ranks(world_size, packed_errors, *args, timeout_s=550)


@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(case) for case in CASES])
@pytest.mark.parametrize("world_size", [2], ids=lambda n: f"P{n}")
def test_float32_documents_equal_dense(world_size: int, index: int):
    for rank, errors in enumerate(measured(world_size, torch.float32)):
        for tensor in TENSORS:
            assert errors[index][tensor].ours.max_abs < FLOAT32_BOUND, f"{tensor} on rank {rank}"


@pytest.mark.parametrize("index", range(len(HALF_CASES)), ids=[str(case) for case in HALF_CASES])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_documents_err_at_most_twice_as_much_as_dense(dtype, index: int):
    ranks = [errors[index] for errors in measured(2, dtype)]
    for tensor in TENSORS:
        for measure in ("max_abs", "rmse"):
            ours = max(getattr(rank[tensor].ours, measure) for rank in ranks)
            dense = max(getattr(rank[tensor].dense, measure) for rank in ranks)
            assert ours <= 2 * dense + 1e-5, f"{tensor}, {measure}"


class OneRank:
    """Documents on one device, in one pair of layout and mask: what a ring of one computes."""

    def __init__(self, lengths, device, dtype, head_dim, mask=(True, (-1, -1)), layout="stripe"):
        from ring_flash_attn.backends.triton import TritonBackend

        self.edges = oracle_edges(lengths)
        rows = self.edges[-1]
        generator = torch.Generator().manual_seed(0)

        def normal(count):
            return torch.randn(1, rows, count, head_dim, generator=generator).to(device, dtype)

        self.tensors = [normal(n) for n in (4, 2, 2, 4)]
        self.cu_seqlens = torch.tensor(self.edges, dtype=torch.int32, device=device)
        self.attention = Attention(head_dim**-0.5, *mask)
        self.plan = plan_packed(self.attention, layout, 1, 0)
        self.backend = TritonBackend()

    def run(self, tensors):
        q, k, v, dout = tensors
        rows = q.shape[1]
        documents = Documents(self.cu_seqlens, self.cu_seqlens, rows, rows)
        call = Call(self.attention, on_device(self.plan, documents), self.backend)
        out, lse = run_forward(call, q, k, v)
        return (out, lse.transpose(1, 2), *run_backward(call, dout, q, k, v, out, lse))


def oracle_edges(lengths):
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


def assert_same(name, x, y):
    """Compare bit for bit, but for the Hopper backward's dq, which is summed in any order."""
    if name == "dq" and hopper.WANTED:
        torch.testing.assert_close(x, y)
    else:
        assert torch.equal(x, y), name


# The interpreter is numpy, which warns of what is put in here on purpose.
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("poisoned", range(4))
@pytest.mark.parametrize("mask", [(True, (-1, -1)), (False, (9, 3)), (False, (-1, -1))], ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
def test_nan_in_one_document_leaves_the_others_bitwise_equal(device, head_dim, mask, poisoned):
    if device.type == "cpu" and head_dim > 16:
        pytest.skip("the interpreter has one tile size for every width")
    on_cpu = device.type == "cpu"
    lengths = (18, 3, 30, 7) if on_cpu else (300, 6, 778, 130)
    given = OneRank(lengths, device, torch.bfloat16, head_dim, mask)
    clean = given.run(given.tensors)
    begin, end = given.edges[poisoned : poisoned + 2]
    for value in (torch.nan,) if on_cpu else (torch.nan, torch.inf):
        tensors = [x.clone() for x in given.tensors]
        for x in tensors:
            x[:, begin:end] = value
        got = given.run(tensors)
        others = torch.ones(given.edges[-1], dtype=torch.bool, device=device)
        others[begin:end] = False
        for name, x, y in zip(TENSORS, got, clean, strict=True):
            assert_same(name, x[:, others], y[:, others])
            assert x[:, others].isfinite().all()
        assert got[0][:, begin:end].isnan().any(), "the poison was read"


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_rows_of_no_document_are_zero(device):
    given = OneRank((12, 20), device, torch.float32, 16)
    more = [torch.cat([x, torch.full_like(x[:, :7], torch.nan)], 1) for x in given.tensors]
    got, clean = given.run(more), given.run(given.tensors)
    for name, x, y in zip(TENSORS, got, clean, strict=True):
        assert torch.equal(x[:, :32], y), name
        assert (x[:, 32:] == (-torch.inf if name == "lse" else 0)).all(), name


def test_an_odd_length_that_nobody_checked_is_loud_in_zigzag(device):
    given = OneRank((12, 7, 20), device, torch.float32, 16, layout="zigzag")
    for x in given.run(given.tensors):
        assert x[:, 18].isnan().all()
        x[:, 18] = 0
        assert x.isfinite().all()


@pytest.mark.parametrize("lengths", [(7,), (64, 1, 0, 129, 3), (2,) * 70], ids=str)
@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("units", [1, 2])
def test_rows_that_no_document_covers_are_marked_and_no_others(device, lengths, start, units):
    edges = [start, *(start + sum(lengths[: i + 1]) for i in range(len(lengths)))]
    total = edges[-1] + 9  # rows of no document, which have tiles
    cu = torch.tensor(edges, dtype=torch.int32, device=device)
    plan = plan_packed(Attention(1.0), "zigzag" if units == 2 else "stripe", 2, 0)
    rows = torch.zeros(1, total, 3, 24, dtype=torch.bfloat16, device=device)
    lse = torch.zeros(1, 3, total, device=device)
    mark_in_one_pass(on_device(plan, Documents(cu, cu, total, total)), rows, lse)
    missed = [*range(start)]
    missed += [end - 1 for begin, end in pairwise(edges) if units == 2 and (end - begin) % 2]
    want = torch.zeros(total, dtype=torch.bool, device=device)
    want[missed] = True
    assert torch.equal(rows.isnan(), want[None, :, None, None].expand(rows.shape))
    assert torch.equal(lse.isnan(), want[None, None].expand(lse.shape))
    assert not rows.nan_to_num().any() and not lse.nan_to_num().any()


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 80])
def test_a_packed_call_never_waits_for_the_gpu(head_dim):
    given = OneRank((3000, 1, 64, 999, 4032), torch.device("cuda"), torch.bfloat16, head_dim)
    first = given.run(given.tensors)  # compiles, and uploads the plan
    torch.cuda.set_sync_debug_mode("error")  # from here on torch raises where the host waits
    try:
        again = given.run(given.tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, x, y in zip(TENSORS, again, first, strict=True):
        assert_same(name, x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("mask", [(True, (-1, -1)), (True, (700, 0)), (False, (-1, -1))], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 80, 256])
def test_long_documents_on_a_gpu(head_dim, mask):
    """Against dense float64, document by document, within twice a bf16 computation's errors."""
    lengths = (2000, 2, 130, 900, 1064)
    device = torch.device("cuda")
    given = OneRank(lengths, device, torch.bfloat16, head_dim, mask)
    got = given.run(given.tensors)
    for begin, end in zip(given.edges[:-1], given.edges[1:], strict=True):
        q, k, v, dout = (x[:, begin:end] for x in given.tensors)
        seen = oracle.visible(range(end - begin), range(end - begin), *mask, device=device)
        scale = given.attention.softmax_scale
        wide = [x.double() for x in (q, k, v)]
        want = oracle.chunked(*wide, seen, dout.double(), None, scale)
        dense = oracle.dense_in_dtype(q, k, v, seen, dout, None, scale)
        out, lse, dq, dk, dv = (x[:, begin:end] for x in got)
        ours = oracle.Result(out, lse.transpose(1, 2), dq, dk, dv)
        assert not oracle.beyond_bound(ours, want, dense)
