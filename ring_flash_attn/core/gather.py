"""The gather schedule: all ranks' K, V by slices of heads, one step a slice (llama3's way)."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends.base import Backend, GradTarget, Saved, state_dtype
from ..ranks import ranks_of
from ..utils import AllGatherComm, ReduceScatterComm
from .attention import Attention
from .capture import check_messages
from .packed import DocumentsPlan
from .plan import RingPlan


@dataclass(frozen=True)
class GatheredCall:
    """Everything but the tensors of one call.

    Attributes:
        attention, backend, group: as in function.Call.
        plan: one step, of all local queries against keys `k_slice` of the gathered ones.
        heads_k_stride: key heads gathered at a time.
        k_slice: the global rows of K, V that local queries may see.
    """

    attention: Attention
    plan: RingPlan | DocumentsPlan
    backend: Backend
    group: dist.ProcessGroup | None
    heads_k_stride: int
    k_slice: slice

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return out [1, T, H, D] in q's dtype and lse [1, H, T] in the state's dtype."""
        result = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty((1, q.shape[2], q.shape[1]), dtype=state_dtype(q.dtype), device=q.device)
        step = self.plan.steps[0]
        for begin, end in step.unseen_q():
            result[:, begin:end] = 0
            lse[:, :, begin:end] = -torch.inf
        gather = _Gather(self, k, v)
        for index, heads in enumerate(key_slices(self, k)):
            k_slice, v_slice = gather.kv(index)
            mine = query_heads(heads, q, k)
            if step.sees:
                self.backend.forward(
                    self.attention,
                    step,
                    q[:, :, mine],
                    k_slice,
                    v_slice,
                    None,
                    lse[:, mine],
                    result[:, :, mine],
                )
        return result, lse

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
        """Return dq, dk, dv in the dtypes of q, k, v; dk and dv are summed in the state's dtype."""
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        step = self.plan.steps[0]
        for begin, end in step.unseen_q():
            dq[:, begin:end] = 0
        gather, scatter = _Gather(self, k, v), _Scatter(self, k)
        saved = self.backend.prepare_backward(dout, out, lse, dlse)
        for index, heads in enumerate(key_slices(self, k)):
            k_slice, v_slice = gather.kv(index)
            mine = query_heads(heads, q, k)
            if step.sees:
                self.backend.backward(
                    self.attention,
                    step,
                    _of_heads(saved, mine),
                    q[:, :, mine],
                    k_slice,
                    v_slice,
                    None,
                    lambda index=index: scatter.target(index),
                    dq[:, :, mine],
                )
            else:
                scatter.target(index)
            scatter.send(index)
        return dq, *scatter.finish()


class _Gather:
    """Gather K, V slice by slice of heads into two buffers: one is read while the other fills.

    A row of a buffer holds k and v, so that one collective brings both.

    Raises:
        RuntimeError: a CUDA graph captures this and cannot hold the group's messages.
    """

    def __init__(self, call: GatheredCall, k: Tensor, v: Tensor) -> None:
        check_messages(call.group, k.device)
        self._k_slice, self._slices = call.k_slice, len(key_slices(call, k))
        self._comms = AllGatherComm(call.group), AllGatherComm(call.group)
        for comm in self._comms:
            comm.carries = "K, V"
        _, rows, _, head_dim = k.shape
        row = 2, call.heads_k_stride, head_dim
        self._own = torch.empty((self._slices, rows, *row), dtype=k.dtype, device=k.device)
        for which, x in enumerate((k, v)):
            by_slice = x[0].unflatten(1, (self._slices, -1)).transpose(0, 1)
            self._own[:, :, which] = by_slice
        size = ranks_of(call.group).size
        self._buffers = torch.empty((2, size * rows, *row), dtype=k.dtype, device=k.device)
        self._start(0)

    def kv(self, index: int) -> tuple[Tensor, Tensor]:
        """Return k, v [1, n, stride, D] of a slice, and start gathering the next."""
        self._comms[index % 2].wait()
        if index + 1 < self._slices:
            # The step that read that buffer was launched before this gather is.
            self._start(index + 1)
        k, v = self._buffers[index % 2, self._k_slice].unbind(1)
        return k.unsqueeze(0), v.unsqueeze(0)

    def _start(self, index: int) -> None:
        self._comms[index % 2].all_gather(self._buffers[index % 2], self._own[index])


class _Scatter:
    """Sum dk, dv over the ranks slice by slice; one slice is computed while another travels."""

    def __init__(self, call: GatheredCall, k: Tensor) -> None:
        self._k_slice, self._step = call.k_slice, call.plan.steps[0]
        _, rows, _, head_dim = k.shape
        size, state = ranks_of(call.group).size, state_dtype(k.dtype)
        row = 2, call.heads_k_stride, head_dim
        # A row holds dk and dv, as in _Gather.
        self._whole = torch.empty((2, size * rows, *row), dtype=state, device=k.device)
        self._own = torch.empty((2, rows, *row), dtype=state, device=k.device)
        self._comms = ReduceScatterComm(call.group), ReduceScatterComm(call.group)
        for comm in self._comms:
            comm.carries = "dK, dV"
        self._slices = key_slices(call, k)
        self._dk, self._dv = torch.empty_like(k), torch.empty_like(k)

    def target(self, index: int) -> GradTarget:
        """Return where a slice's dk, dv go; rows outside k_slice are zero."""
        if index >= 2:
            self._collect(index - 2)
        whole, rows = self._whole[index % 2], self._k_slice
        whole[: rows.start] = 0
        whole[rows.stop :] = 0
        dk, dv = whole[rows].unsqueeze(0).unbind(2)
        for begin, end in self._step.unseen_k():
            dk[:, begin:end] = 0
            dv[:, begin:end] = 0
        return GradTarget(dk, dv, add=False)

    def send(self, index: int) -> None:
        self._comms[index % 2].reduce_scatter(self._own[index % 2], self._whole[index % 2])

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return dk, dv of local rows in the inputs' dtype, summed in the state's."""
        for index in range(max(0, len(self._slices) - 2), len(self._slices)):
            self._collect(index)
        return self._dk, self._dv

    def _collect(self, index: int) -> None:
        self._comms[index % 2].wait()
        heads = self._slices[index]
        self._dk[0, :, heads], self._dv[0, :, heads] = self._own[index % 2].unbind(1)


def key_slices(call: GatheredCall, k: Tensor) -> list[slice]:
    """Return the key heads of each slice."""
    stride = call.heads_k_stride
    return [slice(head, head + stride) for head in range(0, k.shape[2], stride)]


def query_heads(heads: slice, q: Tensor, k: Tensor) -> slice:
    """Return the query heads that read some key heads."""
    group = q.shape[2] // k.shape[2]
    return slice(heads.start * group, heads.stop * group)


def _of_heads(saved: Saved, heads: slice) -> Saved:
    """Return `saved` for some query heads, as views."""
    return Saved(
        saved.dout[:, :, heads],
        saved.out[:, :, heads],
        saved.lse[:, heads],
        None if saved.dlse is None else saved.dlse[:, heads],
        None if saved.delta is None else saved.delta[:, heads],
    )
