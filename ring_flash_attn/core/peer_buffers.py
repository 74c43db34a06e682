"""The memory of the copy-engine exchange, allocated once and used by every pass."""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from .transport import Transport

SLOTS = 2  # sources whose K, V are here at a time: one read, one arriving
_KEPT_VIEWS = 1024


class PeerStore:
    """Memory that every pass of a group uses whose k, v have one dtype and fit in it.

    Passes of a group come one after the other, in one order on every rank, and the protocol keeps
    the next from what the last still needs, so they can have different shapes. What a backward
    needs appears with the first one. Allocating is collective and syncs the host.

    Attributes:
        elements: of k and v together, at most.
        staged: [elements] of each rank, by rank. slots: tensors like it, of this rank alone.
        landing: [(P - 1) elements] of the state's dtype, by rank.
        kept: whether a CUDA graph holds the addresses.
    """

    def __init__(
        self, transport: Transport, elements: int, dtype: torch.dtype, state: torch.dtype
    ) -> None:
        self.transport, self.elements, self.state, self.kept = transport, elements, state, False
        self.peers = transport.world_size - 1
        self.staged = transport.shared((elements,), dtype) if self.peers else []
        slots = range(min(SLOTS, self.peers))
        self.slots = [transport.local((elements,), dtype) for _ in slots]
        self.landing: list[Tensor] = []

    def open_backward(self) -> None:
        """Allocate what a backward needs beside it, if nobody has yet."""
        if self.peers and not self.landing:
            self.landing = self.transport.shared((self.peers * self.elements,), self.state)


class PeerBuffers:
    """A `PeerStore` as passes see it whose k, v have one shape.

    Attributes:
        staged: [2, B, L, Hk, D] of each rank, by rank: its k and v, where the others fetch them.
        slots: tensors like it, of this rank alone: what it fetched.
        landing: [P - 1, 2, B, L, Hk, D] in the state's dtype, by rank; [step - 1] is where rank
            (owner + step) % P puts its share.
    """

    def __init__(self, store: PeerStore, shape: tuple[int, ...]) -> None:
        """See it so. shape: of k, [B, L, Hk, D]; v has the same."""
        self.store, self.transport = store, store.transport
        self._shape = (2, *shape)
        self.staged = [_first(x, self._shape) for x in store.staged]
        self.slots = [_first(x, self._shape) for x in store.slots]
        self.landing: list[Tensor] = []
        # A view costs the host as much as an operation on a stream, and passes use the same ones.
        self._views: dict[Any, Any] = {}

    def open_backward(self) -> None:
        """Allocate what a backward needs beside it, if nobody has yet."""
        if not self.landing:
            self.store.open_backward()
            shape = self.store.peers, *self._shape
            self.landing = [_first(x, shape) for x in self.store.landing]

    def staged_here(self) -> tuple[Tensor, Tensor]:
        """Return where this rank stages its k and its v."""
        return self._view("staged", lambda: self.staged[self.transport.rank].unbind())

    def fetched(self, index: int, end: int) -> tuple[Tensor, Tensor]:
        """Return the first `end` rows of k and v in the slot of the index-th source."""
        slot = index % len(self.slots)
        return self._view(("slot", slot, end), lambda: self.slots[slot][:, :, :end].unbind())

    def pieces(self, index: int, owner: int, rows: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
        """Return (target, source) of rows on their way from their owner into that slot.

        They are contiguous: others would be copied on an SM.
        """
        slot = index % len(self.slots)

        def cut() -> list[tuple[Tensor, Tensor]]:
            target, source = self.slots[slot], self.staged[owner]
            if rows == (0, target.shape[2]):
                return [(target, source)]
            pairs = zip(target.flatten(0, 1), source.flatten(0, 1), strict=True)
            return [(to[slice(*rows)], of[slice(*rows)]) for to, of in pairs]

        return self._view(("pieces", slot, owner, rows), cut)

    def share(self, owner: int, step: int, end: int) -> tuple[Tensor, Tensor]:
        """Return the first `end` rows of where this rank's share of dk and dv of a step goes."""
        key = "share", owner, step, end
        return self._view(key, lambda: self.landing[owner][step - 1][:, :, :end].unbind())

    def _view(self, key: Any, cut: Callable[[], Any]) -> Any:
        if key not in self._views:
            if len(self._views) == _KEPT_VIEWS:
                self._views.clear()
            self._views[key] = cut()
        return self._views[key]


def _first(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the first elements as a tensor of this shape."""
    return flat[: prod(shape)].view(shape)


def copy_engine_bytes(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    state: torch.dtype,
    world_size: int,
    backward: bool = True,
) -> int:
    """Return the bytes of a `PeerStore` on each rank whose largest k has this shape.

    With n = P - 1 peers and s the elements of k and v together, s = 2 B L Hk D:

        forward     s * (1 + min(2, n)) * bytes of the input's dtype
        backward    s * n * bytes of the state's dtype, on top

    One rank allocates nothing. Not counted: 12 P bytes of mailboxes, and what an allocation is
    rounded up to (2 MiB on a GPU).

    Args:
        shape: of k, [B, L, Hk, D].
    """
    peers, elements = world_size - 1, 2 * prod(shape)
    if peers == 0:
        return 0
    total = elements * (1 + min(SLOTS, peers)) * dtype.itemsize
    if backward:
        total += elements * peers * state.itemsize
    return total
