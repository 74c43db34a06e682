"""All ranks of a ring in one process, step by step: what backends are tested with.

Every tensor that a backend writes starts as NaN, and the caller zeroes only what the interface says
it zeroes, so a row left unwritten shows.
"""

from typing import NamedTuple

import torch

import oracle
from ring_flash_attn.backends.base import GradTarget, state_dtype
from ring_flash_attn.core.attention import Attention
from ring_flash_attn.core.layout import Layout
from ring_flash_attn.core.plan import plan_ring

SCALE = 0.31
MASKS = [
    (False, (-1, -1)),
    (True, (-1, -1)),
    (True, (5, 0)),
    (False, (3, 2)),
    (False, (0, -1)),
    (False, (-1, 4)),
    (True, (0, 0)),
    (False, (100, 100)),
]


class Shape(NamedTuple):
    """Global lengths and heads of one call."""

    q_len: int
    k_len: int
    batch: int = 1
    heads: int = 2
    key_heads: int = 1
    head_dim: int = 8


class Inputs(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    dlse: torch.Tensor | None


def mask_id(mask):
    causal, (left, right) = mask
    return f"{'causal' if causal else 'open'}[{left},{right}]"


def attention_of(mask, deterministic=False):
    return Attention(SCALE, causal=mask[0], window=mask[1], deterministic=deterministic)


def inputs(shape, dtype=torch.float64, with_dlse=True, device="cpu"):
    generator = torch.Generator(device).manual_seed(0)

    def random(*sizes):
        return torch.randn(*sizes, generator=generator, device=device, dtype=torch.float32)

    def rows(length, heads):
        return random(shape.batch, length, heads, shape.head_dim).to(dtype)

    q, dout = rows(shape.q_len, shape.heads), rows(shape.q_len, shape.heads)
    k, v = rows(shape.k_len, shape.key_heads), rows(shape.k_len, shape.key_heads)
    dlse = random(shape.batch, shape.heads, shape.q_len).to(state_dtype(dtype))
    return Inputs(q, k, v, dout, dlse if with_dlse else None)


def poisoned(like, dtype):
    return torch.full(like.shape, torch.nan, dtype=dtype, device=like.device)


def zero(x, intervals, dim=1, value=0.0):
    for begin, end in intervals:
        x.narrow(dim, begin, end - begin).fill_(value)


def ring(backend, attention, layout, size, given, landing=False, result_dtype=None):
    """Run every step of every rank and return the global result: dk and dv in the state's dtype.

    The results are never the state, so that a row finished in the wrong step, or twice, shows.
    landing: each step's dk, dv go to a fresh target that their owner sums; otherwise they travel
    as one accumulator a source, stored at step 0 and added to later.
    result_dtype: of out and dq; q's if None.
    """
    q, k, v, dout = (
        [oracle.shard(x, layout, size, rank) for rank in range(size)] for x in given[:4]
    )
    dlse = [
        None if given.dlse is None else oracle.shard(given.dlse, layout, size, rank, 2)
        for rank in range(size)
    ]
    q_layout = Layout(layout, q[0].shape[1], size)
    k_layout = Layout(layout, k[0].shape[1], size)
    plans = [plan_ring(attention, q_layout, k_layout, rank) for rank in range(size)]
    ranks = walk(backend, attention, plans, (q, k, v, dout, dlse), landing, result_dtype)
    return oracle.Result(
        *(
            oracle.unshard(shards, layout, 2 if name == "lse" else 1)
            for name, shards in zip(oracle.Result._fields, ranks, strict=True)
        )
    )


def walk(backend, attention, plans, shards, landing=False, result_dtype=None):
    """Run the plans of all ranks; return out, lse, dq, dk, dv, each a list by rank.

    shards: q, k, v, dout, dlse, each a list by rank. landing, result_dtype: as in `ring`.
    """
    q, k, v, dout, dlse = shards
    size, state = len(plans), state_dtype(q[0].dtype)
    outs, lses, dqs = [], [], []
    for rank, plan in enumerate(plans):
        out, result = state_and_result(plan, q[rank], result_dtype)
        lse = poisoned(q[rank][..., 0].transpose(1, 2), state)
        zero(lse, plan.steps[0].unseen_q(), 2, -torch.inf)
        for step in plan.steps:
            source = k[step.source], v[step.source]
            backend.forward(attention, step, q[rank], *source, out, lse, result)
        outs.append(result)
        lses.append(lse)
        dqs.append(state_and_result(plan, q[rank], result_dtype))
    dks, dvs = ([poisoned(x, state) for x in xs] for xs in (k, v))
    saved = [
        backend.prepare_backward(dout[rank], outs[rank].to(q[rank].dtype), lses[rank], dlse[rank])
        for rank in range(size)
    ]
    for hop in range(len(plans[0].steps)):
        for rank, plan in enumerate(plans):
            step = plan.steps[hop]
            source, asked = step.source, []
            add = not (landing or step.first)
            dk, dv = dks[source], dvs[source]
            if landing:
                dk, dv = poisoned(dk, state), poisoned(dv, state)
            if not add:
                zero(dk, step.unseen_k())
                zero(dv, step.unseen_k())
            dq, result = dqs[rank]

            def target(dk=dk, dv=dv, add=add, asked=asked):
                asked.append(True)
                return GradTarget(dk, dv, add)

            backend.backward(
                attention, step, saved[rank], q[rank], k[source], v[source], dq, target, result
            )
            assert len(asked) == step.sees, "the target is asked for once"
            if landing:
                dks[source] = dk if step.first else dks[source] + dk
                dvs[source] = dv if step.first else dvs[source] + dv
    return outs, lses, [dq for _, dq in dqs], dks, dvs


def state_and_result(plan, like, result_dtype=None):
    """Return what a ring passes as state and result, NaN but for what it zeroes."""
    result = poisoned(like, result_dtype or like.dtype)
    zero(result, plan.unseen_q())
    if len(plan.steps) == 1:
        return None, result
    kept = poisoned(like, state_dtype(like.dtype))
    zero(kept, plan.steps[0].unseen_q())
    return kept, result


def truth(mask, given, path=oracle.dense, device="cpu"):
    """Return the float64 truth of inputs as they are, already rounded to their dtype."""
    q_len, k_len = given.q.shape[1], given.k.shape[1]
    seen = oracle.visible(range(q_len), range(k_len), *mask, device=device)
    q, k, v, dout, dlse = (None if x is None else x.double() for x in given)
    return path(q, k, v, seen, dout, dlse, SCALE), seen


def check_exact(got, want):
    for name in oracle.Result._fields:
        error = oracle.errors(getattr(got, name), getattr(want, name)).max_abs
        assert error < 1e-10, f"{name}: {error}"


def check_bound(got, mask, given):
    want, seen = truth(mask, given)
    q, k, v, dout, dlse = given
    broken = oracle.beyond_bound(got, want, oracle.dense_in_dtype(q, k, v, seen, dout, dlse, SCALE))
    assert not broken, "\n".join(broken)


def check_bound_on_gpu(got, seen, given):
    """Hold FlashAttention-2 to a dense computation that hands out what it does, in 16 bits.

    That is each query head's dk, dv, which are summed outside, and the shares of dout and of dlse.
    """
    q, k, v, dout, dlse = (x.double() for x in given)
    want = oracle.chunked(q, k, v, seen, dout, dlse, SCALE)
    key_heads = given.k.shape[2]
    q, k, v, dout, dlse = given
    k, v = (x.repeat_interleave(q.shape[2] // key_heads, 2) for x in (k, v))
    of_out = oracle.dense_in_dtype(q, k, v, seen, dout, None, SCALE)
    of_lse = oracle.dense_in_dtype(q, k, v, seen, torch.zeros_like(dout), dlse, SCALE)
    grads = [a.float() + b.float() for a, b in zip(of_out[2:], of_lse[2:], strict=True)]
    dk, dv = (x.unflatten(2, (key_heads, -1)).sum(3).to(q.dtype) for x in grads[1:])
    yardstick = of_out._replace(dq=grads[0].to(q.dtype), dk=dk, dv=dv)
    broken = oracle.beyond_bound(got, want, yardstick)
    assert not broken, "\n".join(broken)
