"""Measure native and Triton ring attention against the truth, on this rank's group.

What `test_ring_flash_attn_comparison.py` and `quick_test_triton.py` run: errors of out, lse, dq,
dk, dv over the whole sequence, of batches and of packed documents. Runs on any device.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

import oracle
from comparison_packed import each_document, packed_arguments, rows_of
from quick_interpreter import quicken

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
    packed_layouts: tuple[str, ...]
    masks: tuple[str, ...]
    repeats: int
    truth: str
    inject: str | None = None
    implementations: tuple[str, ...] = IMPLEMENTATIONS

    def mask(self, name: str) -> tuple[bool, tuple[int, int]]:
        """Return (causal, window_size); the window is a quarter of the sequence."""
        causal, window = MASKS[name]
        return causal, (self.global_len // 4, 0) if window is None else window

    def packed(self, device: torch.device) -> "Settings":
        """Return the settings of packed documents: no batch, and on a CPU half the heads.

        Triton's interpreter needs twice as long for four documents as for one sequence.
        """
        heads, key_heads = self.heads, self.key_heads
        if device.type == "cpu" and key_heads % 2 == 0:
            heads, key_heads = heads // 2, key_heads // 2
        return replace(self, batch=1, heads=heads, key_heads=key_heads, layouts=self.packed_layouts)


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
        quicken()
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


def backends(settings: Settings, place: Place) -> tuple[dict[str, str], dict[str, str]]:
    """Return the backend of each implementation that runs these settings, and why others do not."""
    from ring_flash_attn.backends import select_backend
    from ring_flash_attn.core.validate import check_attention, check_tensors

    q = torch.zeros(1, 2, settings.heads, settings.head_dim, device=place.device)
    q = q.to(settings.dtype)
    k = q[:, :, : settings.key_heads]
    check_tensors(q, k, k)
    attention = check_attention(settings.head_dim)
    chosen, refused = {}, {}
    for name in IMPLEMENTATIONS:
        try:
            chosen[name] = select_backend(name, attention, q, k, k).name
        except NotImplementedError as error:
            refused[name] = str(error)
    return chosen, refused


class Compared(NamedTuple):
    """The whole sequence, the truth about it, and what a dense computation in its dtype gives."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    truth: oracle.Result
    bounds: dict[str, float]


def prepare(
    settings: Settings, mask: str, device: torch.device, documents: tuple[int, ...]
) -> Compared:
    """Draw the sequence, equal on every rank, and compute the truth and the bounds."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int) -> torch.Tensor:
        shape = settings.batch, settings.global_len, heads, settings.head_dim
        return torch.randn(shape, generator=generator, device=device).to(settings.dtype)

    q, k, v = (normal(h) for h in (settings.heads, settings.key_heads, settings.key_heads))
    whole = q, k, v, normal(settings.heads)
    causal, window = settings.mask(mask)
    if settings.truth == "flash":
        truth = one_device("native", documents, *whole, causal, window)
        # Two computations that each err by about 2.5e-3 (bfloat16) against the truth.
        bound = {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(settings.dtype, 1e-4)
        return Compared(*whole, truth, dict.fromkeys(TENSORS, bound))

    def dense(compute: Callable) -> Callable:
        def attend(q, k, v, dout) -> oracle.Result:
            rows = list(range(q.shape[1]))
            return compute(q, k, v, oracle.visible(rows, rows, causal, window, device), dout)

        return attend

    truth = each_document(dense(oracle.chunked), documents, *(x.double() for x in whole))
    in_dtype = each_document(dense(oracle.dense_in_dtype), documents, *whole)
    bounds = {
        name: 2 * oracle.errors(x, y).relative + 1e-5
        for name, x, y in zip(TENSORS, in_dtype, truth, strict=True)
    }
    return Compared(*whole, truth, bounds)


def one_device(
    name: str, documents: tuple[int, ...], q, k, v, dout, causal: bool, window: tuple[int, int]
) -> oracle.Result:
    """Return what an implementation's kernels give on one device, document by document."""
    from ring_flash_attn.core.api import local_backward, local_forward

    masked = {"causal": causal, "window_size": window}

    def attend(q, k, v, dout) -> oracle.Result:
        out, lse = local_forward(q, k, v, name, **masked)
        return oracle.Result(out, lse, *local_backward(dout, q, k, v, out, lse, name, **masked))

    return each_document(attend, documents, q, k, v, dout)


def ring_func(implementation: str, layout: str, ending: str = "func") -> Callable:
    """Return the public function that a user would call; ending `varlen_func` for documents."""
    import ring_flash_attn

    stem = {"contiguous": "ring", "zigzag": "zigzag_ring"}.get(layout, layout)
    prefix = "triton_" if implementation == "triton" else ""
    return getattr(ring_flash_attn, f"{prefix}{stem}_flash_attn_{ending}")


def compare(
    settings: Settings, place: Place, mask: str, documents: tuple[int, ...] = ()
) -> list[ErrorRow]:
    """Return the errors of every implementation and layout under one mask.

    Args:
        settings: for packed documents what `Settings.packed` returns.
        documents: lengths of packed documents that fill the global length; empty for a batch.
    """
    packed = bool(documents)
    label = f"packed {mask}" if packed else mask
    documents = documents or (settings.global_len,)
    compared = prepare(settings, mask, place.device, documents)
    whole = (compared.q, compared.k, compared.v, compared.dout)
    rows = []
    for name in settings.implementations:
        alone = one_device(name, documents, *whole, *settings.mask(mask))
        single = {
            tensor: _errors(x, y, place)
            for tensor, x, y in zip(TENSORS, alone, compared.truth, strict=True)
        }
        rows += [
            ErrorRow(label, name, "one device", t, *single[t], compared.bounds[t], 1.0)
            for t in TENSORS
        ]
        del alone
        for layout in settings.layouts:
            local = rows_of(layout, documents, place.world_size, place.rank, place.device)
            shards = [x.index_select(1, local) for x in whole]
            run = _packed_ring(place, name, layout, documents) if packed else None
            got = _run_ring(settings, name, run or ring_func(name, layout), shards, mask)
            for tensor, x, y in zip(TENSORS, got, compared.truth, strict=True):
                want = y.index_select(2 if tensor == "lse" else 1, local)
                errors = _over_ranks(x, want, place)
                ratio = errors.relative / max(single[tensor].relative, 1e-30)
                rows.append(
                    ErrorRow(label, name, layout, tensor, *errors, compared.bounds[tensor], ratio)
                )
    return rows


def _packed_ring(place: Place, name: str, layout: str, documents: tuple[int, ...]) -> Callable:
    """Return a public packed function as one of q, k, v [1, T, heads, D], as `ring_func`'s."""
    func = ring_func(name, layout, "varlen_func")

    def run(q, k, v, **options):
        arguments = packed_arguments(
            layout, documents, k.shape[2], place.world_size, place.rank, place.device
        )
        out, lse, nothing = func(q[0], k[0], v[0], *arguments, **options)
        return out[None], lse[None], nothing

    return run


def _run_ring(settings, name, run, shards, mask) -> oracle.Result:
    """Run the ring on this rank's shards; `inject` spoils one tensor of the Triton ring."""
    *leaves, dout = shards
    leaves = [x.requires_grad_() for x in leaves]
    causal, window = settings.mask(mask)
    out, lse, _ = run(*leaves, causal=causal, window_size=window, return_attn_probs=True)
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


def seen_area(length: int, causal: bool, window: tuple[int, int]) -> float:
    """Return how many (query, key) pairs a mask keeps; half of all if plain causal."""
    left, right = window
    if causal and left < 0:
        return length * length / 2
    ahead = 0 if causal else (length if right < 0 else right)
    back = length if left < 0 else left
    return float(sum(min(i, back) + 1 + min(length - 1 - i, ahead) for i in range(length)))
