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
from .peer_buffers import PeerBuffers
from .plan import RingPlan
from .traffic import Traffic, rows_to_zero
from .transport import Channel


class CopyEngineExchange:
    """One pass of one call over `PeerBuffers`, as the protocol `Exchange`.

    The pull stream stages this rank's k, v once every peer has fetched the pass before, then
    fetches source after source, `SLOTS` ahead of the kernels. It starts behind the caller's stream
    and joins it at the end, so tensors of a call follow the caller's stream. Kernels write their
    share of a source's dk, dv into its owner's landing slot, and the owner adds them up.

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
    ) -> None:
        self._buffers, self._traffic, self._plan = buffers, traffic, plan
        self._k, self._v, self._state, self._backward = k, v, state, backward
        self._transport = buffers.transport
        self._last = len(plan.steps) - 1
        # Steps that fetch something, in order: the n-th uses slot n modulo their number.
        self._fetched = traffic.fetched
        self._compute = None
        self._own: Tensor | None = None
        self._pulled: list = []  # events, in the order of _fetched
        self._read: list = []
        self._written = 0  # shares that their owners have been told of
        self._over = False
        if backward:
            buffers.open_backward()

    def kv(self, step: int) -> tuple[Tensor, Tensor]:
        if step == 0:
            # Before the kernels of step 0: a copy within one GPU takes SMs, which they leave none
            # of. What is fetched comes after them, they hide it.
            self._open()
            return self._k, self._v
        rows = self._traffic.pulls[step]
        if rows is None:
            return self._k[:, :0], self._v[:, :0]
        index = self._fetched.index(step)
        self._transport.wait(self._compute, self._pulled[index])
        # Rows behind the last that was fetched hold nothing: the tensors end there.
        return self._buffers.fetched(index, rows[1])

    def kv_done(self, step: int) -> None:
        if step == 0:
            for _ in self._buffers.slots:
                self._pull_next()
        if self._traffic.pulls[step] is not None:
            self._read.append(self._transport.record(self._compute))
            self._pull_next()
        if step == self._last:
            self._join()
            if not self._backward:
                self._end()

    def late(self, step: int) -> bool:
        return False

    def dkv_target(self, step: int) -> GradTarget:
        if step == 0:
            self._own = torch.empty((2, *self._k.shape), dtype=self._state, device=self._k.device)
            own = GradTarget(*self._own, add=False)
            return self._zeroed(own, step, (0, self._k.shape[1]))
        rows = self._traffic.pulls[step]
        if rows is None:
            assert self._own is not None, "step 0 comes first"
            return GradTarget(*self._own[:, :, :0], add=False)
        share = self._buffers.share(self._traffic.source(step), step, rows[1])
        return self._zeroed(GradTarget(*share, add=False), step, rows)

    def dkv_done(self, step: int) -> None:
        if self._traffic.pulls[step] is None:
            return
        owner = self._traffic.source(step)
        self._transport.signal(self._compute, (owner,), Channel.ARRIVED)
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
        dk, dv = result
        return dk, dv

    def abandon(self) -> None:
        """End the pass where it is: no peer is left waiting, and none gets wrong numbers.

        What this rank still owes as dk, dv arrives as NaN. What its peers hand in is not summed.
        """
        if self._over:
            return
        if self._compute is None:
            self._open()
        while len(self._read) < len(self._fetched):
            self._read.append(self._transport.record(self._compute))
            self._pull_next()
        self._join()
        if self._backward:
            for step in self._fetched[self._written :]:
                owner = self._traffic.source(step)
                lost = self._buffers.landing[owner][step - 1]
                self._transport.compute(lambda lost=lost: lost.fill_(torch.nan))
                self.dkv_done(step)
            self._await_shares()
        self._end()

    def _open(self) -> None:
        """Stage k and v beside what the caller's stream has still to do."""
        transport = self._transport
        self._compute = transport.open_pass()
        transport.wait(transport.pull_stream, transport.record(self._compute))
        self._stage()

    def _stage(self) -> None:
        """Put k, v where the peers fetch them, once the last pass's are fetched."""
        traffic, pull = self._traffic, self._transport.pull_stream
        readers = traffic.readers
        if not readers:
            return
        # Whoever reads nothing in this pass may still be reading in the last one.
        self._transport.look(pull, traffic.bystanders, Channel.KV_FREE)
        self._transport.take(pull, readers, Channel.KV_FREE)
        for staged, x in zip(self._buffers.staged_here(), (self._k, self._v), strict=True):
            self._transport.copy(pull, staged, x)
        self._transport.signal(pull, readers, Channel.KV_READY)

    def _pull_next(self) -> None:
        """Fetch the next source that is not under way, if there is one."""
        index, slots = len(self._pulled), len(self._buffers.slots)
        if index == len(self._fetched):
            return
        step, transport, pull = self._fetched[index], self._transport, self._transport.pull_stream
        rows, owner = self._traffic.pulls[step], self._traffic.source(step)
        assert rows is not None
        if index >= slots:
            transport.wait(pull, self._read[index - slots])
        transport.take(pull, (owner,), Channel.KV_READY)
        for target, source in self._buffers.pieces(index, owner, rows):
            transport.copy(pull, target, source)
        transport.signal(pull, (owner,), Channel.KV_FREE)
        self._pulled.append(transport.record(pull))

    def _await_shares(self) -> None:
        """Hold the caller's stream until every share of this rank's dk, dv is here."""
        self._transport.take(self._compute, self._traffic.readers, Channel.ARRIVED)

    def _shares(self) -> Shares:
        """Return what the readers of this rank's keys have handed in."""
        traffic, step = self._traffic, self._plan.steps[0]
        landed = self._buffers.landing[traffic.rank] if traffic.readers else None
        if isinstance(step, DocumentsStep):
            return Shares(landed, traffic.returns[1:], traffic.units, step.documents.cu_k)
        return Shares(landed, traffic.lends[1:])

    def _zeroed(self, target: GradTarget, step: int, rows: tuple[int, int]) -> GradTarget:
        """Return the target, with zeros where the step's kernels store nothing."""
        for begin, end in rows_to_zero(self._plan.steps[step], rows):
            for x in (target.dk, target.dv):
                part = x[:, begin:end]
                self._transport.compute(lambda part=part: part.zero_())
        return target

    def _join(self) -> None:
        transport = self._transport
        transport.wait(self._compute, transport.record(transport.pull_stream))

    def _end(self) -> None:
        self._over = True
        self._transport.close_pass(self._compute)
