"""The memory of the copy-engine exchange, allocated once and used by every pass."""

from math import prod

import torch
from torch import Tensor

from .transport import Transport

SLOTS = 2  # sources whose K, V are here at a time: one read, one arriving
SHARES = 2  # shares of dk, dv that have not left: one written, one leaving


class PeerBuffers:
    """What the passes of one group share whose k, v have one shape and dtype.

    Those of the backward appear with the first one. Allocating is collective and syncs the host.

    Attributes:
        staged: [2, B, L, Hk, D] of each rank, by rank: its k and v, where the others fetch them.
        slots: tensors like it, of this rank alone: what it fetched.
        shares: tensors like it in the state's dtype: this rank's dk, dv of another's rows.
        landing: [P - 1, 2, B, L, Hk, D] in the state's dtype, by rank; [step - 1] is where rank
            (owner + step) % P puts its share.
        kept: whether a CUDA graph holds the addresses.
    """

    def __init__(
        self,
        transport: Transport,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        state: torch.dtype,
    ) -> None:
        """Allocate what a forward needs. shape: of k, [B, L, Hk, D]; v has the same."""
        self.transport = transport
        self.kept = False
        self._shape, self._state = (2, *shape), state
        self._peers = transport.world_size - 1
        self.staged = transport.shared(self._shape, dtype) if self._peers else []
        slots = range(min(SLOTS, self._peers))
        self.slots = [transport.local(self._shape, dtype) for _ in slots]
        self.shares: list[Tensor] = []
        self.landing: list[Tensor] = []

    def open_backward(self) -> None:
        """Allocate what a backward needs beside it, if nobody has yet."""
        if self._peers and not self.landing:
            self.landing = self.transport.shared((self._peers, *self._shape), self._state)
            shares = range(min(SHARES, self._peers))
            self.shares = [self.transport.local(self._shape, self._state) for _ in shares]


def copy_engine_bytes(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    state: torch.dtype,
    world_size: int,
    backward: bool = True,
) -> int:
    """Return the bytes of `PeerBuffers` on each rank.

    With n = P - 1 peers and s the elements of k and v together, s = 2 B L Hk D:

        forward     s * (1 + min(2, n)) * bytes of the input's dtype
        backward    s * (n + min(2, n)) * bytes of the state's dtype, on top

    One rank allocates nothing. Not counted: 16 P bytes of mailboxes, and what an allocation is
    rounded up to (2 MiB on a GPU).

    Args:
        shape: of k, [B, L, Hk, D].
    """
    peers, elements = world_size - 1, 2 * prod(shape)
    if peers == 0:
        return 0
    total = elements * (1 + min(SLOTS, peers)) * dtype.itemsize
    if backward:
        total += elements * (peers + min(SHARES, peers)) * state.itemsize
    return total
