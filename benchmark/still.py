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

from ring_flash_attn.backends.shares import Shares
from ring_flash_attn.core import function
from ring_flash_attn.core.choose import Route
from ring_flash_attn.core.copy_engine import CopyEngineExchange
from ring_flash_attn.core.exchange import RingExchange
from ring_flash_attn.core.peer_buffers import PeerBuffers, PeerStore, size_of
from ring_flash_attn.core.traffic import Traffic


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


class StillTransport:
    """A `Transport` of one rank that moves nothing: every rank's memory is this one's."""

    pull_stream = None

    def __init__(self, rank: int, world_size: int, device: torch.device) -> None:
        self.rank, self.world_size, self._device = rank, world_size, device

    def compute(self, work) -> None:
        work()

    def shared(self, shape, dtype: torch.dtype) -> list[Tensor]:
        return [self.local(shape, dtype)] * self.world_size

    def local(self, shape, dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=self._device)

    def __getattr__(self, name: str):
        return lambda *_: None  # streams, events, copies, signals


class StillCopyEngine(CopyEngineExchange):
    """`CopyEngineExchange` without messages: shares land here, and are summed here.

    It sums what it has written; over the exchange a contiguous causal rank sums another number of
    shares. Copies are left out, the staging one as well.

    Args: as those of `CopyEngineExchange`; kept: memory of calls before, by what it is for.
    """

    def __init__(
        self,
        traffic: Traffic,
        plan,
        k: Tensor,
        v: Tensor,
        state: torch.dtype,
        merges: bool = False,
        kept: dict | None = None,
    ) -> None:
        kept = {} if kept is None else kept
        shape = tuple(k.shape)
        key = shape, k.dtype, k.device, traffic.rank, traffic.world_size
        if key not in kept:
            transport = StillTransport(traffic.rank, traffic.world_size, k.device)
            store = PeerStore(transport, size_of(shape, traffic.world_size), k.dtype, state)
            kept[key] = PeerBuffers(store, shape), {}
        buffers, holds = kept[key]
        now = k.data_ptr(), k._version, v.data_ptr(), v._version
        if holds.get("now") != now:
            for slot in buffers.slots:
                slot[0].copy_(k)
                slot[1].copy_(v)
            holds["now"] = now
        super().__init__(buffers, traffic, plan, k, v, state, True, merges)

    def _shares(self) -> Shares:
        shares = super()._shares()
        if shares.cu_seqlens is not None:
            return shares
        return Shares(self._buffers.landing[self._traffic.rank], self._traffic.pulls[1:])


@contextmanager
def still() -> Iterator[None]:
    """Let every call inside run its schedule without messages, as the exchange it asks for does."""
    kept: dict = {}

    def open_still(group, plan, route: Route | None, k, v, state, backward, merges=False):
        assert route is not None, "public calls have one"
        if route.exchange != "copy-engine":
            return StillRing(group, plan, k, v, state, route.traffic)
        return StillCopyEngine(route.traffic, plan, k, v, state, merges, kept)

    before = function.open_exchange
    function.open_exchange = open_still
    try:
        yield
    finally:
        function.open_exchange = before
