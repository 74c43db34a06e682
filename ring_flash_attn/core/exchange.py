"""One call's K, V distribution and dK, dV return. All waits are stream-ordered (gloo: the host)."""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends.base import GradTarget
from ..backends.shares import Shares, sum_shares
from ..utils import RingComm, ShiftComm
from .capture import check_messages
from .packed import DocumentsPlan, DocumentsStep
from .plan import Interval, RingPlan
from .traffic import Traffic, hull, rows_to_zero, whole_traffic


class Exchange(Protocol):
    """Bring every source's K, V here, and every share of dK, dV home.

    Attributes:
        plan: what a ring walks: the steps of the call, or some of them merged (`merge`). A merged
            step goes by the number of its first hop.
    """

    plan: RingPlan | DocumentsPlan

    def kv(self, step: int) -> tuple[Tensor, Tensor]:
        """Return k, v of source (rank - step) % P, readable now on the compute stream."""
        ...

    def kv_done(self, step: int) -> None:
        """Say that the compute stream will read this step's k, v no more."""
        ...

    def late(self, step: int) -> bool:
        """Return whether what a step's target holds may still travel when it is asked for."""
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
    """Pass K, V hop by hop over `RingComm`; sums of dk, dv follow one hop behind.

    Two buffers alternate, so a hop overlaps with the step that reads the other buffer. A source's
    readers add to its dk, dv one after the other, and the last sends them straight home, where this
    rank's own share is added. Only rows that somebody reads travel. A plan of one step sends
    nothing.

    Args:
        group: the ranks of the ring; None for the default group.
        plan: this rank's steps; their number is equal on every rank.
        k, v: [B, L, Hk, D], this rank's own, any strides; read.
        state: dtype of dk, dv as they are summed and travel.
        traffic: which rows travel; None: all of everyone's.

    Raises:
        RuntimeError: a CUDA graph captures this and cannot hold the group's messages.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        plan: RingPlan | DocumentsPlan,
        k: Tensor,
        v: Tensor,
        state: torch.dtype,
        traffic: Traffic | None = None,
    ) -> None:
        self._k, self._v, self._state, self.plan = k, v, state, plan
        self._last = last = len(plan.steps) - 1
        if traffic is None:
            alone = isinstance(plan, RingPlan) or last == 0
            assert alone, "the traffic of documents says what comes home"
            traffic = whole_traffic(plan.rank, plan.world_size, last + 1, k.shape[1])
        self._traffic, self._relay = traffic, traffic.relay
        self._kv: list[Tensor] = []
        self._own: Tensor | None = None
        self._sums: list[Tensor] = []
        if last > 0:
            check_messages(group, k.device)
            self._connect(group)

    def _connect(self, group: dist.ProcessGroup | None) -> None:
        self._kv_comm, self._sums_comm = RingComm(group), RingComm(group)
        # After the last step the sums of source rank - last are here: bring them home.
        self._home_comm = ShiftComm(group, -self._last)
        self._kv_comm.carries = "K, V"
        self._sums_comm.carries = "sums of dK, dV"
        self._home_comm.carries = "dK, dV on their way home"

    def kv(self, step: int) -> tuple[Tensor, Tensor]:
        if step == 0:
            if self._last > 0:
                own = torch.stack((self._k, self._v))
                self._kv = [own, torch.empty_like(own)]
                self._send_kv(step)
            return self._k, self._v
        self._kv_comm.wait()
        if step < self._last:
            # The other buffer is free: the step that read it was launched before, and the wait
            # above covers its own send.
            self._send_kv(step)
        rows = self._relay.kv[step]
        # Rows behind the last that has come hold nothing: the tensors end there.
        k, v = self._kv[step % 2][:, :, : rows[1] if rows else 0].unbind()
        return k, v

    def kv_done(self, step: int) -> None:
        if step == self._last:
            self._kv = []

    def late(self, step: int) -> bool:
        return step > 1

    def dkv_target(self, step: int) -> GradTarget:
        if step == 0:
            self._own = torch.empty((2, *self._k.shape), dtype=self._state, device=self._k.device)
            return self._stored(self._own, step, (0, self._k.shape[1]))
        if step == 1:
            assert self._own is not None, "step 0 comes first"
            self._sums = [torch.empty_like(self._own) for _ in range(2)]
        else:
            self._sums_comm.wait()
        sums, rows, before = self._sums[step % 2], *self._rows_of_sums(step)
        if rows is None:
            return GradTarget(*sums[:, :, :0].unbind(), add=False)
        if before is None:
            return self._stored(sums, step, rows)
        for begin, end in ((rows[0], before[0]), (before[1], rows[1])):
            if begin < end:
                sums[:, :, begin:end] = 0
        return GradTarget(*sums[:, :, : rows[1]].unbind(), add=True)

    def dkv_done(self, step: int) -> None:
        if step == 0:
            return
        mine, theirs = self._sums[step % 2], self._sums[(step + 1) % 2]
        leaves, _ = self._rows_of_sums(step)
        if step < self._last:
            comm, comes = self._sums_comm, self._relay.arriving[step + 1]
        else:
            comm, comes = self._home_comm, self._relay.home
        comm.transfer(_pieces(mine, leaves), _pieces(theirs, comes))

    def finish(self) -> tuple[Tensor, Tensor]:
        assert self._own is not None, "step 0 comes first"
        result = self._own
        if self._state != self._k.dtype:
            result = torch.empty_like(self._own, dtype=self._k.dtype)
        landed = None
        if self._last > 0:
            self._home_comm.wait()
            landed = self._sums[(self._last + 1) % 2].unsqueeze(0)
        sum_shares(result, self._own, self._home(landed))
        dk, dv = result.unbind()  # not by iterating, which goes through Python
        return dk, dv

    def abandon(self) -> None:
        """Nothing: messages under way end by themselves; the others wait until the timeout."""

    def _home(self, landed: Tensor | None) -> Shares:
        """Return what has come home as one share, if anything could."""
        first = self.plan.steps[0]
        if isinstance(first, DocumentsStep):
            parts, units = (hull(self._traffic.returns),), first.plan.units
            return Shares(landed, parts, units, first.documents.cu_k)
        return Shares(landed, (self._relay.home,))

    def _rows_of_sums(self, step: int) -> tuple[Interval | None, Interval | None]:
        """Return the rows of the sums here that readers up to this one add to, and up to before."""
        return self._relay.leaving[step], self._relay.arriving[step]

    def _stored(self, target: Tensor, step: int, rows: Interval) -> GradTarget:
        """Return a target to store into, with zeros where the step's kernels store nothing."""
        for begin, end in self._unstored(step, rows):
            target[:, :, begin:end] = 0
        return GradTarget(*target[:, :, : rows[1]].unbind(), add=False)

    def _unstored(self, step: int, rows: Interval) -> tuple[Interval, ...]:
        at = self.plan.steps[step]
        if isinstance(at, DocumentsStep) and step > 0 and not at.meets_all_keys:
            return (rows,)  # a later reader may add to what this one has no key of
        return rows_to_zero(at, rows)

    def _send_kv(self, step: int) -> None:
        mine, theirs = self._kv[step % 2], self._kv[(step + 1) % 2]
        leaves, comes = self._relay.kv_on[step], self._relay.kv[step + 1]
        self._kv_comm.transfer(_pieces(mine, leaves), _pieces(theirs, comes))


def _pieces(buffer: Tensor, rows: Interval | None) -> list[Tensor]:
    """Return rows of [2, B, L, Hk, D] as contiguous tensors."""
    if rows is None:
        return []
    if rows == (0, buffer.shape[2]):
        return [buffer]
    return [x[slice(*rows)] for x in buffer.flatten(0, 1)]
