"""Programs of ranks that exchange by copy engine, on emulated streams.

A `Member` is one rank's host: it runs the library's own loops over the exchange under test. Inputs
reach their tensors late, on the rank's own stream, and become NaN once a call has returned, as if
the caller reused their memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

import oracle
from ring_flash_attn.backends.base import Backend, state_dtype
from ring_flash_attn.backends.reference import ReferenceBackend
from ring_flash_attn.core.copy_engine import CopyEngineExchange
from ring_flash_attn.core.layout import Layout
from ring_flash_attn.core.peer_buffers import PeerBuffers, PeerStore, size_of
from ring_flash_attn.core.plan import plan_ring
from ring_flash_attn.core.ring import ring_backward, ring_forward
from ring_flash_attn.core.traffic import ring_traffic
from simulated_ring import Inputs, Shape, attention_of, inputs, truth
from stream_emulator import EmulatedTransport, World

FULL, CAUSAL, WINDOW = (False, (-1, -1)), (True, (-1, -1)), (True, (5, 0))


class Layer(NamedTuple):
    """One call over the whole sequence: where its rows lie, and who sees whom."""

    layout: str
    mask: tuple = CAUSAL
    local_len: int = 8
    batch: int = 1
    head_dim: int = 4
    sign: float = 1.0  # of k: layers with other keys have other results

    def given(self, world_size: int) -> Inputs:
        return _given(self, world_size)

    def want(self, world_size: int, rank: int) -> oracle.Result:
        """Return what a rank must get: its rows of the dense float64 result."""
        result = _truth(self, world_size)
        return oracle.Result(
            *(
                oracle.shard(x, self.layout, world_size, rank, 2 if name == "lse" else 1)
                for name, x in zip(oracle.Result._fields, result, strict=True)
            )
        )


@cache
def _given(layer: Layer, world_size: int) -> Inputs:
    rows = layer.local_len * world_size
    given = inputs(Shape(rows, rows, layer.batch, head_dim=layer.head_dim))
    return given._replace(k=given.k * layer.sign, v=given.v * layer.sign)


@cache
def _truth(layer: Layer, world_size: int) -> oracle.Result:
    return truth(layer.mask, _given(layer, world_size))[0]


class Streamed:
    """A backend whose steps run when the caller's stream comes to them."""

    def __init__(self, transport: EmulatedTransport, backend: Backend) -> None:
        self._transport, self._backend = transport, backend
        self.prepare_backward = backend.prepare_backward

    def forward(self, *arguments) -> None:
        self._transport.do("forward", lambda: self._backend.forward(*arguments))

    def backward(self, attention, step, saved, q, k, v, dq, dkv_target, result) -> None:
        target = dkv_target()
        arguments = attention, step, saved, q, k, v, dq, lambda: target, result
        self._transport.do("backward", lambda: self._backend.backward(*arguments))


class Broken(Streamed):
    """A backend that raises at a step."""

    def __init__(self, transport: EmulatedTransport, backend: Backend, step: int) -> None:
        super().__init__(transport, backend)
        self._step = step

    def forward(self, attention, step, *arguments) -> None:
        if step.step == self._step:
            raise MemoryError
        super().forward(attention, step, *arguments)

    def backward(self, attention, step, *arguments) -> None:
        if step.step == self._step:
            raise MemoryError
        super().backward(attention, step, *arguments)


class Held:
    """What a rank keeps of a layer between forward and backward, and its results."""

    def __init__(self, layer: Layer, shards: list[Tensor]) -> None:
        self.layer = layer
        self.tensors = [torch.full_like(x, torch.nan) for x in shards]  # q, k, v, dout, dlse
        self.results: list[Tensor] = []


class Member:
    """One rank's host.

    Args:
        runs: what computes the steps; dtype: of what it gets.
        merges: whether several sources may share a launch.
    """

    def __init__(
        self,
        world: World,
        rank: int,
        exchange: type = CopyEngineExchange,
        runs: Backend | None = None,
        dtype: torch.dtype = torch.float64,
        merges: bool = False,
    ) -> None:
        self._merges = merges
        self.rank, self.size = rank, world.size
        self.transport = world.ranks[rank]
        self._exchange, self._runs = exchange, runs or ReferenceBackend()
        self._device, self._dtype = world.device, dtype
        self._buffers: dict[tuple, PeerBuffers] = {}
        self._store: PeerStore | None = None

    def forward(self, layer: Layer, backend: type = Streamed, **options) -> Held:
        held = self.load(layer)
        q, k, v, *_ = held.tensors
        with self._pass(held, k, v, False) as (plan, exchange):
            runs = backend(self.transport, self._runs, **options)
            out, lse = ring_forward(attention_of(layer.mask), plan, runs, exchange, q)
            held.results = [out, lse]
        return held

    def backward(self, held: Held, backend: type = Streamed, **options) -> None:
        q, k, v, dout, dlse = held.tensors
        with self._pass(held, k, v, True) as (plan, exchange):
            runs = backend(self.transport, self._runs, **options)
            saved = runs.prepare_backward(dout, *held.results[:2], dlse)
            grads = ring_backward(attention_of(held.layer.mask), plan, runs, exchange, saved, q)
            held.results += grads

    def free(self, held: Held) -> None:
        """Let the caller's memory be used for something else."""
        for x in held.tensors:
            self.transport.do("reuse", lambda x=x: x.fill_(torch.nan))

    def poison(self) -> None:
        """Fill what is this rank's own, between passes."""
        for buffers in self._buffers.values():
            for x in buffers.slots:
                self.transport.do("poison", lambda x=x: x.fill_(torch.nan))

    def buffers(self, k: Tensor) -> PeerBuffers:
        key = tuple(k.shape), k.dtype
        if key not in self._buffers:
            # One memory for all shapes that fit, as `choose` has it.
            size = size_of(tuple(k.shape), self.size)
            if self._store is None or not self._store.size.holds(size):
                state = state_dtype(k.dtype)
                self._store = PeerStore(self.transport, size, k.dtype, state)
            self._buffers[key] = PeerBuffers(self._store, tuple(k.shape))
        return self._buffers[key]

    @contextmanager
    def _pass(self, held: Held, k: Tensor, v: Tensor, backward: bool) -> Iterator[tuple]:
        plan, traffic = self.plan(held.layer)
        state = state_dtype(k.dtype)
        given = self.buffers(k), traffic, plan, k, v, state, backward, self._merges
        exchange = self._exchange(*given)
        try:
            yield exchange.plan, exchange
        except MemoryError:
            exchange.abandon()

    def plan(self, layer: Layer) -> tuple:
        """Return this rank's steps and traffic."""
        attention, rows = attention_of(layer.mask), Layout(layer.layout, layer.local_len, self.size)
        plan = plan_ring(attention, rows, rows, self.rank)
        return plan, ring_traffic(attention, rows, rows, self.rank)

    def shards(self, layer: Layer) -> list[Tensor]:
        """Return this rank's rows of q, k, v, dout, dlse."""
        given = layer.given(self.size)
        shards = [oracle.shard(x, layer.layout, self.size, self.rank) for x in given[:4]]
        assert given.dlse is not None
        return [*shards, oracle.shard(given.dlse, layer.layout, self.size, self.rank, 2)]

    def want(self, layer: Layer) -> oracle.Result:
        return layer.want(self.size, self.rank)

    def load(self, layer: Layer) -> Held:
        """Return tensors of NaN that become this rank's shards when its stream comes to it."""
        shards = [x.to(self._device, self._dtype) for x in self.shards(layer)]
        shards[4] = shards[4].to(state_dtype(self._dtype))
        held = Held(layer, shards)
        for target, x in zip(held.tensors, shards, strict=True):
            self.transport.do("input", lambda target=target, x=x: target.copy_(x))
        return held


def wrong(member: Member, held: Held, bound: float = 1e-10) -> list[str]:
    """Return the results that differ from the dense ones by more than rounding."""
    want = member.want(held.layer)
    names = oracle.Result._fields[: len(held.results)]
    return [
        f"{name} on rank {member.rank} of {held.layer}"
        for name, x in zip(names, held.results, strict=True)
        if not torch.allclose(x.cpu().double(), getattr(want, name), rtol=0, atol=bound)
    ]
