"""The grid of ring cases, and the worker that runs it on one rank and measures it.

Shared by the reference ring (float64) and the Triton ring, so that both meet the same masks.
"""

from typing import NamedTuple

import torch

import oracle

MASKS = {
    "full": (False, (-1, -1)),
    "causal": (True, (-1, -1)),
    "causal-window": (True, (5, 0)),
    "window": (False, (9, 3)),
    "ahead": (False, (-1, 2)),
}
TENSORS = ("out", "lse", "dq", "dk", "dv")


class Case(NamedTuple):
    """One distributed call: layout, rows a rank, mask, and the sizes around them."""

    layout: str
    local_len: int
    mask: str
    heads: int = 4
    key_heads: int = 2
    head_dim: int = 16
    batch: int = 1

    def __str__(self) -> str:
        return f"{self.layout}-{self.local_len}-{self.mask}"


def grid() -> list[Case]:
    """Return 3 layouts x odd and even lengths (zigzag: odd and even halves) x 5 masks."""
    return [
        Case(layout, length, mask)
        for layout in oracle.LAYOUTS
        for length in ((6, 20) if layout == "zigzag" else (7, 18))
        for mask in MASKS
    ]


def global_tensors(
    case: Case, world_size: int, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, ...]:
    """Return q, k, v, dout, dlse of the whole sequence, equal on every rank."""
    generator = torch.Generator().manual_seed(0)
    length = case.local_len * world_size

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q = normal(case.batch, length, case.heads, case.head_dim)
    k = normal(case.batch, length, case.key_heads, case.head_dim)
    v = normal(case.batch, length, case.key_heads, case.head_dim)
    dout = normal(case.batch, length, case.heads, case.head_dim)
    dlse = normal(case.batch, case.heads, length)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    return *(x.to(device, dtype) for x in (q, k, v, dout)), dlse.to(device, state)


def poison_empty() -> None:
    """Make torch.empty return NaN from here on, so that every unwritten element shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


class Measured(NamedTuple):
    """Errors of one tensor on one rank's rows, and of a dense computation in its dtype."""

    ours: oracle.Errors
    dense: oracle.Errors


def shard_errors(
    rank: int, world_size: int, cases: list[Case], backend: str, dtype: torch.dtype, device: str
) -> list[dict[str, Measured]]:
    """Run every case on this rank; return the errors of its own rows against the fp64 oracle."""
    from ring_flash_attn import ring_attention

    poison_empty()
    measured = []
    for case in cases:
        q, k, v, dout, dlse = whole = global_tensors(case, world_size, dtype, device)
        causal, window = MASKS[case.mask]
        everyone = list(range(q.shape[1]))
        seen = oracle.visible(everyone, everyone, causal, window, device)
        wide = [x.double() for x in whole]
        want = oracle.dense(*wide[:3], seen, *wide[3:])
        dense = oracle.dense_in_dtype(q, k, v, seen, dout, dlse)

        def mine(x: torch.Tensor, dim: int = 1, case: Case = case) -> torch.Tensor:
            return oracle.shard(x, case.layout, world_size, rank, dim)

        local = [mine(x).requires_grad_() for x in (q, k, v)]
        out, lse = ring_attention(
            *local, layout=case.layout, backend=backend, causal=causal, window_size=window
        )
        grads = torch.autograd.grad((out, lse), local, (mine(dout), mine(dlse, 2)))
        assert [x.dtype for x in (out, *grads)] == [dtype] * 4
        measured.append({})
        for name, x, y, z in zip(TENSORS, (out, lse, *grads), want, dense, strict=True):
            dim = 2 if name == "lse" else 1
            target = mine(y, dim)
            measured[-1][name] = Measured(
                oracle.errors(x, target), oracle.errors(mine(z, dim), target)
            )
    return measured
