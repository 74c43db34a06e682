"""Float64 attention of a sequence that no GPU can hold dense: some heads, some rows, in chunks.

Every rank holds its own rows of q, k, v, dout. Keys and values of one head are gathered in the
order of their positions, [S, D]; queries stay where they are. Causal. Imports nothing of the
library.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import oracle

CHUNK_ELEMENTS = 2**28  # scores at a time: 2 GiB in float64


class Local(NamedTuple):
    """This rank's rows: q, dout [1, L, H, D], k, v [1, L, Hk, D], and their positions [L]."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    positions: Tensor

    @property
    def group(self) -> int:
        """Return the query heads of a key head."""
        return self.q.shape[2] // self.k.shape[2]


def draw(
    layout: str, length: int, heads: int, key_heads: int, head_dim: int, dtype, device, rank, size
) -> Local:
    """Draw `length` rows of a rank, from its own seed."""
    generator = torch.Generator(device).manual_seed(rank)

    def normal(count: int) -> Tensor:
        # Head by head: float32 of all heads would take the room of twice the result.
        x = torch.empty(1, length, count, head_dim, dtype=dtype, device=device)
        for head in range(count):
            shape = 1, length, head_dim
            x[:, :, head] = torch.randn(shape, generator=generator, device=device)
        return x

    positions = torch.tensor(oracle.positions(layout, length, size, rank), device=device)
    return Local(*(normal(n) for n in (heads, key_heads, key_heads, heads)), positions)


def gathered(x: Tensor, positions: Tensor) -> Tensor:
    """Return the [S, D] of all ranks, in the order of their positions, from [L, D]. Collective."""
    size = dist.get_world_size()
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(parts, x.contiguous())
    places = [torch.empty_like(positions) for _ in range(size)]
    dist.all_gather(places, positions)
    whole = torch.empty(size * x.shape[0], x.shape[1], dtype=x.dtype, device=x.device)
    whole[torch.cat(places)] = torch.cat(parts)
    return whole


class Rows(NamedTuple):
    """Results of some query rows of one head: out, dq [n, D], lse, delta [n], float64."""

    out: Tensor
    lse: Tensor
    dq: Tensor | None
    delta: Tensor


def query_rows(
    local: Local, head: int, rows: Tensor, keys: Tensor, values: Tensor, with_dq: bool
) -> Rows:
    """Return the truth of this rank's `rows`, [n] local, which ascend in position.

    Args:
        keys, values: [S, D] of the head's key head, float64.
    """
    found = []
    step = max(1, CHUNK_ELEMENTS // keys.shape[0])
    for chunk in rows.split(step):
        places = local.positions[chunk]
        end = int(places.max()) + 1
        q, dout = (x[0, chunk, head].double() for x in (local.q, local.dout))
        scale = q.shape[-1] ** -0.5
        scores = (q * scale) @ keys[:end].T
        first = int(places.min())
        behind = torch.arange(first, end, device=places.device) > places.unsqueeze(1)
        scores[:, first:].masked_fill_(behind, -math.inf)
        largest = scores.amax(1, keepdim=True)
        p = scores.sub_(largest).exp_()
        total = p.sum(1, keepdim=True)
        out = (p @ values[:end]) / total
        delta = (dout * out).sum(1)
        dq = None
        if with_dq:
            dscores = (dout @ values[:end].T).sub_(delta.unsqueeze(1)).mul_(p)
            dq = (dscores @ keys[:end]) / total * scale
        found.append(Rows(out, (largest + total.log()).squeeze(1), dq, delta))
    dq = torch.cat([x.dq for x in found if x.dq is not None]) if with_dq else None
    return Rows(
        torch.cat([x.out for x in found]),
        torch.cat([x.lse for x in found]),
        dq,
        torch.cat([x.delta for x in found]),
    )


def key_rows(
    local: Local, truth: dict[int, Rows], places: Tensor, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Return dk, dv [n, D] of the keys at global positions `places`, over all ranks. Collective.

    Args:
        truth: of all rows of this rank, by head, for every query head of the key head.
        keys, values: [S, D] of the key head, float64.
    """
    dk, dv = (torch.zeros(len(places), keys.shape[1]).to(keys) for _ in range(2))
    k, v = keys[places], values[places]
    behind = places > local.positions.unsqueeze(1)
    for head, rows in truth.items():
        q, dout = (x[0, :, head].double() for x in (local.q, local.dout))
        scale = q.shape[-1] ** -0.5
        p = (q @ k.T).mul_(scale).sub_(rows.lse.unsqueeze(1)).masked_fill_(behind, -math.inf).exp_()
        dv += p.T @ dout
        dk += (dout @ v.T).sub_(rows.delta.unsqueeze(1)).mul_(p).T @ q * scale
    for x in (dk, dv):
        dist.all_reduce(x)
    return dk, dv


def sample(positions: Tensor, count: int) -> Tensor:
    """Return local rows, ascending in position: spread out, and both edges of each half.

    Not position 0, whose dq is the difference of two equal numbers. The next positions of a long
    sequence are not among them: the few keys that they see leave a dq that rounding out spoils.
    """
    length = len(positions)
    half = length // 2
    edges = {0, half - 1, half, length - 1}
    rows = edges | {round(i * (length - 1) / (count - 1)) for i in range(count)}
    found = torch.tensor(sorted(rows), device=positions.device)
    found = found[positions[found] > 0]
    return found[positions[found].argsort()]


def row_error(got: Tensor, want: Tensor) -> float:
    """Return the largest error of a row: the norm of its difference over its norm.

    inf where a result is not finite.
    """
    assert got.shape == want.shape, f"got {tuple(got.shape)}, expected {tuple(want.shape)}"
    if not bool(torch.isfinite(got).all()):
        return math.inf
    difference = got.double() - want
    return float((difference.norm(dim=1) / want.norm(dim=1)).max())
