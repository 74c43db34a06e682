"""`deterministic=True`: out, lse and gradients are bitwise equal, run after run.

On a Hopper GPU 100 runs, by themselves and on several ranks over both exchanges, which are late now
and then and share GPUs if need be. On the CPU two, in Triton's interpreter.
"""

import random

import pytest
import torch

from ranks import gpu_of, gpu_transport, run_ranks
from ring_flash_attn import packed_attention, ring_attention

pytestmark = pytest.mark.kernel
NAMES = ("out", "lse", "dq", "dk", "dv")
GPUS = torch.cuda.device_count()
HOPPER = GPUS > 0 and torch.cuda.get_device_capability(0) == (9, 0)
LENGTHS = (1030, 2, 640, 376)  # local rows of each document: more than one tile of keys
SMALL_LENGTHS = (18, 2, 12)
WINDOWS = [(-1, -1), (300, 0)]


def call(leaves, dout, packed, layout, window, exchange):
    """Return out, lse, dq, dk, dv of one call, all of them copies.

    Args:
        leaves: q, k, v, as dout [1, L, heads, D]; L is the sum of `packed`, local lengths, if any.
    """
    leaves = [x.detach().requires_grad_() for x in leaves]
    options = {"layout": layout, "backend": "triton", "causal": True, "window_size": window}
    options |= {"deterministic": True, "exchange": exchange}
    if packed:
        edges = [sum(packed[:n]) for n in range(len(packed) + 1)]
        cu_seqlens = torch.tensor(edges, dtype=torch.int32, device=dout.device)
        rows = [x[0] for x in leaves]
        out, lse = packed_attention(*rows, cu_seqlens, max(packed), **options)
        dout = dout[0]
    else:
        out, lse = ring_attention(*leaves, **options)
    return [x.detach().clone() for x in (out, lse, *torch.autograd.grad(out, leaves, dout))]


def differing(rank, device_type, runs, head_dim, lengths, packed, layout, window, exchange):
    """Return which results of later runs differ from the first one's on this rank, and in which."""
    device = gpu_of(rank) if device_type == "cuda" else torch.device("cpu")
    generator = torch.Generator().manual_seed(rank)
    dtype = torch.bfloat16 if device_type == "cuda" else torch.float32
    q, k, v, dout = (
        torch.randn(1, sum(lengths), heads, head_dim, generator=generator).to(device, dtype)
        for heads in (4, 2, 2, 4)
    )
    given = (q, k, v), dout, lengths if packed else (), layout, window, exchange
    first = call(*given)
    assert all(x.isfinite().all() for x in first)
    random.seed(rank)
    found = []
    for run in range(1, runs):
        if device_type == "cuda":
            torch.cuda._sleep(random.randrange(1000, 500_000))
        again = call(*given)
        pairs = zip(NAMES, first, again, strict=True)
        found += [f"{name} in run {run}" for name, x, y in pairs if not torch.equal(x, y)]
    return found


def check(size, transport, *given):
    found = run_ranks(size, differing, *given, transport=transport)
    assert found == [[]] * size, found


@pytest.mark.skipif(GPUS > 0, reason="Triton's interpreter is for machines without a GPU")
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_on_the_cpu(packed):
    check(1, "gloo", "cpu", 2, 16, SMALL_LENGTHS, packed, "contiguous", (-1, -1), "ring")


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_hundred_runs(head_dim, packed, window):
    check(1, "nccl", "cuda", 100, head_dim, LENGTHS, packed, "contiguous", window, "ring")


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("exchange", ["ring", "copy-engine"])
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("size", [2, 4])
def test_a_hundred_runs_on_several_ranks(size, head_dim, packed, exchange):
    check(
        size,
        gpu_transport(size),
        "cuda",
        100,
        head_dim,
        LENGTHS,
        packed,
        "zigzag",
        (-1, -1),
        exchange,
    )
