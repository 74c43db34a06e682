"""One call, forward and backward, and the one autograd.Function over it."""

from typing import NamedTuple, Protocol

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


class Passes(Protocol):
    """A call as `RingAttention` runs it: both passes over batches, outside of autograd."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dlse: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class Call(NamedTuple):
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

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return out [B, L, H, D] in q's dtype and lse [B, H, L] in the state's dtype."""
        exchange = self._open(k, v, backward=False)
        try:
            return ring_forward(self.attention, exchange.plan, self.backend, exchange, q)
        except BaseException:
            exchange.abandon()
            raise

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dlse: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk, dv in the dtypes of q, k, v. Arguments as of `run_backward`."""
        exchange = self._open(k, v, backward=True)
        try:
            saved = self.backend.prepare_backward(dout, out, lse, dlse)
            return ring_backward(self.attention, exchange.plan, self.backend, exchange, saved, q)
        except BaseException:
            exchange.abandon()
            raise

    def _open(self, k: Tensor, v: Tensor, backward: bool) -> Exchange:
        """Return the exchange of one pass, which is to be abandoned on an error."""
        state, merges = state_dtype(k.dtype), self.backend.merges
        return open_exchange(self.group, self.plan, self.route, k, v, state, backward, merges)


@torch.no_grad()
def run_forward(call: Passes, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return out [B, L, H, D] in q's dtype and lse [B, H, L] in the state's dtype."""
    return call.forward(q, k, v)


@torch.no_grad()
def run_backward(
    call: Passes,
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
    return call.backward(dout, q, k, v, out, lse, dlse)


class RingAttention(torch.autograd.Function):
    """Distributed attention as (q, k, v, call) -> (out, lse), differentiable in both outputs.

    q, k, v may be packed rows [T, H, D]: then out is like q and lse [H, T]. They become a batch of
    one in here, since every view outside would be a node of the graph and cost the host its time.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, call: Passes) -> tuple[Tensor, Tensor]:
        packed = q.dim() == 3
        out, lse = call.forward(*[x.unsqueeze(0) if packed else x for x in (q, k, v)])
        if packed:
            # In place: a view that a Function returns may not be changed by who gets it.
            out, lse = out.squeeze_(0), lse.squeeze_(0)
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
        given = [dout, q, k, v, out, lse, dlse]
        if q.dim() == 4:
            return *ctx.call.backward(*given), None
        gradients = ctx.call.backward(*[None if x is None else x.unsqueeze(0) for x in given])
        return *[x.squeeze(0) for x in gradients], None
