"""Dense attention in plain torch, from bands. For CPU tensors, for float64, and to read.

Computes in the state's dtype and materialises [B, H, n, m] scores: memory grows with the square
of the length.
"""

import torch
from torch import Tensor

from ..core.attention import Attention
from ..core.plan import Block
from .base import Saved, state_dtype
from .blocks import BlockBackend


class ReferenceBackend(BlockBackend):
    """softmax(scale * q k^T + band) v and its gradients, written out."""

    name = "reference"

    def unsupported(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> list[str]:
        return [] if q.is_floating_point() else [f"reference needs a float dtype, got {q.dtype}"]

    def attend(
        self, attention: Attention, block: Block, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        scores = _scores(attention, block, q, k)
        lse = torch.logsumexp(scores, -1)
        probabilities = torch.exp(scores - lse.unsqueeze(-1))
        out = torch.einsum("bkgij,bjkd->bikgd", probabilities, v.to(scores.dtype))
        return out.flatten(2, 3), lse.flatten(1, 2)

    def gradients(
        self, attention: Attention, block: Block, saved: Saved, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        scores = _scores(attention, block, q, k)
        dtype, key_heads = scores.dtype, k.shape[2]
        dout = saved.dout.to(dtype)
        delta = (dout * saved.out.to(dtype)).sum(-1).transpose(1, 2)
        if saved.dlse is not None:
            delta = delta - saved.dlse
        probabilities = torch.exp(scores - _grouped(saved.lse, key_heads).unsqueeze(-1))
        dout = dout.unflatten(2, (key_heads, -1))
        dv = torch.einsum("bkgij,bikgd->bjkd", probabilities, dout)
        dp = torch.einsum("bikgd,bjkd->bkgij", dout, v.to(dtype))
        dscores = probabilities * (dp - _grouped(delta, key_heads).unsqueeze(-1))
        dscores *= attention.softmax_scale
        dq = torch.einsum("bkgij,bjkd->bikgd", dscores, k.to(dtype)).flatten(2, 3)
        dk = torch.einsum("bkgij,bikgd->bjkd", dscores, q.to(dtype).unflatten(2, (key_heads, -1)))
        return dq, dk, dv


def band_mask(block: Block, device: torch.device) -> Tensor:
    """Return [n, m] bool, True where the query row sees the key row."""
    i = torch.arange(block.q_begin, block.q_end, device=device).unsqueeze(1)
    j = torch.arange(block.k_begin, block.k_end, device=device).unsqueeze(0)
    return (j - i >= block.lo) & (j - i <= block.hi)


def _scores(attention: Attention, block: Block, q: Tensor, k: Tensor) -> Tensor:
    """Return masked, scaled scores [B, Hk, H / Hk, n, m] in the state's dtype."""
    dtype = state_dtype(q.dtype)
    queries = q.to(dtype).unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("bikgd,bjkd->bkgij", queries, k.to(dtype)) * attention.softmax_scale
    if not block.full:
        scores = scores.masked_fill(~band_mask(block, q.device), -torch.inf)
    return scores


def _grouped(per_row: Tensor, key_heads: int) -> Tensor:
    """View [B, H, n] as [B, Hk, H / Hk, n]."""
    return per_row.unflatten(1, (key_heads, -1))
