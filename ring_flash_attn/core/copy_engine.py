"""K, V fetched straight from their owner, dk, dv handed straight back: for ranks of one host.

Nothing here runs on an SM but the owner's sum and the copy of k, v into the staging buffer: rows
move by copy engine on two side streams, and ranks wait for each other on streams, by mailboxes
(`transport.Channel`).
"""

import torch
from torch import Tensor

from ..backends.base import GradTarget
from .packed import DocumentsPlan
from .peer_buffers import PeerBuffers
from .plan import Interval, RingPlan
from .traffic import Traffic, rows_to_zero
from .transport import Channel


class CopyEngineExchange:
    """One pass of one call over `PeerBuffers`, as the protocol `Exchange`.

    The pull stream stages this rank's k, v once every peer has fetched the pass before, then
    fetches source after source, `SLOTS` ahead of the kernels. The push stream takes each share of
    dk, dv to its owner's landing slot, and takes in what arrives here. Both start behind the
    caller's stream and join it at the end, so tensors of a call follow the caller's stream.

    Buffers change hands like this:

    * staged k, v: written after KV_FREE of every peer, read after KV_READY;
    * a slot: written after the kernel that read it last, an event of this rank;
    * a share: written after its last push, an event of this rank;
    * a landing slot has one writer: written after LAND_FREE, read after ARRIVED.

    Every pass leaves the mailboxes as it found them, also one that `abandon` ends.

    Args:
        buffers: of this rank's group, for k's shape and dtype. No other pass may be under way.
        traffic: which rows travel. A plan of one step moves nothing.
        plan: this rank's steps.
        k, v: [B, L, Hk, D], this rank's own, any strides; read.
        state: dtype of dk, dv as they travel and are summed.
        backward: whether the pass returns dk, dv.
    """

    accumulates = False

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
        self._buffers, self._traffic, self._steps = buffers, traffic, plan.steps
        self._k, self._v, self._state, self._backward = k, v, state, backward
        self._transport = buffers.transport
        self._last = len(plan.steps) - 1
        # Steps that fetch something, in order: the n-th uses slot and share n modulo their number.
        self._fetched = [step for step, rows in enumerate(traffic.pulls) if rows is not None]
        self._compute = None
        self._start = None  # an event, from when step 0 is asked for until the side streams wait
        self._own: Tensor | None = None
        self._pulled: list = []  # events, in the order of _fetched
        self._read: list = []
        self._pushed: list = []
        self._over = False
        if backward:
            buffers.open_backward()

    def kv(self, step: int) -> tuple[Tensor, Tensor]:
        if step == 0:
            self._open()
            return self._k, self._v
        rows = self._traffic.pulls[step]
        if rows is None:
            return self._k[:, :0], self._v[:, :0]
        index = self._fetched.index(step)
        self._transport.wait(self._compute, self._pulled[index])
        # Rows behind the last that was fetched hold nothing: the tensors end there.
        k, v = self._slot(index)[:, :, : rows[1]]
        return k, v

    def kv_done(self, step: int) -> None:
        if step == 0:
            # Now and not before: the kernels of step 0 are launched, and what follows takes the
            # host longer than one of them.
            self._begin()
        if self._traffic.pulls[step] is not None:
            self._read.append(self._transport.record(self._compute))
            self._pull_next()
        if step == self._last:
            self._join(self._transport.pull_stream)
            if not self._backward:
                self._end()

    def dkv_target(self, step: int) -> GradTarget:
        if step == 0:
            self._own = torch.empty((2, *self._k.shape), dtype=self._state, device=self._k.device)
            return self._target(self._own, step, (0, self._k.shape[1]))
        rows = self._traffic.pulls[step]
        if rows is None:
            assert self._own is not None, "step 0 comes first"
            return GradTarget(*self._own[:, :, :0], add=False)
        index = self._fetched.index(step)
        if index >= len(self._buffers.shares):
            self._transport.wait(self._compute, self._pushed[index - len(self._buffers.shares)])
        return self._target(self._share(index), step, rows)

    def dkv_done(self, step: int) -> None:
        rows = self._traffic.pulls[step]
        if rows is None:
            return
        transport, push = self._transport, self._transport.push_stream
        owner = self._traffic.source(step)
        transport.wait(push, transport.record(self._compute))
        transport.take(push, owner, Channel.LAND_FREE)
        share = self._share(self._fetched.index(step))
        self._copy_rows(push, self._buffers.landing[owner][step - 1], share, rows)
        transport.signal(push, owner, Channel.ARRIVED)
        self._pushed.append(transport.record(push))

    def finish(self) -> tuple[Tensor, Tensor]:
        assert self._own is not None, "step 0 comes first"
        self._over = True
        self._take_in(self._own)
        dk, dv = self._own
        return dk, dv

    def abandon(self) -> None:
        """End the pass where it is: no peer is left waiting, and none gets wrong numbers.

        What this rank still owes as dk, dv arrives as NaN. What its peers hand in is not summed.
        """
        if self._over:
            return
        if self._compute is None:
            self._open()
        if self._start is not None:
            self._begin()
        while len(self._read) < len(self._fetched):
            self._read.append(self._transport.record(self._compute))
            self._pull_next()
        self._join(self._transport.pull_stream)
        if not self._backward:
            self._end()
            return
        for index in range(len(self._pushed), len(self._fetched)):
            if index >= len(self._buffers.shares):
                before = self._pushed[index - len(self._buffers.shares)]
                self._transport.wait(self._compute, before)
            self._transport.fill(self._compute, self._share(index), torch.nan)
            self.dkv_done(self._fetched[index])
        self._take_in(None)

    def _open(self) -> None:
        """Mark where the caller's stream is: k and v are written."""
        transport = self._transport
        self._compute = transport.current_stream()
        if transport.idle is not None and not transport.capturing():
            # The last pass may have run on another stream of the caller.
            transport.wait(self._compute, transport.idle)
        self._start = transport.record(self._compute)

    def _begin(self) -> None:
        """Let the side streams go to work, behind that mark but beside step 0."""
        transport, start = self._transport, self._start
        self._start = None
        transport.wait(transport.pull_stream, start)
        if self._backward:
            transport.wait(transport.push_stream, start)
        self._stage()
        for _ in self._buffers.slots:
            self._pull_next()

    def _stage(self) -> None:
        """Put k, v where the peers fetch them, once the last pass's are fetched."""
        lends, pull = self._traffic.lends, self._transport.pull_stream
        readers = [step for step, rows in enumerate(lends) if rows is not None]
        if not readers:
            return
        for step in range(1, self._traffic.world_size):
            # Whoever reads nothing in this pass may still be reading in the last one.
            free = self._transport.take if step in readers else self._transport.look
            free(pull, self._traffic.reader(step), Channel.KV_FREE)
        staged = self._buffers.staged[self._traffic.rank]
        self._transport.copy(pull, staged[0], self._k)
        self._transport.copy(pull, staged[1], self._v)
        for step in readers:
            self._transport.signal(pull, self._traffic.reader(step), Channel.KV_READY)

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
        transport.take(pull, owner, Channel.KV_READY)
        self._copy_rows(pull, self._slot(index), self._buffers.staged[owner], rows)
        transport.signal(pull, owner, Channel.KV_FREE)
        self._pulled.append(transport.record(pull))

    def _take_in(self, own: Tensor | None) -> None:
        """Add what the readers of this rank's keys hand in to `own`, in the order of their steps.

        The order is fixed, so sums repeat bit for bit.
        """
        transport, push = self._transport, self._transport.push_stream
        for step, rows in enumerate(self._traffic.lends):
            if rows is None:
                continue
            reader = self._traffic.reader(step)
            transport.take(push, reader, Channel.ARRIVED)
            self._join(push)
            if own is not None:
                landed = self._buffers.landing[self._traffic.rank][step - 1]
                part = slice(*rows)
                transport.add(self._compute, own[:, :, part], landed[:, :, part])
            transport.wait(push, transport.record(self._compute))
            transport.signal(push, reader, Channel.LAND_FREE)
        self._join(push)
        self._end()

    def _target(self, share: Tensor, step: int, rows: Interval) -> GradTarget:
        for begin, end in rows_to_zero(self._steps[step], rows):
            self._transport.fill(self._compute, share[:, :, begin:end], 0.0)
        dk, dv = share
        return GradTarget(dk, dv, add=False)

    def _copy_rows(self, stream, target: Tensor, source: Tensor, rows: Interval) -> None:
        """Copy rows of [2, B, L, Hk, D], in pieces that are contiguous: others would take an SM."""
        if rows == (0, target.shape[2]):
            self._transport.copy(stream, target, source)
            return
        part = slice(*rows)
        for to, of in zip(target.flatten(0, 1), source.flatten(0, 1), strict=True):
            self._transport.copy(stream, to[part], of[part])

    def _slot(self, index: int) -> Tensor:
        return self._buffers.slots[index % len(self._buffers.slots)]

    def _share(self, index: int) -> Tensor:
        return self._buffers.shares[index % len(self._buffers.shares)]

    def _join(self, stream) -> None:
        self._transport.wait(self._compute, self._transport.record(stream))

    def _end(self) -> None:
        self._over = True
        if not self._transport.capturing():
            self._transport.idle = self._transport.record(self._compute)
