"""The ring schedule: one loop forward, one loop backward, over any backend and any exchange."""

import torch
from torch import Tensor

from ..backends.base import Backend, GradTarget, Saved, state_dtype
from .attention import Attention
from .exchange import Exchange
from .plan import RingPlan, StepPlan


def ring_forward(
    attention: Attention,
    plan: RingPlan,
    backend: Backend,
    exchange: Exchange,
    q: Tensor,
) -> tuple[Tensor, Tensor]:
    """Attend from local queries to every source's keys.

    Args:
        q: [B, L, H, D], read.

    Returns:
        out [B, L, H, D] and lse [B, H, L] (natural log) in the state's dtype. A row that sees no
        key anywhere has out 0 and lse -inf.
    """
    batch, length, heads, _ = q.shape
    state = state_dtype(q.dtype)
    out = torch.empty(q.shape, dtype=state, device=q.device)
    lse = torch.empty((batch, heads, length), dtype=state, device=q.device)
    for begin, end in plan.steps[0].unseen_q():
        out[:, begin:end] = 0
        lse[:, :, begin:end] = -torch.inf
    for step in plan.steps:
        k, v = exchange.kv(step.step)
        if step.blocks:
            backend.forward(attention, step, q, k, v, out, lse)
        exchange.kv_done(step.step)
    return out, lse


def ring_backward(
    attention: Attention,
    plan: RingPlan,
    backend: Backend,
    exchange: Exchange,
    saved: Saved,
    q: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq of local rows, and dk, dv of local rows summed over every rank's queries.

    Args:
        saved: what `backend.prepare_backward` returned.
        q: [B, L, H, D], read.

    Returns:
        dq [B, L, H, D], dk, dv [B, L, Hk, D] in the state's dtype.
    """
    dq = torch.empty(q.shape, dtype=state_dtype(q.dtype), device=q.device)
    for begin, end in plan.steps[0].unseen_q():
        dq[:, begin:end] = 0
    for step in plan.steps:
        k, v = exchange.kv(step.step)
        if step.blocks:
            backend.backward(
                attention, step, saved, q, k, v, dq, lambda step=step: _target(exchange, step)
            )
        else:
            _target(exchange, step)
        exchange.kv_done(step.step)
        exchange.dkv_done(step.step)
    dk, dv = exchange.finish()
    return dq, dk, dv


def _target(exchange: Exchange, step: StepPlan) -> GradTarget:
    """Return the step's target; where it is to be stored, rows that nobody sees are zeroed."""
    target = exchange.dkv_target(step.step)
    if not target.add:
        for begin, end in step.unseen_k():
            target.dk[:, begin:end] = 0
            target.dv[:, begin:end] = 0
    return target
