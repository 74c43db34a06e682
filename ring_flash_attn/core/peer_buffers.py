"""The memory of the copy-engine exchange, allocated once and used by every pass."""

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .merge import sources_a_launch
from .transport import Transport

AHEAD = 2  # launches whose K, V are here at a time: one's are read, one's arriving


class Size(NamedTuple):
    """Elements of k and v together, and of all their slots."""

    elements: int
    slots: int

    def holds(self, other: "Size") -> bool:
        return self.elements >= other.elements and self.slots >= other.slots

    def grown(self, other: "Size", growth: float) -> "Size":
        """Return what holds both; of what has to grow at least so many times as much."""
        pairs = zip(self, other, strict=True)
        return Size(*(a if a >= b else max(b, int(a * growth)) for a, b in pairs))


def size_of(shape: tuple[int, ...], world_size: int) -> Size:
    """Return what passes need whose k has this shape, [B, L, Hk, D]."""
    elements = 2 * prod(shape)
    return Size(elements, elements * slots_of(shape, world_size))


def slots_of(shape: tuple[int, ...], world_size: int) -> int:
    """Return of how many sources K, V are here at a time."""
    return min(AHEAD * sources_a_launch(shape), world_size - 1)


class PeerStore:
    """Memory that every pass of a group uses whose k, v have one dtype and fit in it.

    Passes of a group come one after the other, in one order on every rank, and the protocol keeps
    the next from what the last still needs, so they can have different shapes. What a backward
    needs appears with the first one. Allocating is collective and syncs the host.

    Attributes:
        size: what fits in it.
        staged: [elements] of each rank, by rank.
        slots: [slots], of this rank alone; None for one rank.
        landing: [(P - 1) elements] of the state's dtype, by rank.
        kept: whether a CUDA graph holds the addresses.
    """

    def __init__(
        self, transport: Transport, size: "Size", dtype: torch.dtype, state: torch.dtype
    ) -> None:
        self.transport, self.size, self.state, self.kept = transport, size, state, False
        self.peers = transport.world_size - 1
        self.staged = transport.shared((size.elements,), dtype) if self.peers else []
        self.slots = transport.local((size.slots,), dtype) if self.peers else None
        self.landing: list[Tensor] = []

    def open_backward(self) -> None:
        """Allocate what a backward needs beside it, if nobody has yet."""
        if self.peers and not self.landing:
            self.landing = self.transport.shared((self.peers * self.size.elements,), self.state)


class PeerBuffers:
    """A `PeerStore` as passes see it whose k, v have one shape.

    Attributes:
        staged: [2, B, L, Hk, D] of each rank, by rank: its k and v, where the others fetch them.
        staged_here: this rank's k and v of it.
        slots: tensors like it, of this rank alone: what it fetched, one behind the other in memory.
        shape: of k, [B, L, Hk, D].
        sources: how many may share a launch. span: rows from one's keys to the next one's then.
        landing: [P - 1, 2, B, L, Hk, D] in the state's dtype, by rank; [step - 1] is where rank
            (owner + step) % P puts its share.
        schedules: what passes over them do, by what `schedule.schedule_of` tells them apart.
    """

    def __init__(self, store: PeerStore, shape: tuple[int, ...]) -> None:
        """See it so. shape: of k, [B, L, Hk, D]; v has the same."""
        self.store, self.transport, self.shape = store, store.transport, shape
        self._shape = (2, *shape)
        self.staged = [_first(x, self._shape) for x in store.staged]
        self.slots: list[Tensor] = []
        if store.slots is not None:
            count = slots_of(shape, self.transport.world_size)
            self.slots = list(_first(store.slots, (count, *self._shape)))
        self.sources, self.span = sources_a_launch(shape), 2 * shape[1]
        self.landing: list[Tensor] = []
        self.staged_here: tuple[Tensor, ...] = ()
        if self.staged:
            self.staged_here = self.staged[self.transport.rank].unbind()
        self.schedules: dict[tuple, Any] = {}
        self._offsets: dict[tuple, Tensor] = {}

    def open_backward(self) -> None:
        """Allocate what a backward needs beside it, if nobody has yet."""
        if not self.landing:
            self.store.open_backward()
            shape = self.store.peers, *self._shape
            self.landing = [_first(x, shape) for x in self.store.landing]

    def fetched(self, slot: int, end: int, count: int = 1) -> tuple[Tensor, Tensor]:
        """Return the first `end` rows of k and v in a slot.

        Args:
            count: of so many slots from it on, each but the last with all its rows.
        """
        first = self.slots[slot]
        if count == 1:
            k, v = first[:, :, :end].unbind()
            return k, v
        # k and v of a source are neighbours, so the next k is two lengths on: so many rows.
        shape = 1, (count - 1) * self.span + end, *first.shape[3:]
        k, v = (x.as_strided(shape, x.stride(), x.storage_offset()) for x in first)
        return k, v

    def pieces(self, slot: int, owner: int, rows: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
        """Return (target, source) of rows on their way from their owner into a slot.

        They are contiguous: others would be copied on an SM.
        """
        target, source = self.slots[slot], self.staged[owner]
        if rows == (0, target.shape[2]):
            return [(target, source)]
        pairs = zip(target.flatten(0, 1), source.flatten(0, 1), strict=True)
        return [(to[slice(*rows)], of[slice(*rows)]) for to, of in pairs]

    def share(self, owner: int, step: int, end: int) -> tuple[Tensor, Tensor]:
        """Return the first `end` rows of where this rank's share of dk and dv of a step goes."""
        dk, dv = self.landing[owner][step - 1][:, :, :end].unbind()
        return dk, dv

    def offsets(self, places: tuple[tuple[int, int], ...]) -> Tensor:
        """Return `GradTarget.offsets` of the shares of some (owner, step), in order.

        Made once, a host sync, and kept: a CUDA graph may hold its address.
        """
        if places not in self._offsets:
            shares = [self.landing[owner][step - 1] for owner, step in places]
            first, row = shares[0], prod(self._shape[3:])
            numbers = []
            for index, share in enumerate(shares):
                apart = (share.data_ptr() - first.data_ptr()) // share.itemsize
                number, rest = divmod(apart - index * self.span * row, 4)
                assert rest == 0, "memory and heads are multiples of 16 bytes"
                numbers.append(number)
            device = first.device
            self._offsets[places] = torch.tensor(numbers, dtype=torch.int64).to(device)
        return self._offsets[places]


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

        forward     s * (1 + min(2 m, n)) * bytes of the input's dtype
        backward    s * n * bytes of the state's dtype, on top

    m is how many sources may share a launch: 3 where B is 1 and L at most 8192, else 1.

    One rank allocates nothing. Not counted: 12 P bytes of mailboxes, and what an allocation is
    rounded up to (2 MiB on a GPU).

    Args:
        shape: of k, [B, L, Hk, D].
    """
    if world_size == 1:
        return 0
    elements, slots = size_of(shape, world_size)
    total = (elements + slots) * dtype.itemsize
    if backward:
        total += elements * (world_size - 1) * state.itemsize
    return total
