"""Time native and Triton ring attention: latency, throughput and peak memory, on any device."""

import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from comparison import Place, Settings, one_device, ring_func, seen_area


class SpeedRow(NamedTuple):
    """Median time of one pass, slowest rank; peak memory beyond the inputs, largest rank."""

    implementation: str
    layout: str
    passes: str
    ms: float
    tokens_per_s: float
    tflops_per_device: float
    peak_mib: float


def time_rings(settings: Settings, place: Place, mask: str) -> list[SpeedRow]:
    """Time every ring, and the same kernels on one device with the whole sequence to itself."""
    rows = []
    for name in settings.implementations:
        for layout in ("one device", *settings.layouts):
            sharers = 1 if layout == "one device" else place.world_size
            forward, both = _passes(settings, place, mask, name, layout)
            causal, window = settings.mask(mask)
            area = seen_area(settings.global_len, causal, window) / sharers
            flops = 4 * settings.batch * settings.heads * area * settings.head_dim
            for passes, run, factor in (("fwd", forward, 1), ("fwd+bwd", both, 3.5)):
                ms, peak = _measure(run, settings.repeats, place)
                tokens = settings.batch * settings.global_len / ms * 1e3
                rows.append(
                    SpeedRow(name, layout, passes, ms, tokens, factor * flops / ms / 1e9, peak)
                )
    return rows


def _passes(settings: Settings, place: Place, mask: str, name: str, layout: str):
    """Return the forward and the forward + backward of one row of the table, as calls."""
    from ring_flash_attn.core.api import local_forward

    causal, window = settings.mask(mask)
    sharers = 1 if layout == "one device" else place.world_size

    def normal(heads: int) -> torch.Tensor:
        shape = settings.batch, settings.global_len // sharers, heads, settings.head_dim
        return torch.randn(shape, device=place.device).to(settings.dtype).requires_grad_()

    q, k, v = (normal(h) for h in (settings.heads, settings.key_heads, settings.key_heads))
    dout = normal(settings.heads).detach()
    if layout == "one device":
        return (
            lambda: local_forward(q, k, v, name, causal=causal, window_size=window),
            lambda: one_device(name, (q.shape[1],), q, k, v, dout, causal, window),
        )
    func = ring_func(name, layout)

    def forward() -> torch.Tensor:
        return func(q, k, v, causal=causal, window_size=window)

    return forward, lambda: torch.autograd.grad(forward(), (q, k, v), dout)


def _measure(run: Callable, repeats: int, place: Place) -> tuple[float, float]:
    """Return (median ms of the slowest rank, largest peak MiB), the host waiting for each run."""
    cuda = place.device.type == "cuda"
    for _ in range(3 if cuda else 1):
        run()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    dist.barrier()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if cuda else math.nan
    result = torch.tensor([statistics.median(times), peak]).double()
    result = result.to(place.device if place.transport == "nccl" else "cpu")
    dist.all_reduce(result, op=dist.ReduceOp.MAX)
    ms, peak = result.tolist()
    return ms, peak
