"""The dense attention that every test compares with, from hand-written positions.

Imports nothing of the library. Give it float64 tensors for the truth: q, dout, dq [B, L, H, D];
k, v, dk, dv [B, Lk, Hk, D]; lse, dlse [B, H, L], natural log; masks [L, Lk] bool, True where the
query sees the key. A row that sees nothing has out 0, lse -inf and gradients 0.

`dense` is the definition differentiated by autograd and holds [B, H, L, Lk] scores. `chunked`
gives the same from explicit formulas in row chunks, head by head, for long sequences.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "zigzag", "stripe")


class Result(NamedTuple):
    """What one attention call gives, forward and backward."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


class Errors(NamedTuple):
    """How far `got` is from `want`: largest difference, its root mean square, ||.|| / ||want||."""

    max_abs: float
    rmse: float
    relative: float


def positions(layout: str, local_len: int, world_size: int, rank: int) -> list[int]:
    """Return the global position of each local row of `rank`."""
    if layout == "contiguous":
        return list(range(rank * local_len, (rank + 1) * local_len))
    if layout == "stripe":
        return list(range(rank, local_len * world_size, world_size))
    if layout == "zigzag":
        half = local_len // 2
        late = 2 * world_size - 1 - rank
        return [*range(rank * half, (rank + 1) * half), *range(late * half, (late + 1) * half)]
    raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")


def shard(x: Tensor, layout: str, world_size: int, rank: int, dim: int = 1) -> Tensor:
    """Return a contiguous copy of the rows of a global tensor that `rank` holds."""
    rows = positions(layout, x.shape[dim] // world_size, world_size, rank)
    return x.index_select(dim, torch.tensor(rows, dtype=torch.long, device=x.device))


def unshard(shards: list[Tensor], layout: str, dim: int = 1) -> Tensor:
    """Return the global tensor whose shards, in rank order, are given."""
    size, local_len = len(shards), shards[0].shape[dim]
    rows = [row for rank in range(size) for row in positions(layout, local_len, size, rank)]
    together = torch.cat(shards, dim)
    where = torch.tensor(rows, dtype=torch.long, device=together.device)
    return torch.empty_like(together).index_copy_(dim, where, together)


def visible(
    q_positions: list[int],
    k_positions: list[int],
    causal: bool,
    window: tuple[int, int] = (-1, -1),
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the mask [L, Lk]: query i sees key j iff i - left <= j <= i + right, -1 is open.

    `causal` closes the right side whatever `right` says.
    """
    i = torch.tensor(q_positions, dtype=torch.long, device=device).unsqueeze(1)
    j = torch.tensor(k_positions, dtype=torch.long, device=device).unsqueeze(0)
    left, right = window
    mask = torch.ones(len(q_positions), len(k_positions), dtype=torch.bool, device=device)
    if causal:
        mask &= j <= i
    elif right >= 0:
        mask &= j <= i + right
    if left >= 0:
        mask &= j >= i - left
    return mask


def attention(
    q: Tensor, k: Tensor, v: Tensor, visible_mask: Tensor, softmax_scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) in the input's dtype, differentiable. softmax_scale: 1/sqrt(D) if None."""
    scale = _scale(q, softmax_scale)
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    sees_some = visible_mask.any(1, keepdim=True)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    # A row that sees nothing gets scores 0 here, so that no NaN arises, and its result below.
    scores = scores.masked_fill(~visible_mask & sees_some, -math.inf)
    scores = scores.masked_fill(~sees_some, 0.0)
    lse = torch.logsumexp(scores, -1)
    probabilities = torch.exp(scores - lse.unsqueeze(-1)).masked_fill(~visible_mask, 0.0)
    out = torch.einsum("bhij,bjhd->bihd", probabilities, v)
    return out, lse.masked_fill(~sees_some.squeeze(1), -math.inf)


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    dout: Tensor,
    dlse: Tensor | None = None,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv) of `attention` by autograd; dlse is the gradient of lse, 0 if None."""
    return dense(q, k, v, mask, dout, dlse, softmax_scale)[2:]


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    dout: Tensor,
    dlse: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Result:
    """Return everything, from the definition and autograd, in the input's dtype."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out, lse = attention(q, k, v, mask, softmax_scale)
    dlse = torch.zeros_like(lse) if dlse is None else dlse.to(lse.dtype)
    grads = torch.autograd.grad((out, lse), (q, k, v), (dout.to(out.dtype), dlse))
    return Result(out.detach(), lse.detach(), *grads)


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    dout: Tensor,
    dlse: Tensor | None = None,
    softmax_scale: float | None = None,
    chunk_rows: int = 1024,
) -> Result:
    """Return what `dense` does, holding [chunk_rows, Lk] scores of one head at a time.

    dscores = p * (dout v^T - rowsum(dout * out) + dlse), p = exp(scale * q k^T - lse).
    """
    return _explicit(q, k, v, mask, dout, dlse, softmax_scale, chunk_rows, q.dtype, q.dtype)


def dense_in_dtype(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    dout: Tensor,
    dlse: Tensor | None = None,
    softmax_scale: float | None = None,
    chunk_rows: int = 1024,
) -> Result:
    """Return what a dense computation in the inputs' dtype gives: the yardstick of every bound.

    For 16-bit inputs: float32 arithmetic, probabilities and dscores rounded to the inputs' dtype
    before their products, out and gradients rounded once; lse stays float32.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _explicit(q, k, v, mask, dout, dlse, softmax_scale, chunk_rows, wide, q.dtype)


def _explicit(q, k, v, mask, dout, dlse, softmax_scale, chunk_rows, wide, narrow) -> Result:
    """Compute in `wide`, rounding to `narrow` what a kernel of that dtype rounds."""
    scale, group = _scale(q, softmax_scale), q.shape[2] // k.shape[2]
    out = torch.empty(q.shape[:3] + v.shape[3:], dtype=narrow, device=q.device)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=wide, device=q.device)
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            keys, values = k[b, :, h // group].to(wide), v[b, :, h // group].to(wide)
            for begin in range(0, q.shape[1], chunk_rows):
                rows = slice(begin, begin + chunk_rows)
                seen, queries = mask[rows], q[b, rows, h].to(wide)
                scores = (queries @ keys.T).mul_(scale).masked_fill_(~seen, -math.inf)
                row_lse = torch.logsumexp(scores, -1)
                finite = row_lse.masked_fill(row_lse == -math.inf, 0.0).unsqueeze(1)
                p = torch.exp(scores.sub_(finite))
                rounded_p = p.to(narrow).to(wide)
                row_out = (rounded_p @ values).to(narrow)
                row_dout = dout[b, rows, h].to(wide)
                delta = (row_dout * row_out.to(wide)).sum(-1, keepdim=True)
                if dlse is not None:
                    delta = delta - dlse[b, h, rows].to(wide).unsqueeze(1)
                dscores = (row_dout @ values.T).sub_(delta).mul_(p).mul_(scale)
                dscores = dscores.to(narrow).to(wide)
                out[b, rows, h], lse[b, h, rows] = row_out, row_lse
                dq[b, rows, h] = (dscores @ keys).to(narrow)
                dk[b, :, h // group] += dscores.T @ queries
                dv[b, :, h // group] += rounded_p.T @ row_dout
    return Result(out, lse, dq, dk.to(narrow), dv.to(narrow))


def errors(got: Tensor, want: Tensor) -> Errors:
    """Compare in float64. -inf entries must match exactly, and everything else be finite.

    Raises:
        AssertionError: shapes differ, an entry is NaN or inf, or -inf entries differ.
    """
    assert got.shape == want.shape, f"shape: got {tuple(got.shape)}, expected {tuple(want.shape)}"
    got, want = got.detach().double(), want.detach().double().to(got.device)
    nowhere = want == -math.inf
    differing = int(((got == -math.inf) != nowhere).sum())
    assert not differing, f"{differing} entries are -inf in only one of the two"
    unusable = int((~torch.isfinite(got.masked_fill(nowhere, 0.0))).sum())
    assert not unusable, f"{unusable} of {got.numel()} entries are NaN or inf"
    want = want.masked_fill(nowhere, 0.0)
    difference = got.masked_fill(nowhere, 0.0) - want
    if not difference.numel():
        return Errors(0.0, 0.0, 0.0)
    norm, size = float(difference.norm()), float(want.norm())
    relative = norm / size if size else (math.inf if norm else 0.0)
    return Errors(float(difference.abs().max()), norm / math.sqrt(difference.numel()), relative)


def beyond_bound(
    got: Result, want: Result, in_dtype: Result, names: tuple[str, ...] = Result._fields
) -> list[str]:
    """Return what breaks error(got) <= 2 * error(in_dtype) + 1e-5, as sentences; empty if nothing.

    Args:
        want: the float64 truth. in_dtype: `dense_in_dtype` of the same inputs. Both the largest
            and the root mean square error are held to the bound.
        names: of the tensors to hold to it.
    """
    broken = []
    for name in names:
        ours = errors(getattr(got, name), getattr(want, name))
        yardstick = errors(getattr(in_dtype, name), getattr(want, name))
        for measure in ("max_abs", "rmse"):
            error, bound = getattr(ours, measure), 2 * getattr(yardstick, measure) + 1e-5
            if not error <= bound:
                broken.append(f"{name}: {measure} error {error:.3e} exceeds {bound:.3e}")
    return broken


def _scale(q: Tensor, softmax_scale: float | None) -> float:
    return 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
