"""Measure native and Triton ring attention against the truth, on this rank's group.

What `test_ring_flash_attn_comparison.py` and `quick_test_triton.py` run: errors of out, lse, dq,
dk, dv over the whole sequence, throughput, latency and peak memory. Runs on any device.
"""

import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

import oracle

TENSORS = ("out", "lse", "dq", "dk", "dv")
IMPLEMENTATIONS = ("native", "triton")
MASKS = {"causal": (True, (-1, -1)), "full": (False, (-1, -1)), "window": (True, None)}


@dataclass(frozen=True)
class Settings:
    """Sizes and choices of one comparison; equal on every rank."""

    global_len: int
    heads: int
    key_heads: int
    head_dim: int
    batch: int
    dtype: torch.dtype
    layouts: tuple[str, ...]
    masks: tuple[str, ...]
    repeats: int
    truth: str
    inject: str | None = None
    implementations: tuple[str, ...] = IMPLEMENTATIONS

    def mask(self, name: str) -> tuple[bool, tuple[int, int]]:
        """Return (causal, window_size); the window is a quarter of the sequence."""
        causal, window = MASKS[name]
        return causal, (self.global_len // 4, 0) if window is None else window


class Place(NamedTuple):
    """Where this rank runs."""

    rank: int
    world_size: int
    device: torch.device
    transport: str


class ErrorRow(NamedTuple):
    """Errors of one tensor over the whole sequence, and the bound on the relative error.

    `of_one_device`: the relative error over that of the same kernels on one device; NaN if that
    did not run.
    """

    mask: str
    implementation: str
    layout: str
    tensor: str
    max_abs: float
    rmse: float
    relative: float
    bound: float
    of_one_device: float

    @property
    def passed(self) -> bool:
        return self.relative <= self.bound


class SpeedRow(NamedTuple):
    """Median time of one pass, slowest rank; peak memory beyond the inputs, largest rank."""

    implementation: str
    layout: str
    passes: str
    ms: float
    tokens_per_s: float
    tflops_per_device: float
    peak_mib: float


def join() -> Place:
    """Join the group that torchrun describes (one rank without torchrun).

    nccl where every rank has a GPU of its own; else gloo: on the CPU, or, with more ranks than
    GPUs, on shared GPUs with messages staged through the host.
    """
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29531")
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    gpus = torch.cuda.device_count()
    timeout = timedelta(seconds=300)
    if gpus == 0:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timeout)
        return Place(rank, size, torch.device("cpu"), "gloo")
    device = torch.device("cuda", local % gpus)
    torch.cuda.set_device(device)
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= gpus:
        dist.init_process_group(
            "nccl", rank=rank, world_size=size, device_id=device, timeout=timeout
        )
        return Place(rank, size, device, "nccl")
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timeout)
    return Place(rank, size, device, "gloo through host memory")


def refusals(settings: Settings, place: Place) -> dict[str, str]:
    """Return which implementations do not run these settings here, and why."""
    from ring_flash_attn.core.api import local_forward

    found = {}
    for name in IMPLEMENTATIONS:
        q = torch.zeros(1, 2, settings.heads, settings.head_dim, device=place.device)
        k = q[:, :, : settings.key_heads]
        try:
            local_forward(*(x.to(settings.dtype) for x in (q, k, k)), name)
        except NotImplementedError as error:
            found[name] = str(error)
    return found


class Compared(NamedTuple):
    """The whole sequence, the truth about it, and what a dense computation in its dtype gives."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    truth: oracle.Result
    bounds: dict[str, float]


def prepare(settings: Settings, mask: str, device: torch.device) -> Compared:
    """Draw the sequence, equal on every rank, and compute the truth and the bounds."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int) -> torch.Tensor:
        shape = settings.batch, settings.global_len, heads, settings.head_dim
        return torch.randn(shape, generator=generator, device=device).to(settings.dtype)

    q, k, v = (normal(h) for h in (settings.heads, settings.key_heads, settings.key_heads))
    dout = normal(settings.heads)
    causal, window = settings.mask(mask)
    if settings.truth == "flash":
        truth = one_device("native", q, k, v, dout, causal, window)
        # Two computations that each err by about 2.5e-3 (bfloat16) against the truth.
        bound = {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(settings.dtype, 1e-4)
        return Compared(q, k, v, dout, truth, dict.fromkeys(TENSORS, bound))
    everyone = list(range(settings.global_len))
    seen = oracle.visible(everyone, everyone, causal, window, device)
    truth = oracle.chunked(*(x.double() for x in (q, k, v)), seen, dout.double())
    dense = oracle.dense_in_dtype(q, k, v, seen, dout)
    bounds = {
        name: 2 * oracle.errors(x, y).relative + 1e-5
        for name, x, y in zip(TENSORS, dense, truth, strict=True)
    }
    return Compared(q, k, v, dout, truth, bounds)


def one_device(name: str, q, k, v, dout, causal: bool, window: tuple[int, int]) -> oracle.Result:
    """Return what an implementation's kernels give for the whole sequence on one device."""
    from ring_flash_attn.core.api import local_backward, local_forward

    masked = {"causal": causal, "window_size": window}
    out, lse = local_forward(q, k, v, name, **masked)
    return oracle.Result(out, lse, *local_backward(dout, q, k, v, out, lse, name, **masked))


def ring_func(implementation: str, layout: str) -> Callable:
    """Return the public function that a user would call."""
    import ring_flash_attn

    stem = {"contiguous": "ring", "zigzag": "zigzag_ring", "stripe": "stripe"}[layout]
    prefix = "triton_" if implementation == "triton" else ""
    return getattr(ring_flash_attn, f"{prefix}{stem}_flash_attn_func")


def compare(settings: Settings, place: Place, mask: str) -> list[ErrorRow]:
    """Return the errors of every implementation and layout under one mask."""
    compared = prepare(settings, mask, place.device)
    causal, window = settings.mask(mask)
    whole = (compared.q, compared.k, compared.v, compared.dout)
    rows = []
    for name in settings.implementations:
        alone = one_device(name, *whole, causal, window)
        single = {
            tensor: _errors(x, y, place)
            for tensor, x, y in zip(TENSORS, alone, compared.truth, strict=True)
        }
        rows += [
            ErrorRow(mask, name, "one device", t, *single[t], compared.bounds[t], 1.0)
            for t in TENSORS
        ]
        del alone
        for layout in settings.layouts:
            got = _sharded(settings, place, name, layout, whole, causal, window)
            for tensor, x, y in zip(TENSORS, got, compared.truth, strict=True):
                dim = 2 if tensor == "lse" else 1
                want = oracle.shard(y, layout, place.world_size, place.rank, dim)
                errors = _over_ranks(x, want, place)
                ratio = errors.relative / max(single[tensor].relative, 1e-30)
                rows.append(
                    ErrorRow(mask, name, layout, tensor, *errors, compared.bounds[tensor], ratio)
                )
    return rows


def _sharded(settings, place, name, layout, whole, causal, window) -> oracle.Result:
    """Run the ring on this rank's shard; `inject` spoils one gradient of the Triton ring."""
    q, k, v, dout = (oracle.shard(x, layout, place.world_size, place.rank) for x in whole)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse, _ = ring_func(name, layout)(
        *leaves, causal=causal, window_size=window, return_attn_probs=True
    )
    grads = torch.autograd.grad(out, leaves, dout)
    got = oracle.Result(out.detach(), lse.detach(), *grads)
    if settings.inject and name == "triton":
        got = got._replace(**{settings.inject: getattr(got, settings.inject) * 1.01})
    return got


def _errors(got: torch.Tensor, want: torch.Tensor, place: Place) -> oracle.Errors:
    """Return the errors; all inf, and a printed reason, where a NaN or a wrong -inf is found."""
    try:
        return oracle.errors(got, want)
    except AssertionError as error:
        print(f"rank {place.rank}: {error}", flush=True)
        return oracle.Errors(math.inf, math.inf, math.inf)


def _over_ranks(got: torch.Tensor, want: torch.Tensor, place: Place) -> oracle.Errors:
    """Return the errors over every rank's rows; a NaN or a wrong -inf on any rank is inf."""
    mine = _errors(got, want, place)
    usable = math.isfinite(mine.max_abs)
    finite = torch.where(want == -torch.inf, 0.0, want).double()
    sums = torch.tensor(
        [mine.rmse**2 * want.numel() if usable else math.inf, float(finite.norm()) ** 2]
    ).double()
    largest = torch.tensor([mine.max_abs]).double()
    on = place.device if place.transport == "nccl" else torch.device("cpu")
    sums, largest = sums.to(on), largest.to(on)
    dist.all_reduce(sums)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    wrong, size = sums.tolist()
    rmse = math.sqrt(wrong / (want.numel() * place.world_size))
    return oracle.Errors(largest.item(), rmse, math.sqrt(wrong / size) if size else math.inf)


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
            lambda: one_device(name, q, k, v, dout, causal, window),
        )
    func = ring_func(name, layout)

    def forward() -> torch.Tensor:
        return func(q, k, v, causal=causal, window_size=window)

    return forward, lambda: torch.autograd.grad(forward(), (q, k, v), dout)


def seen_area(length: int, causal: bool, window: tuple[int, int]) -> float:
    """Return how many (query, key) pairs a mask keeps; half of all if plain causal."""
    left, right = window
    if causal and left < 0:
        return length * length / 2
    ahead = 0 if causal else (length if right < 0 else right)
    back = length if left < 0 else left
    return float(sum(min(i, back) + 1 + min(length - 1 - i, ahead) for i in range(length)))


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
