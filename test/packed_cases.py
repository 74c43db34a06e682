"""Packed cases, and the workers that run them on one rank and measure them against the oracle.

Shared by the reference backend (float64) and the Triton kernels, as ring_cases.py for batches.
"""

from itertools import pairwise
from typing import NamedTuple

import torch

import oracle
from ring_cases import MASKS, TENSORS, Measured, poison_empty

GATHER = "gather"  # the packed total cut into P shards: llama3
# Rows of each document on each rank; the whole document has P times as many.
PACKINGS = {
    "one": (24,),
    "several": (10, 2, 14),
    "tiny": (2, 2, 2, 2, 2, 0, 4),
    "odd": (7, 1, 12, 3),
}


class PackedCase(NamedTuple):
    """One distributed call over documents."""

    layout: str
    packing: str
    mask: str
    heads: int = 4
    key_heads: int = 2
    head_dim: int = 16
    heads_k_stride: int = 1

    def __str__(self) -> str:
        return f"{self.layout}-{self.packing}-{self.mask}"

    @property
    def local_lengths(self) -> tuple[int, ...]:
        return PACKINGS[self.packing]


def packed_grid() -> list[PackedCase]:
    """Return ring layouts and the gathered one x packings x masks."""
    cases = []
    for layout in (*oracle.LAYOUTS, GATHER):
        for packing in PACKINGS:
            if not (layout == "zigzag" and packing == "odd"):
                cases += [PackedCase(layout, packing, mask) for mask in MASKS]
    return cases


def edges_of(lengths) -> list[int]:
    edges = [0]
    for length in lengths:
        edges.append(edges[-1] + length)
    return edges


def rows_of(case: PackedCase, world_size: int, rank: int) -> list[int]:
    """Return the global packed row of each local row, from hand-written positions."""
    lengths = [n * world_size for n in case.local_lengths]
    if case.layout == GATHER:
        local = sum(case.local_lengths)
        return list(range(rank * local, (rank + 1) * local))
    rows = []
    for begin, length in zip(edges_of(lengths), lengths, strict=False):
        local = length // world_size
        if local:
            places = oracle.positions(case.layout, local, world_size, rank)
            rows += [begin + place for place in places]
    return rows


def visible(case: PackedCase, world_size: int, device: str) -> torch.Tensor:
    """Return [rows, rows] bool over the global packed rows."""
    edges = edges_of(n * world_size for n in case.local_lengths)
    causal, window = MASKS[case.mask]
    seen = torch.zeros(edges[-1], edges[-1], dtype=torch.bool, device=device)
    for begin, end in pairwise(edges):
        inside = range(end - begin)
        seen[begin:end, begin:end] = oracle.visible(inside, inside, causal, window, device)
    return seen


def packed_tensors(case: PackedCase, world_size: int, dtype: torch.dtype, device: str):
    """Return q, k, v, dout [rows, heads, D] and dlse [heads, rows] of the global packed rows."""
    generator = torch.Generator().manual_seed(0)
    rows = sum(case.local_lengths) * world_size

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, dout = (normal(rows, case.heads, case.head_dim) for _ in range(2))
    k, v = (normal(rows, case.key_heads, case.head_dim) for _ in range(2))
    dlse = normal(case.heads, rows)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    return *(x.to(device, dtype) for x in (q, k, v, dout)), dlse.to(device, state)


def attend(case: PackedCase, rank: int, world_size: int, backend: str, local, group=None):
    """Return out, lse of this rank's rows through the library."""
    from ring_flash_attn import (
        gathered_attention,
        llama3_flash_attn_prepare_cu_seqlens,
        packed_attention,
    )

    causal, window = MASKS[case.mask]
    options = {"backend": backend, "causal": causal, "window_size": window, "group": group}
    device = local[0].device
    if case.layout == GATHER:
        edges = edges_of(n * world_size for n in case.local_lengths)
        cu_seqlens = torch.tensor(edges, dtype=torch.int32, device=device)
        *documents, rows = llama3_flash_attn_prepare_cu_seqlens(
            cu_seqlens, causal, rank, world_size
        )
        return gathered_attention(*local, *documents, case.heads_k_stride, rows, **options)
    cu_seqlens = torch.tensor(edges_of(case.local_lengths), dtype=torch.int32, device=device)
    longest = max(case.local_lengths)
    return packed_attention(*local, cu_seqlens, longest, layout=case.layout, **options)


def packed_errors(
    rank: int,
    world_size: int,
    cases: list[PackedCase],
    backend: str,
    dtype: torch.dtype,
    device: str,
) -> list[dict[str, Measured]]:
    """Run every case on this rank; return the errors of its own rows against the fp64 oracle."""
    poison_empty()
    measured = []
    for case in cases:
        q, k, v, dout, dlse = whole = packed_tensors(case, world_size, dtype, device)
        seen = visible(case, world_size, device)
        wide = [x.double()[None] for x in whole]
        want = oracle.dense(*wide[:3], seen, *wide[3:])
        dense = oracle.dense_in_dtype(q[None], k[None], v[None], seen, dout[None], dlse[None])
        rows = torch.tensor(rows_of(case, world_size, rank), device=device)
        local = [x[rows].contiguous().requires_grad_() for x in (q, k, v)]
        out, lse = attend(case, rank, world_size, backend, local)
        grads = torch.autograd.grad((out, lse), local, (dout[rows], dlse[:, rows]))
        assert [x.dtype for x in (out, *grads)] == [dtype] * 4
        measured.append({})
        for name, x, y, z in zip(TENSORS, (out, lse, *grads), want, dense, strict=True):
            dim = 1 if name == "lse" else 0
            target = y[0].index_select(dim, rows)
            measured[-1][name] = Measured(
                oracle.errors(x, target), oracle.errors(z[0].index_select(dim, rows), target)
            )
    return measured
