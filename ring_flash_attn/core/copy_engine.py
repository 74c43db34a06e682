"""K, V fetched straight from their owner, dk, dv written straight to him: for ranks of one host.

Nothing here runs on an SM but the owner's sum: K, V move by copy engine on a side stream, kernels
store dk, dv into the owner's memory, and ranks wait for each other on streams, by mailboxes
(`transport.Channel`).
"""

import torch
from torch import Tensor

from ..backends.base import GradTarget
from ..backends.shares import Shares, sum_shares
from .packed import DocumentsPlan, DocumentsStep
from .peer_buffers import AHEAD, PeerBuffers
from .plan import RingPlan
from .schedule import schedule_of
from .traffic import Traffic
from .transport import Channel


class CopyEngineExchange:
    """One pass of one call over `PeerBuffers`, as the protocol `Exchange`.

    The pull stream stages this rank's k, v once every peer has fetched the pass before, then
    fetches source after source, those of `AHEAD` launches ahead of the kernels. The caller's stream
    waits for both, so tensors of a call follow it. Kernels write their share of a source's dk, dv
    into its owner's landing slot, and the owner adds them up.

    Buffers change hands like this:

    * staged k, v: written after KV_FREE of every peer, read after KV_READY;
    * a slot: written after the kernel that read it last, an event of this rank;
    * a landing slot has one writer. It is written by the kernel that reads the owner's k, v of the
      same pass, which were staged behind the owner's last sum; it is read after ARRIVED.

    Every pass leaves the mailboxes as it found them, also one that `abandon` ends.

    Args:
        buffers: of this rank's group, for k's shape and dtype. No other pass may be under way.
        traffic: which rows travel. A plan of one step moves nothing.
        plan: this rank's steps.
        k, v: [B, L, Hk, D], this rank's own, any strides; read.
        state: dtype of dk, dv as they travel and are summed.
        backward: whether the pass returns dk, dv.
        merges: whether steps may be over several sources.

    Attributes:
        plan: the steps to walk.
    """

    def __init__(
        self,
        buffers: PeerBuffers,
        traffic: Traffic,
        plan: RingPlan | DocumentsPlan,
        k: Tensor,
        v: Tensor,
        state: torch.dtype,
        backward: bool,
        merges: bool = False,
    ) -> None:
        self._schedule = schedule_of(buffers, traffic, plan, backward, merges)
        self._rounds = self._schedule.rounds
        self.plan = self._schedule.steps_of(plan)
        self._buffers, self._traffic, self._first = buffers, traffic, plan.steps[0]
        self._k, self._v, self._state, self._backward = k, v, state, backward
        self._transport = buffers.transport
        self._last = self.plan.steps[-1].step
        self._compute = None
        self._own: Tensor | None = None
        self._pulled: list = []  # events, by round
        self._read: list = []
        self._written = 0  # rounds whose owners have been told of their shares
        self._over = False
        if backward:
            buffers.open_backward()

    def kv(self, step: int) -> tuple[Tensor, Tensor]:
        if step == 0:
            self._open()  # What is fetched comes after the launch of step 0, which hides it.
            return self._k, self._v
        index = self._schedule.at.get(step)
        if index is None:
            return self._k[:, :0], self._v[:, :0]
        assert index == len(self._read), "rounds are read in order"
        self._transport.wait(self._compute, self._pulled[index])
        return self._rounds[index].keys

    def kv_done(self, step: int) -> None:
        if step == 0:
            for _ in range(AHEAD):
                self._pull_next()
        if step in self._schedule.at:
            self._round_read()
        if step == self._last and not self._backward:
            self._end()

    def late(self, step: int) -> bool:
        return False

    def dkv_target(self, step: int) -> GradTarget:
        if step == 0:
            self._own = torch.empty((2, *self._k.shape), dtype=self._state, device=self._k.device)
            dk, dv = self._own.unbind()
            for begin, end in self._schedule.own_zeros:
                self._zero(self._own[:, :, begin:end])
            return GradTarget(dk, dv, add=False)
        index = self._schedule.at.get(step)
        if index is None:
            assert self._own is not None, "step 0 comes first"
            return GradTarget(*self._own[:, :, :0], add=False)
        assert index == self._written, "rounds are written in order"
        share = self._schedule.share(self._buffers, index)
        for part in share.zeros:
            self._zero(part)
        return share.target

    def dkv_done(self, step: int) -> None:
        if step in self._schedule.at:
            owners = self._rounds[self._written].owners
            self._transport.signal(self._compute, owners, Channel.ARRIVED)
            self._written += 1

    def finish(self) -> tuple[Tensor, Tensor]:
        assert self._own is not None, "step 0 comes first"
        self._over = True
        own = result = self._own
        if self._state != self._k.dtype:
            result = torch.empty_like(own, dtype=self._k.dtype)
        self._await_shares()
        shares = self._shares()
        self._transport.compute(lambda: sum_shares(result, own, shares))
        self._end()
        dk, dv = result.unbind()
        return dk, dv

    def abandon(self) -> None:
        """End the pass where it is: no peer is left waiting, and none gets wrong numbers.

        What this rank still owes as dk, dv arrives as NaN. What its peers hand in is not summed.
        """
        if self._over:
            return
        if self._compute is None:
            self._open()
        while len(self._read) < len(self._rounds):
            self._round_read()
        self._transport.wait(self._compute, self._transport.record(self._transport.pull_stream))
        if self._backward:
            for index in range(self._written, len(self._rounds)):
                for lost in self._schedule.share(self._buffers, index).owners:
                    self._transport.compute(lambda lost=lost: lost.fill_(torch.nan))
                self.dkv_done(self._rounds[index].hops[0])
            self._await_shares()
        self._end()

    def _open(self) -> None:
        """Stage k and v behind what the caller's stream has to do, and before the first kernel.

        A copy within one GPU takes SMs. Beside a persistent kernel it would wait for its end, and
        the readers with it.
        """
        transport = self._transport
        self._compute = transport.open_pass()
        transport.wait(transport.pull_stream, transport.record(self._compute))
        self._stage()
        transport.wait(self._compute, transport.record(transport.pull_stream))

    def _stage(self) -> None:
        """Put k, v where the peers fetch them, once the last pass's are fetched."""
        traffic, pull = self._traffic, self._transport.pull_stream
        readers = traffic.readers
        if not readers:
            return
        # Whoever reads nothing in this pass may still be reading in the last one.
        self._transport.look(pull, traffic.bystanders, Channel.KV_FREE)
        self._transport.take(pull, readers, Channel.KV_FREE)
        for staged, x in zip(self._buffers.staged_here, (self._k, self._v), strict=True):
            self._transport.copy(pull, staged, x)
        self._transport.signal(pull, readers, Channel.KV_READY)

    def _round_read(self) -> None:
        """Go on after the kernel that reads the oldest round: the next may take its slots."""
        refilled = len(self._read) + AHEAD < len(self._rounds)
        self._read.append(self._transport.record(self._compute) if refilled else None)
        self._pull_next()

    def _pull_next(self) -> None:
        """Fetch the next round that is not under way, if there is one."""
        index = len(self._pulled)
        if index == len(self._rounds):
            return
        transport, pull = self._transport, self._transport.pull_stream
        if index >= AHEAD:
            transport.wait(pull, self._read[index - AHEAD])
        fetch = self._rounds[index]
        # At once for all sources of a launch, which needs them all: one call of the driver each.
        transport.take(pull, fetch.owners, Channel.KV_READY)
        for target, source in fetch.copies:
            transport.copy(pull, target, source)
        transport.signal(pull, fetch.owners, Channel.KV_FREE)
        self._pulled.append(transport.record(pull))

    def _await_shares(self) -> None:
        """Hold the caller's stream until every share of this rank's dk, dv is here."""
        self._transport.take(self._compute, self._traffic.readers, Channel.ARRIVED)

    def _shares(self) -> Shares:
        """Return what the readers of this rank's keys have handed in."""
        traffic, step = self._traffic, self._first
        landed = self._buffers.landing[traffic.rank] if traffic.readers else None
        if isinstance(step, DocumentsStep):
            return Shares(landed, traffic.returns[1:], traffic.units, step.documents.cu_k)
        return Shares(landed, traffic.lends[1:])

    def _zero(self, part: Tensor) -> None:
        """Zero what the kernels of a step store nothing into."""
        self._transport.compute(lambda: part.zero_())

    def _end(self) -> None:
        self._over = True
        self._transport.close_pass(self._compute)
