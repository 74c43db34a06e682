"""What the copy-engine exchange asks of a machine: streams, copies, signals, shared memory.

One small seam, so that the exchange itself runs on GPUs (`peer_memory.PeerMemory`) and, in tests,
on an emulator of asynchronous streams.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Protocol

import torch
from torch import Tensor


class Channel(IntEnum):
    """A mailbox that each rank has for each peer and purpose.

    It holds 0 or 1. Who sends writes 1, who takes waits for 1 and writes 0. That needs no counter,
    so it can be captured in a CUDA graph; but nobody may write into a mailbox that is not taken
    yet. So each channel that says "the data is there" is paired with one that says "its place is
    free", which its sender takes first. Free ones start at 1.
    """

    KV_READY = 0  # owner -> reader: K, V are staged
    KV_FREE = 1  # reader -> owner: they have been pulled
    ARRIVED = 2  # contributor -> owner: dk, dv lie in the landing slot
    LAND_FREE = 3  # owner -> contributor: the landing slot has been summed


FREE = (Channel.KV_FREE, Channel.LAND_FREE)


class Transport(Protocol):
    """One rank's streams and its reach into the memory of the other ranks of its group.

    Operations are put on a stream and run when it comes to them; none of them waits on the host.

    Attributes:
        pull_stream, push_stream: this rank's side streams.
        idle: happens when the last pass of the group is over; None before the first.
    """

    rank: int
    world_size: int
    pull_stream: Any
    push_stream: Any
    idle: Any

    def current_stream(self) -> Any:
        """Return the caller's stream."""
        ...

    def capturing(self) -> bool:
        """Whether a CUDA graph captures what is put on the caller's stream."""
        ...

    def record(self, stream: Any) -> Any:
        """Return an event that happens when `stream` has done all that was put on it so far."""
        ...

    def wait(self, stream: Any, event: Any) -> None:
        """Hold `stream` until an event of this rank has happened."""
        ...

    def copy(self, stream: Any, target: Tensor, source: Tensor) -> None:
        """Copy between tensors of one shape, of which one may be a peer's."""
        ...

    def add(self, stream: Any, target: Tensor, share: Tensor) -> None: ...

    def fill(self, stream: Any, target: Tensor, value: float) -> None: ...

    def signal(self, stream: Any, peer: int, channel: Channel) -> None:
        """Write 1 into a peer's mailbox, behind all that `stream` has done."""
        ...

    def take(self, stream: Any, peer: int, channel: Channel) -> None:
        """Hold `stream` until a peer has signalled, and empty the mailbox."""
        ...

    def look(self, stream: Any, peer: int, channel: Channel) -> None:
        """Hold `stream` until a peer has signalled, and leave the mailbox full."""
        ...

    def shared(self, shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
        """Allocate a tensor on every rank, collectively, and return all of them by rank."""
        ...

    def local(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Allocate a tensor that only this rank reaches."""
        ...
