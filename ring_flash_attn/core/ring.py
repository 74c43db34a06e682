"""The ring schedule: one loop forward, one loop backward, over any backend and any exchange."""

import torch
from torch import Tensor

from ..backends.base import Backend, Saved, TargetOnRequest, state_dtype
from ..backends.missed import mark_missed
from .attention import Attention
from .exchange import Exchange
from .packed import DocumentsPlan
from .plan import RingPlan


def ring_forward(
    attention: Attention,
    plan: RingPlan | DocumentsPlan,
    backend: Backend,
    exchange: Exchange,
    q: Tensor,
) -> tuple[Tensor, Tensor]:
    """Attend from local queries to every source's keys.

    Args:
        q: [B, L, H, D], read.

    Returns:
        out [B, L, H, D] in q's dtype and lse [B, H, L] (natural log) in the state's dtype. A row
        that sees no key anywhere has out 0 and lse -inf.
    """
    batch, length, heads, _ = q.shape
    lse = torch.empty((batch, heads, length), dtype=state_dtype(q.dtype), device=q.device)
    for begin, end in plan.steps[0].unseen_q():
        lse[:, :, begin:end] = -torch.inf
    out, result = _state_and_result(plan, q, lse)
    for step in plan.steps:
        k, v = exchange.kv(step.step)
        if step.sees:
            backend.forward(attention, step, q, k, v, out, lse, result)
        exchange.kv_done(step.step)
    return result, lse


def ring_backward(
    attention: Attention,
    plan: RingPlan | DocumentsPlan,
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
        dq [B, L, H, D] in q's dtype; dk, dv [B, L, Hk, D] in those of k and v.
    """
    dq, result = _state_and_result(plan, q)
    for step in plan.steps:
        k, v = exchange.kv(step.step)
        if step.sees:
            backend.backward(
                attention,
                step,
                saved,
                q,
                k,
                v,
                dq,
                TargetOnRequest(
                    lambda step=step: exchange.dkv_target(step.step),
                    late=exchange.accumulates and not step.first,
                ),
                result,
            )
        else:
            exchange.dkv_target(step.step)
        exchange.kv_done(step.step)
        exchange.dkv_done(step.step)
    dk, dv = exchange.finish()
    return result, dk, dv


def _state_and_result(
    plan: RingPlan | DocumentsPlan, q: Tensor, lse: Tensor | None = None
) -> tuple[Tensor | None, Tensor]:
    """Return what accumulates from step to step, and what the last step of each row writes.

    They are one tensor if q has the state's dtype; without a second step there is no state. Rows
    that no step writes, or that a later one is the first to write, are 0. Rows that documents of
    unchecked lengths leave out are NaN, also in `lse`.
    """
    result = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if isinstance(plan, DocumentsPlan) and plan.may_miss_rows:
        mark_missed(plan, result, lse)
    for begin, end in plan.unseen_q():
        result[:, begin:end] = 0
    if len(plan.steps) == 1:
        return None, result
    state = result
    if state_dtype(q.dtype) != q.dtype:
        state = torch.empty(q.shape, dtype=state_dtype(q.dtype), device=q.device)
    for begin, end in plan.steps[0].unseen_q():
        state[:, begin:end] = 0
    return state, result
