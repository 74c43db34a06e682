"""Streams, copies, signals and shared memory of GPUs that reach each other's memory: `Transport`.

Memory comes from torch's symmetric memory, by plain peer mappings: nothing here uses multicast.
Signals are stream memory operations of the CUDA driver. They need no SM, which matters: attention
programs fill all of them, and a kernel that signals would wait for one to end.
"""

import ctypes
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import watchdog
from .transport import FREE, Channel

# Read by torch at each allocation, and where ranks map each other's.
_NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
_SHARED_GPUS = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"


class Place(NamedTuple):
    """Where a rank's tensors are, as it tells the other ranks.

    Attributes:
        host: boot id and name of its host.
        device: the UUID of its GPU; "" if it has none.
        unsupported: what it lacks by itself.
    """

    host: str
    device: str
    unsupported: tuple[str, ...]


def place_of(device: torch.device) -> Place:
    """Return where this rank is, and what it lacks for a `PeerMemory`."""
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    host = f"{socket.gethostname()} {boot}"
    if device.type != "cuda":
        return Place(host, "", (f"its tensors are on {device}, the copy engine moves GPU memory",))
    return Place(host, _uuid(device.index), tuple(_missing()))


def out_of_reach(places: Sequence[Place], rank: int, device: torch.device) -> list[str]:
    """Return every reason why this rank cannot fetch from the others; empty if it can.

    Ranks that share a GPU would only wait for each other; torch's variable for that lets tests try
    more ranks than there are GPUs.
    """
    own, reasons = places[rank], list(places[rank].unsupported)
    visible = {_uuid(index): index for index in range(torch.cuda.device_count())}
    for peer, place in enumerate(places):
        if peer == rank:
            continue
        if place.host != own.host:
            reasons.append(f"rank {peer} is on another host")
        elif place.device == own.device != "":
            if os.environ.get(_SHARED_GPUS) != "1":
                reasons.append(f"rank {peer} has the same GPU")
        elif place.device and own.device:
            index = visible.get(place.device)
            if index is None:
                reasons.append(f"rank {peer}'s GPU is hidden from it (CUDA_VISIBLE_DEVICES)")
            elif not torch.cuda.can_device_access_peer(device, index):
                reasons.append(f"its GPU cannot reach the memory of rank {peer}'s")
    return reasons


class PeerMemory:
    """The `Transport` of one rank on one GPU.

    Making one is collective, and the ranks must meet once more before they use it: a mailbox is
    ready when its own rank has made it.

    A CUDA graph may capture passes, after one call that allocates. Replays belong on one stream
    with the other calls of the group, or ordered with them: what a capture records is not ordered
    behind calls outside it.

    Args:
        group: the ranks; only its name is kept, so that the group can be freed. A pass that has not
            ended after its timeout ends the process (`watchdog`).
        device: this rank's GPU.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self._group_name, self._device = group.group_name, device
        # Its operations are short and others wait for them.
        self.pull_stream = torch.cuda.Stream(device, priority=-1)
        self._idle: torch.cuda.Event | None = None  # when the last pass of the group is over
        self._events: list[torch.cuda.Event] = []  # making one costs the host as much as four uses
        self._recorded = 0
        self._captured = False
        self._memory = _driver()
        self._prepared: dict[tuple, Any] = {}
        self._mail = self.shared((self.world_size, len(Channel)), torch.int32)
        own = self._mail[self.rank]
        own.zero_()
        own[:, list(FREE)] = 1
        torch.cuda.synchronize(device)
        self._pass, self._ended = 0, watchdog.word()
        self._watchdog = self._watch(group) if watchdog.is_wanted() else None

    def _watch(self, group: dist.ProcessGroup) -> "watchdog.Watchdog":
        """Return a watchdog that looks at what passes write when they end."""
        name = f"global rank {dist.get_rank()}, group of {self.world_size}"
        ended, limit = self._ended, watchdog.group_timeout_s(group, self._device)
        watching = watchdog.Watchdog(
            name,
            limit,
            lambda: watchdog.read(ended),
            partial(_empty_mailboxes, self._mail[self.rank]),
        )
        watchdog.start(watching)
        return watching

    def settle(self) -> None:
        """Wait on the host until every rank's work so far is done, before memory is given back."""
        self._refuse_capture()
        torch.cuda.synchronize(self._device)
        with torch.cuda.device(self._device):
            self._mail.handle.barrier()
        torch.cuda.synchronize(self._device)

    def capturing(self) -> bool:
        if self._device.index == torch.cuda.current_device():
            return torch.cuda.is_current_stream_capturing()
        with torch.cuda.device(self._device):
            return torch.cuda.is_current_stream_capturing()

    def record(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        if self._captured:
            event = torch.cuda.Event()  # the graph's own
        else:
            if self._recorded == len(self._events):
                self._events.append(torch.cuda.Event())
            event = self._events[self._recorded]
            self._recorded += 1
        event.record(stream)
        return event

    def wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        stream.wait_event(event)

    def open_pass(self) -> torch.cuda.Stream:
        stream = torch.cuda.current_stream(self._device)
        self._captured = self.capturing()
        if self._captured:
            return stream
        if self._watchdog is not None:
            self._pass = self._watchdog.open("a forward or a backward")
        if self._idle is not None:
            stream.wait_event(self._idle)
        return stream

    def close_pass(self, stream: torch.cuda.Stream) -> None:
        if self._captured:
            return
        if self._idle is None:
            self._idle = torch.cuda.Event()
        if self._watchdog is not None:
            self._memory.write(stream, self._ended.data_ptr(), self._pass)
        self._idle.record(stream)
        self._recorded = 0

    def copy(self, stream: torch.cuda.Stream, target: Tensor, source: Tensor) -> None:
        if target.is_contiguous() and source.is_contiguous() and target.dtype == source.dtype:
            # Torch would have to change streams first, which costs the host more than the copy.
            self._memory.copy(stream, target.data_ptr(), source.data_ptr(), source.nbytes)
            return
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)

    def compute(self, work: Callable[[], object]) -> None:
        work()

    def signal(self, stream: torch.cuda.Stream, peers: tuple[int, ...], channel: Channel) -> None:
        self._mail_operations("signal", stream, peers, channel)

    def take(self, stream: torch.cuda.Stream, peers: tuple[int, ...], channel: Channel) -> None:
        self._mail_operations("take", stream, peers, channel)

    def look(self, stream: torch.cuda.Stream, peers: tuple[int, ...], channel: Channel) -> None:
        self._mail_operations("look", stream, peers, channel)

    def shared(self, shape: Sequence[int], dtype: torch.dtype) -> "_Shared":
        from torch.distributed import _symmetric_memory as symmetric

        self._refuse_capture()
        shape = tuple(shape)
        with _without_multicast():
            flat = symmetric.empty(prod(shape), dtype=dtype, device=self._device)
            handle = symmetric.rendezvous(flat, self._group_name)
        return _Shared(
            handle,
            [
                flat.view(shape) if rank == self.rank else handle.get_buffer(rank, shape, dtype)
                for rank in range(self.world_size)
            ],
        )

    def local(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        self._refuse_capture()
        return torch.empty(tuple(shape), dtype=dtype, device=self._device)

    def _mail_operations(
        self, name: str, stream: torch.cuda.Stream, peers: tuple[int, ...], channel: Channel
    ) -> None:
        if not peers:
            return
        key = name, peers, channel
        if key not in self._prepared:
            operations = []
            for peer in peers:
                if name == "signal":
                    operations.append((_WRITE, self._mailbox(peer, self.rank, channel), 1))
                    continue
                mailbox = self._mailbox(self.rank, peer, channel)
                operations.append((_WAIT, mailbox, 1))
                if name == "take":
                    operations.append((_WRITE, mailbox, 0))
            self._prepared[key] = self._memory.prepare(operations)
        self._memory.run(stream, self._prepared[key])

    def _mailbox(self, of: int, sender: int, channel: Channel) -> int:
        return self._mail[of].data_ptr() + 4 * (sender * len(Channel) + channel)

    def _refuse_capture(self) -> None:
        if self.capturing():
            raise RuntimeError(
                "the copy-engine exchange allocates memory with its first forward and its first "
                "backward of a shape, which a CUDA graph cannot capture: run both once before"
            )


def _empty_mailboxes(mail: Tensor) -> str:
    """Say which of a rank's mailboxes [P, channels] are empty; may hang, as its GPU may."""
    with torch.cuda.stream(torch.cuda.Stream(mail.device)):
        empty = (mail.cpu() == 0).nonzero().tolist()
    said = ", ".join(f"{Channel(channel).name} of rank {peer}" for peer, channel in empty)
    return f"Empty mailboxes: {said}."


class _Shared(list[Tensor]):
    """A tensor of each rank, by rank, and the mapping that the peers' live in."""

    def __init__(self, handle: Any, tensors: list[Tensor]) -> None:
        super().__init__(tensors)
        self.handle = handle


@contextmanager
def _without_multicast() -> Iterator[None]:
    """Keep torch from making a multicast object of memory that nobody will reach that way."""
    before = os.environ.get(_NO_MULTICAST)
    os.environ[_NO_MULTICAST] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_MULTICAST]
        else:
            os.environ[_NO_MULTICAST] = before


class _StreamMemory:
    """The driver's operations on streams: write numbers, wait for numbers, copy bytes.

    A write is fenced behind the stream's earlier work.
    """

    def __init__(self) -> None:
        library = ctypes.CDLL("libcuda.so.1")
        pointer, size = ctypes.c_uint64, ctypes.c_size_t
        of_batch = [ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_uint]
        self._batch = _function(library, "cuStreamBatchMemOp", of_batch)
        of_value = [ctypes.c_void_p, pointer, ctypes.c_uint32, ctypes.c_uint]
        self._write = _function(library, "cuStreamWriteValue32", of_value)
        of_copy = [pointer, pointer, size, ctypes.c_void_p]
        self._copy = _function(library, "cuMemcpyAsync", of_copy)

    def prepare(self, operations: list[tuple[int, int, int]]) -> tuple[int, Any]:
        """Return (_WAIT or _WRITE, address, number) of each as `run` takes them.

        A wait is for at least the number.
        """
        batch = (_BatchMemOp * len(operations))()
        for place, (operation, address, number) in zip(batch, operations, strict=True):
            place.operation, place.address, place.value = operation, address, number
        return len(operations), batch

    def run(self, stream: torch.cuda.Stream, prepared: tuple[int, Any]) -> None:
        status = self._batch(stream.cuda_stream, *prepared, 0)
        _check("cuStreamBatchMemOp", status)

    def write(self, stream: torch.cuda.Stream, address: int, number: int) -> None:
        status = self._write(stream.cuda_stream, address, number, 0)
        _check("cuStreamWriteValue32", status)

    def copy(self, stream: torch.cuda.Stream, target: int, source: int, size: int) -> None:
        status = self._copy(target, source, size, stream.cuda_stream)
        _check("cuMemcpyAsync", status)


# CU_STREAM_MEM_OP_WAIT_VALUE_32 (with flags 0: greater or equal), CU_STREAM_MEM_OP_WRITE_VALUE_32
_WAIT, _WRITE = 1, 2


class _BatchMemOp(ctypes.Structure):
    """CUstreamBatchMemOpParams, a union of 48 bytes, as its waits and writes of 32 bits use it."""

    _fields_ = (
        ("operation", ctypes.c_uint64),
        ("address", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
        ("alias", ctypes.c_uint64),
        ("pad", ctypes.c_uint64),
    )


def _function(library: ctypes.CDLL, name: str, arguments: list[Any]) -> Any:
    function = getattr(library, f"{name}_v2", None) or getattr(library, name)
    function.argtypes = arguments
    function.restype = ctypes.c_int
    return function


def _check(name: str, status: int) -> None:
    if status:
        raise RuntimeError(f"{name} failed with CUDA driver error {status}")


@cache
def _driver() -> _StreamMemory:
    return _StreamMemory()


def _missing() -> list[str]:
    """Return what torch or the driver lacks."""
    reasons = []
    try:
        from torch.distributed import _symmetric_memory

        if not hasattr(_symmetric_memory, "rendezvous"):
            reasons.append(f"torch {torch.__version__} has no symmetric memory")
    except ImportError:
        reasons.append(f"torch {torch.__version__} has no symmetric memory")
    try:
        _driver()
    except (OSError, AttributeError) as error:
        reasons.append(f"the CUDA driver has no stream memory operations ({error})")
    return reasons


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
