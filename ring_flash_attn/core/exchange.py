"""One call's K, V distribution and dK, dV return. All waits are stream-ordered (gloo: the host)."""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends.base import GradTarget
from ..utils import RingComm, ShiftComm
from .packed import DocumentsPlan
from .plan import RingPlan


class Exchange(Protocol):
    """Bring every source's K, V here, and every share of dK, dV home.

    Attributes:
        accumulates: whether a step's target holds what earlier ranks have added, which may still
            be travelling when it is asked for.
    """

    accumulates: bool

    def kv(self, step: int) -> tuple[Tensor, Tensor]:
        """Return k, v of source (rank - step) % P, readable now on the compute stream."""
        ...

    def kv_done(self, step: int) -> None:
        """Say that the compute stream will read this step's k, v no more."""
        ...

    def dkv_target(self, step: int) -> GradTarget:
        """Return where this step's share of dk, dv goes.

        Where it is to be stored, rows that no block touches are zero. A step that sees nothing on
        this rank asks too, and writes nothing.
        """
        ...

    def dkv_done(self, step: int) -> None:
        """Say that this step's share is written."""
        ...

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return dk, dv of this rank's own rows, summed over every rank, in the dtypes of k, v."""
        ...

    def abandon(self) -> None:
        """Take back what can be after an error: this pass asks for nothing more."""
        ...


class RingExchange:
    """Pass K, V hop by hop over `RingComm`; dk, dv follow one hop behind as accumulators.

    K and V travel as one flat message; two buffers alternate, so a hop overlaps with the step
    that reads the other buffer. The accumulators of a source travel with its K, V, and go
    straight home after the last step. A plan of one step sends nothing.

    Args:
        group: the ranks of the ring; None for the default group.
        plan: this rank's steps; their number is equal on every rank.
        k: [B, L, Hk, D], v: [B, L, Hk, Dv], this rank's own, any strides; read.
        state: dtype of dk, dv as they accumulate and travel.
    """

    accumulates = True

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        plan: RingPlan | DocumentsPlan,
        k: Tensor,
        v: Tensor,
        state: torch.dtype,
    ) -> None:
        self._k, self._v, self._state = k, v, state
        self._last, self._first_step = len(plan.steps) - 1, plan.steps[0]
        self._kv: list[Tensor] = []
        self._dkv: list[Tensor] = []
        if self._last > 0:
            self._kv_comm = RingComm(group)
            self._dkv_comm = RingComm(group)
            # After the last step the accumulators of source rank - last are here: bring them home.
            self._home_comm = ShiftComm(group, -self._last)
            self._kv_comm.carries = "K, V"
            self._dkv_comm.carries = "sums of dK, dV"
            self._home_comm.carries = "dK, dV on their way home"

    def kv(self, step: int) -> tuple[Tensor, Tensor]:
        if step == 0:
            if self._last > 0:
                own = torch.cat([self._k.reshape(-1), self._v.reshape(-1)])
                self._kv = [own, torch.empty_like(own)]
                self._send_kv(step)
            return self._k, self._v
        self._kv_comm.wait()
        if step < self._last:
            # The other buffer is free: the step that read it was launched before, and the wait
            # above covers its own send.
            self._send_kv(step)
        return self._split(self._kv[step % 2])

    def kv_done(self, step: int) -> None:
        if step == self._last:
            self._kv = []

    def dkv_target(self, step: int) -> GradTarget:
        if step == 0:
            size = self._k.numel() + self._v.numel()
            count = 2 if self._last > 0 else 1
            self._dkv = [
                torch.empty(size, dtype=self._state, device=self._k.device) for _ in range(count)
            ]
        else:
            self._dkv_comm.wait()
        dk, dv = self._split(self._dkv[step % 2])
        if step == 0:
            for begin, end in self._first_step.unseen_k():
                dk[:, begin:end] = 0
                dv[:, begin:end] = 0
        return GradTarget(dk, dv, add=step > 0)

    def dkv_done(self, step: int) -> None:
        if self._last == 0:
            return
        comm = self._dkv_comm if step < self._last else self._home_comm
        comm.send_recv(self._dkv[step % 2], self._dkv[(step + 1) % 2])
        comm.commit()

    def finish(self) -> tuple[Tensor, Tensor]:
        if self._last > 0:
            self._home_comm.wait()
        index = (self._last + 1) % 2 if self._last > 0 else 0
        dk, dv = self._split(self._dkv[index])
        return dk.to(self._k.dtype), dv.to(self._v.dtype)

    def abandon(self) -> None:
        """Nothing: messages under way end by themselves; the others wait until the timeout."""

    def _send_kv(self, step: int) -> None:
        self._kv_comm.send_recv(self._kv[step % 2], self._kv[(step + 1) % 2])
        self._kv_comm.commit()

    def _split(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        size = self._k.numel()
        return flat[:size].view(self._k.shape), flat[size:].view(self._v.shape)
