"""One call, forward and backward, and the one autograd.Function over it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends.base import Backend, state_dtype
from .attention import Attention
from .choose import Route, open_exchange
from .exchange import Exchange
from .packed import DocumentsPlan
from .plan import RingPlan
from .ring import ring_backward, ring_forward


@dataclass(frozen=True)
class Call:
    """Everything but the tensors of one distributed attention call.

    Attributes:
        attention: what is computed.
        plan: this rank's steps. A plan of one step needs no process group.
        backend: who computes a step.
        group: who takes part; None for the default group.
        route: how K, V travel; None: over the ring, all rows.
    """

    attention: Attention
    plan: RingPlan | DocumentsPlan
    backend: Backend
    group: dist.ProcessGroup | None = None
    route: Route | None = None


@torch.no_grad()
def run_forward(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return out [B, L, H, D] in q's dtype and lse [B, H, L] in the state's dtype."""
    with _pass(call, k, v, backward=False) as exchange:
        return ring_forward(call.attention, exchange.plan, call.backend, exchange, q)


@torch.no_grad()
def run_backward(
    call: Call,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv in the dtypes of q, k, v.

    Args:
        dout: [B, L, H, D], gradient of out. out: what `run_forward` returned. q, k, v: its inputs.
        lse: [B, H, L]. dlse: [B, H, L], gradient of lse; None if there is none.
    """
    with _pass(call, k, v, backward=True) as exchange:
        saved = call.backend.prepare_backward(dout, out, lse, dlse)
        return ring_backward(call.attention, exchange.plan, call.backend, exchange, saved, q)


@contextmanager
def _pass(call: Call, k: Tensor, v: Tensor, backward: bool) -> Iterator[Exchange]:
    """Open the exchange of one pass, and abandon it on an error."""
    state = state_dtype(k.dtype)
    merges = call.backend.merges
    exchange = open_exchange(call.group, call.plan, call.route, k, v, state, backward, merges)
    try:
        yield exchange
    except BaseException:
        exchange.abandon()
        raise


class RingAttention(torch.autograd.Function):
    """Distributed attention as (q, k, v, call) -> (out, lse), differentiable in both outputs."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        out, lse = run_forward(call, q, k, v)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = call
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor | None, dlse: Tensor | None):
        q, k, v, out, lse = ctx.saved_tensors
        # Every rank must take part even where its own output is unused, or its peers would hang.
        dout = torch.zeros_like(out) if dout is None else dout
        return *run_backward(ctx.call, dout, q, k, v, out, lse, dlse), None
