"""Several ranks' asynchronous streams on one CPU, to run a `Transport`'s users without GPUs.

A program puts operations on streams and never waits, as a host that runs ahead of its GPU. `run`
then executes them one by one: each time the head of any stream that may go on, drawn at random.
So every order that streams, events and mailboxes allow can come, and an order that is missing from
a protocol comes too. Streams in `slow` go on only when no other can, which is how bad luck looks.

What shows: numbers (memory starts as NaN), a signal into a mailbox that is still full (on a GPU it
would be lost), and ranks that wait for each other.
"""

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ring_flash_attn.core.transport import FREE, Channel


class Stuck(Exception):
    """No stream can go on."""


class LostSignal(Exception):
    """A signal came into a mailbox that was still full."""


class Operation(NamedTuple):
    """What a stream does next.

    `ready` and `run` are given the events that have happened in this launch.
    """

    name: str
    run: Callable[[set], None]
    ready: Callable[[set], bool] = lambda happened: True


class Stream:
    """Operations of one rank that run in order."""

    def __init__(self, rank: int, name: str) -> None:
        self.rank, self.name = rank, name
        self.queue: deque[tuple[Operation, set]] = deque()

    def may_go_on(self) -> bool:
        if not self.queue:
            return False
        operation, happened = self.queue[0]
        return operation.ready(happened)

    def head(self) -> str:
        return f"rank {self.rank}, {self.name}: {self.queue[0][0].name}"

    def go_on(self) -> None:
        operation, happened = self.queue.popleft()
        operation.run(happened)


class IllegalCapture(Exception):
    """CUDA would not capture this."""


class Graph:
    """Operations that were captured instead of put on their streams, by CUDA's rules.

    A side stream takes part once it waits for an event of the capture, nothing may wait for an
    event from outside, and what side streams do must be behind an event that the caller waits for.
    """

    def __init__(self, caller: Stream) -> None:
        self.operations: list[tuple[Stream, Operation]] = []
        self._caller = caller
        self._length = {caller: 0}  # of the streams that take part
        self._events: dict[object, tuple[Stream, int]] = {}
        self._joined: dict[Stream, int] = {}

    def put(self, stream: Stream, operation: Operation) -> None:
        if stream not in self._length:
            raise IllegalCapture(f"{operation.name} on {stream.name}, which has not been forked")
        self._length[stream] += 1
        self.operations.append((stream, operation))

    def recorded(self, stream: Stream, event: object) -> None:
        self._events[event] = stream, self._length[stream]

    def waits(self, stream: Stream, event: object) -> None:
        if event not in self._events:
            raise IllegalCapture("a wait for an event from outside the capture")
        self._length.setdefault(stream, 0)
        if stream is self._caller:
            of, length = self._events[event]
            self._joined[of] = max(length, self._joined.get(of, 0))

    def close(self) -> None:
        for stream, length in self._length.items():
            if stream is not self._caller and self._joined.get(stream, 0) < length:
                raise IllegalCapture(f"{stream.name} has not been joined")

    def replay(self) -> None:
        """Put them all on their streams again. Events happen in each replay for itself."""
        happened: set = set()
        for stream, operation in self.operations:
            stream.queue.append((operation, happened))


class World:
    """The ranks of one group, their memory and their mailboxes."""

    def __init__(self, size: int, device: str = "cpu") -> None:
        self.size, self.device = size, device
        self.mail = {
            (of, sender, channel): channel in FREE
            for of in range(size)
            for sender in range(size)
            for channel in Channel
        }
        self.streams: list[Stream] = []
        self.shared: list[list[Tensor]] = []
        self.bytes = [0] * size
        self.copied = [0] * size  # bytes that each rank has copied from or to a peer
        self.ranks = [EmulatedTransport(self, rank) for rank in range(size)]

    def stream(self, rank: int, name: str) -> Stream:
        self.streams.append(Stream(rank, name))
        return self.streams[-1]

    def run(self, seed: int, slow: Iterable[Stream] = ()) -> None:
        """Do all that was put on streams.

        Raises:
            Stuck, LostSignal: the protocol is broken.
        """
        draw, slow = random.Random(seed), set(slow)
        while any(stream.queue for stream in self.streams):
            able = [stream for stream in self.streams if stream.may_go_on()]
            if not able:
                waiting = [
                    f"{x.rank} {x.name}: {x.queue[0][0].name}" for x in self.streams if x.queue
                ]
                raise Stuck("; ".join(waiting))
            draw.choice([stream for stream in able if stream not in slow] or able).go_on()

    def of_peer(self, rank: int, x: Tensor) -> bool:
        """Whether a tensor lies in the shared memory of another rank."""
        address = x.untyped_storage().data_ptr()
        return any(
            address == theirs.untyped_storage().data_ptr()
            for tensors in self.shared
            for owner, theirs in enumerate(tensors)
            if owner != rank
        )

    def at_rest(self) -> bool:
        """Whether the mailboxes are as they were at the start."""
        return all(full == (channel in FREE) for (_, _, channel), full in self.mail.items())


class EmulatedTransport:
    """The `Transport` of one rank of a `World`; see there for the methods.

    Attributes:
        caller: the stream of the rank's own calls. Tests may set another.
    """

    def __init__(self, world: World, rank: int) -> None:
        self.rank, self.world_size = rank, world.size
        self.caller = world.stream(rank, "caller")
        self.pull_stream = world.stream(rank, "pull")
        self._idle: object | None = None
        self._world, self._allocated = world, 0
        self._graph: Graph | None = None
        self._eager: set = set()

    def put(self, stream: Stream, operation: Operation) -> None:
        if self._graph is not None:
            self._graph.put(stream, operation)
        else:
            stream.queue.append((operation, self._eager))

    def do(self, name: str, run: Callable[[], object]) -> None:
        """Put work of the caller on its stream."""
        self.put(self.caller, Operation(name, lambda happened: run()))

    @contextmanager
    def capture(self) -> Iterator[Graph]:
        """Collect the operations inside instead of running them."""
        self._graph = graph = Graph(self.caller)
        try:
            yield graph
            graph.close()
        finally:
            self._graph = None

    def capturing(self) -> bool:
        return self._graph is not None

    def record(self, stream: Stream) -> object:
        event = object()
        self.put(stream, Operation("record", lambda happened: happened.add(event)))
        if self._graph is not None:
            self._graph.recorded(stream, event)
        return event

    def wait(self, stream: Stream, event: object) -> None:
        if self._graph is not None:
            self._graph.waits(stream, event)
        self.put(stream, Operation("wait", lambda _: None, lambda happened: event in happened))

    def copy(self, stream: Stream, target: Tensor, source: Tensor) -> None:
        assert target.shape == source.shape, "a copy does not broadcast"

        def run(happened: set) -> None:
            target.copy_(source)
            if self._world.of_peer(self.rank, target) or self._world.of_peer(self.rank, source):
                self._world.copied[self.rank] += target.nbytes

        self.put(stream, Operation("copy", run))

    def open_pass(self) -> Stream:
        if self._idle is not None and self._graph is None:
            self.wait(self.caller, self._idle)
        return self.caller

    def close_pass(self, stream: Stream) -> None:
        if self._graph is None:
            self._idle = self.record(stream)

    def compute(self, work: Callable[[], object]) -> None:
        self.do("compute", work)

    def signal(self, stream: Stream, peers: tuple[int, ...], channel: Channel) -> None:
        for peer in peers:
            self._signal(stream, peer, channel)

    def _signal(self, stream: Stream, peer: int, channel: Channel) -> None:
        box = peer, self.rank, channel

        def run(happened: set) -> None:
            if self._world.mail[box]:
                raise LostSignal(f"{channel.name} from rank {self.rank} to rank {peer}")
            self._world.mail[box] = True

        self.put(stream, Operation(f"signal {channel.name} to {peer}", run))

    def take(self, stream: Stream, peers: tuple[int, ...], channel: Channel) -> None:
        for peer in peers:
            self._await(stream, peer, channel, False)

    def look(self, stream: Stream, peers: tuple[int, ...], channel: Channel) -> None:
        for peer in peers:
            self._await(stream, peer, channel, True)

    def _await(self, stream: Stream, peer: int, channel: Channel, full_after: bool) -> None:
        box, mail = (self.rank, peer, channel), self._world.mail

        def run(happened: set) -> None:
            mail[box] = full_after

        name = f"wait for {channel.name} from {peer}"
        self.put(stream, Operation(name, run, lambda happened: mail[box]))

    def shared(self, shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
        """Return the n-th allocation of every rank to the n-th caller of each."""
        if self._allocated == len(self._world.shared):
            tensors = [self._poisoned(shape, dtype) for _ in range(self.world_size)]
            self._world.shared.append(tensors)
        tensors = self._world.shared[self._allocated]
        self._allocated += 1
        self._world.bytes[self.rank] += tensors[self.rank].nbytes
        return tensors

    def local(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        tensor = self._poisoned(shape, dtype)
        self._world.bytes[self.rank] += tensor.nbytes
        return tensor

    def _poisoned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.full(tuple(shape), torch.nan, dtype=dtype, device=self._world.device)
