"""A thousand calls need no more memory than fifty: of the GPU, of the host, of the interpreter.

Everything that the library keeps (exchanges, buffers, tables, prepared launches) it keeps by shape,
so after the first calls of a shape nothing may be added.
"""

import gc
import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from ranks import run_ranks
from ring_flash_attn import packed_attention, ring_attention

DOCUMENTS = (30, 2, 96)  # local lengths
LENGTH = sum(DOCUMENTS)
MIB = 2**20
# What the driver hands out comes in pages of 2 MiB; one may be opened late.
DRIVER_BOUND = 4 * MIB
# torch reserves small tensors' memory in as large pieces, and needs another where a tensor of the
# call before has not been freed in time: `allocated` shows a leak sooner.
RESERVED_BOUND = 4 * MIB
# glibc keeps freed memory by thread (autograd's, the process group's) and gives it back when it
# likes: up to some MiB. A leak of 32 KiB a call would pass this over 950 calls.
RSS_BOUND = 32 * MIB


class Amounts(NamedTuple):
    """What a process holds, in bytes or in pieces. Those of the GPU are 0 where there is none."""

    allocated: int
    reserved: int
    driver: int
    rss: int
    tensors: int
    objects: int


def measure(device: torch.device) -> Amounts:
    gc.collect()
    found = gc.get_objects()
    tensors = sum(1 for x in found if issubclass(type(x), torch.Tensor))
    rss = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if device.type != "cuda":
        return Amounts(0, 0, 0, rss, tensors, len(found))
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    gpu = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device), total - free
    return Amounts(*gpu, rss, tensors, len(found))


def grown(early: Amounts, late: Amounts, calls: int) -> list[str]:
    """Return what has grown over `calls` calls beyond its bound, as sentences; empty if nothing."""
    # One object in two calls is none that each call leaves behind.
    bounds = Amounts(0, RESERVED_BOUND, DRIVER_BOUND, RSS_BOUND, 0, calls // 2)
    return [
        f"{name}: {after - before} more after {calls} calls, from {before}"
        for name, before, after, bound in zip(Amounts._fields, early, late, bounds, strict=True)
        if after - before > bound
    ]


def one_call(packed: bool, backend: str, exchange: str, device: torch.device, leaves) -> None:
    for x in leaves:
        x.grad = None
    if packed:
        edges = [sum(DOCUMENTS[:n]) for n in range(len(DOCUMENTS) + 1)]
        cu_seqlens = torch.tensor(edges, dtype=torch.int32, device=device)
        rows = [x[0] for x in leaves]
        options = {"layout": "zigzag", "backend": backend, "causal": True, "exchange": exchange}
        out, _ = packed_attention(*rows, cu_seqlens, max(DOCUMENTS), **options)
    else:
        options = {"layout": "zigzag", "backend": backend, "causal": True, "exchange": exchange}
        out, _ = ring_attention(*leaves, **options)
    out.sum().backward()


def growth(
    rank: int,
    device_type: str,
    exchanges: tuple[str, ...],
    early: int,
    late: int,
    leak: str | None,
) -> list[str]:
    """Return what grows between call `early` and call `late`, of every exchange and form."""
    device = torch.device("cuda", rank) if device_type == "cuda" else torch.device("cpu")
    backend, dtype = ("triton", torch.bfloat16) if device.type == "cuda" else ("reference", None)
    torch.manual_seed(rank)
    shapes = [(1, LENGTH, heads, 64 if device.type == "cuda" else 8) for heads in (4, 2, 2)]
    leaves = [torch.randn(s, dtype=dtype, device=device, requires_grad=True) for s in shapes]
    complaints, kept = [], []
    for exchange in exchanges:
        for packed in (False, True):
            first = None
            for call in range(1, late + 1):
                one_call(packed, backend, exchange, device, leaves)
                if device.type == "cuda" and call % 10 == 0:
                    # The allocator takes a message's memory back when the GPU has sent it, so how
                    # much it holds depends on how far the host has run ahead.
                    torch.cuda.synchronize(device)
                if leak == "tensors":
                    kept.append(torch.zeros(1))
                if leak == "objects":
                    kept.append([])
                if leak == "rss":
                    kept.append(os.urandom(2 * RSS_BOUND // (late - early)))
                if call == early:
                    first = measure(device)
            assert first is not None
            last = measure(device)
            if rank == 0:
                print(exchange, "packed" if packed else "batch", first, last, flush=True)
            where = f"{exchange}, {'packed' if packed else 'batch'}, rank {rank}: "
            complaints += [where + each for each in grown(first, last, late - early)]
        dist.barrier()
    return complaints


def run(ranks: int, transport: str, *given, leak: str | None = None) -> list[str]:
    found = run_ranks(ranks, growth, *given, leak, transport=transport, timeout_s=500)
    return [complaint for each in found for complaint in each]


def test_nothing_grows_on_the_cpu():
    assert run(2, "gloo", "cpu", ("ring",), 40, 160) == []


@pytest.mark.parametrize("leak", ["tensors", "objects", "rss"])
def test_a_leak_is_found(leak: str):
    found = run(2, "gloo", "cpu", ("ring",), 15, 45, leak=leak)
    for form in ("batch", "packed"):
        assert any(form in x and leak in x for x in found), found


def test_growth_of_a_gpus_memory_is_told():
    before = Amounts(1000, 2000, 3000, 4000, 5, 6)
    assert grown(before, before, 950) == []
    assert grown(before, before._replace(allocated=1001), 950)[0].startswith("allocated")
    assert grown(before, before._replace(reserved=2000 + RESERVED_BOUND), 950) == []
    more = before._replace(reserved=2001 + RESERVED_BOUND)
    assert grown(before, more, 950)[0].startswith("reserved")
    assert grown(before, before._replace(driver=3000 + DRIVER_BOUND), 950) == []
    assert grown(before, before._replace(driver=3001 + DRIVER_BOUND), 950)[0].startswith("driver")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_nothing_grows_on_gpus():
    ranks = torch.cuda.device_count()
    assert run(ranks, "nccl", "cuda", ("ring", "copy-engine"), 50, 1000) == []
