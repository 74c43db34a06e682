"""What the copy-engine exchange asks of a machine: streams, copies, signals, shared memory.

One small seam, so that the exchange itself runs on GPUs (`peer_memory.PeerMemory`) and, in tests,
on an emulator of asynchronous streams.
"""

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, Protocol

import torch
from torch import Tensor


class Channel(IntEnum):
    """A mailbox that each rank has for each peer and purpose.

    It holds 0 or 1. Who sends writes 1, who takes waits for 1 and writes 0. That needs no counter,
    so it can be captured in a CUDA graph; but nobody may write into a mailbox that is not taken
    yet. So KV_READY is paired with KV_FREE, which starts at 1 and which its sender takes first, and
    ARRIVED follows a KV_READY that its reader sends after the last sum.
    """

    KV_READY = 0  # owner -> reader: K, V are staged
    KV_FREE = 1  # reader -> owner: they have been pulled
    ARRIVED = 2  # contributor -> owner: dk, dv lie in the landing slot


FREE = (Channel.KV_FREE,)


class Transport(Protocol):
    """One rank's streams and its reach into the memory of the other ranks of its group.

    Operations are put on a stream and run when it comes to them; none of them waits on the host.

    Attributes:
        pull_stream: this rank's side stream.
    """

    rank: int
    world_size: int
    pull_stream: Any

    def open_pass(self) -> Any:
        """Return the caller's stream, held until the group's last pass is over.

        That may have run on another stream of the caller. What a CUDA graph captures is not held.
        """
        ...

    def close_pass(self, stream: Any) -> None:
        """Say that the pass is over when `stream` has done all that was put on it so far."""
        ...

    def capturing(self) -> bool:
        """Whether a CUDA graph captures what is put on the caller's stream."""
        ...

    def record(self, stream: Any) -> Any:
        """Return an event that happens when `stream` has done all that was put on it so far.

        It may be waited for until the pass is closed.
        """
        ...

    def wait(self, stream: Any, event: Any) -> None:
        """Hold `stream` until an event of this rank has happened."""
        ...

    def copy(self, stream: Any, target: Tensor, source: Tensor) -> None:
        """Copy between tensors of one shape, of which one may be a peer's."""
        ...

    def compute(self, work: Callable[[], object]) -> None:
        """Do work on the caller's stream."""
        ...

    def signal(self, stream: Any, peers: tuple[int, ...], channel: Channel) -> None:
        """Write 1 into the mailboxes of peers, behind all that `stream` has done."""
        ...

    def take(self, stream: Any, peers: tuple[int, ...], channel: Channel) -> None:
        """Hold `stream` until the peers have signalled, and empty the mailboxes."""
        ...

    def look(self, stream: Any, peers: tuple[int, ...], channel: Channel) -> None:
        """Hold `stream` until the peers have signalled, and leave the mailboxes full."""
        ...

    def shared(self, shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
        """Allocate a tensor on every rank, collectively, and return all of them by rank."""
        ...

    def local(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Allocate a tensor that only this rank reaches."""
        ...
