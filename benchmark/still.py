"""The schedule of a ring without its messages: what a call would take if moving K, V were free.

Every step computes on this rank's own k, v in the place of the source's, so all kernels run as they
do over the exchange, and the results are wrong. A call's time over an exchange less its time over
this one is the communication that computing does not hide.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import timing  # noqa: F401 - makes the library importable
import torch
from torch import Tensor

from ring_flash_attn.backends.base import GradTarget
from ring_flash_attn.backends.shares import Shares, sum_shares
from ring_flash_attn.core import function
from ring_flash_attn.core.choose import Route
from ring_flash_attn.core.exchange import RingExchange
from ring_flash_attn.core.plan import Interval
from ring_flash_attn.core.traffic import Traffic, rows_to_zero


class StillRing(RingExchange):
    """`RingExchange` without messages: what it would send it keeps, and nothing comes."""

    def _connect(self, group) -> None:
        self._kv_comm = self._sums_comm = self._home_comm = Silence()

    def kv(self, step: int) -> tuple[Tensor, Tensor]:
        k, _ = super().kv(step)
        return self._k[:, : k.shape[1]], self._v[:, : k.shape[1]]


class Silence:
    """A `RingComm` that moves nothing."""

    def transfer(self, sends: list[Tensor], receives: list[Tensor]) -> None:
        pass

    def wait(self) -> None:
        pass


class StillCopyEngine:
    """`CopyEngineExchange` without messages: shares land here, and are summed here.

    What it launches beside the attention kernels, it launches too: zeros where no block stores, and
    the sum of the shares. It sums as many as it has written; over the exchange a contiguous causal
    rank sums another number of them. Copies are left out, the staging one as well.

    Args: as those of `CopyEngineExchange`.
    """

    def __init__(self, traffic: Traffic, plan, k: Tensor, v: Tensor, state: torch.dtype) -> None:
        self._pulls, self._steps, self._k, self._v = traffic.pulls, plan.steps, k, v
        self._state = state
        self._own: Tensor | None = None
        self._landing: Tensor | None = None

    def kv(self, step: int) -> tuple[Tensor, Tensor]:
        if step == 0:
            return self._k, self._v
        end = (self._pulls[step] or (0, 0))[1]
        return self._k[:, :end], self._v[:, :end]

    def kv_done(self, step: int) -> None:
        pass

    def late(self, step: int) -> bool:
        return False

    def dkv_target(self, step: int) -> GradTarget:
        if step == 0:
            shape = len(self._steps), 2, *self._k.shape
            self._own, *_ = both = torch.empty(shape, dtype=self._state, device=self._k.device)
            self._landing = both[1:]
            return self._zeroed(self._own, step, (0, self._k.shape[1]))
        assert self._own is not None and self._landing is not None, "step 0 comes first"
        rows = self._pulls[step]
        if rows is None:
            return GradTarget(*self._own[:, :, :0], add=False)
        return self._zeroed(self._landing[step - 1][:, :, : rows[1]], step, rows)

    def dkv_done(self, step: int) -> None:
        pass

    def finish(self) -> tuple[Tensor, Tensor]:
        assert self._own is not None, "step 0 comes first"
        result = torch.empty_like(self._own, dtype=self._k.dtype)
        sum_shares(result, self._own, Shares(self._landing, self._pulls[1:]))
        dk, dv = result
        return dk, dv

    def abandon(self) -> None:
        pass

    def _zeroed(self, share: Tensor, step: int, rows: Interval) -> GradTarget:
        dk, dv = share
        for begin, end in rows_to_zero(self._steps[step], rows):
            for x in (dk, dv):
                x[:, begin:end].zero_()
        return GradTarget(dk, dv, add=False)


@contextmanager
def still() -> Iterator[None]:
    """Let every call inside run its schedule without messages, as the exchange it asks for does."""

    def open_still(group, plan, route: Route | None, k, v, state, backward, merges=False):
        assert route is not None, "public calls have one"
        if route.exchange != "copy-engine":
            return StillRing(group, plan, k, v, state, route.traffic)
        return StillCopyEngine(route.traffic, plan, k, v, state)

    before = function.open_exchange
    function.open_exchange = open_still
    try:
        yield
    finally:
        function.open_exchange = before
