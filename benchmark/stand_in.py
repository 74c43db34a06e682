"""One rank of several on one GPU, the others a stand-in: what a pass costs the host at any P.

Its kernels run, and every call of the driver is made: copies, stream operations, events. But peers'
memory is the GPU's own, and no wait for a mailbox holds a stream, since nobody would fill it. So
what it computes means nothing, and the GPU's time neither; the host's does.
"""

from typing import Any

import timing  # noqa: F401 - makes the library and the tests' files importable
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from comparison import Place
from ring_flash_attn.core import agree, choose, peer_memory, watchdog

TRANSPORT = "stand-in"


def join(size: int) -> Place:
    """Become the last of `size` ranks whose calls take the copy engine.

    Raises:
        NotImplementedError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise NotImplementedError("a stand-in for other ranks needs a GPU for the one that runs")
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("fake", store=FakeStore(), rank=size - 1, world_size=size)
    group = dist.group.WORLD
    assert group is not None, "it was just made"
    # What ranks find out with their first calls: that they agree, and reach each other's memory.
    agree._calls[group] = agree.EXCHANGED_CALLS
    ours = choose._groups[group] = choose._Group()
    ours.reasons[device] = []
    if size > 1:
        ours.memories[device] = StandIn(group, device)
    return Place(size - 1, size, device, TRANSPORT)


class StandIn(peer_memory.PeerMemory):
    """A `PeerMemory` without peers."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        super().__init__(group, device)
        self._memory = Unheld(self._memory)

    def settle(self) -> None:
        torch.cuda.synchronize(self._device)

    def shared(self, shape, dtype: torch.dtype) -> "peer_memory._Shared":
        tensors = [self.local(shape, dtype) for _ in range(self.world_size)]
        return peer_memory._Shared(None, tensors)

    def _watch(self, group: dist.ProcessGroup) -> watchdog.Watchdog:
        # It hears of passes as any does, but no thread looks at it.
        return watchdog.Watchdog(TRANSPORT, float("inf"), lambda: watchdog.read(self._ended))


class Unheld:
    """The driver's operations, with waits for 0 or more: they hold at once."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self.run, self.write, self.copy = driver.run, driver.write, driver.copy

    def prepare(self, operations: list[tuple[int, int, int]]) -> Any:
        return self._driver.prepare(
            [
                (operation, address, 0 if operation == peer_memory._WAIT else number)
                for operation, address, number in operations
            ]
        )
