"""Two hundred repetitions of forwards and backwards, each bitwise the first, whoever is late.

Before each, what is received becomes NaN, and the ranks sleep: on the caller's stream before every
step's kernels, on the side stream before copies and signals, and on the host. On the CPU the test
itself runs, over the ring: what it compares, and that a wrong repetition is found.
"""

import random
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from ranks import gpu_of, gpu_transport, run_ranks
from ring_flash_attn import ring_attention
from ring_flash_attn.core import choose
from ring_flash_attn.core.peer_memory import PeerMemory

NAMES = ("out", "lse", "dq", "dk", "dv")
CLOCKS = 2_000_000  # of a GPU's sleep, at most: about a millisecond
OFTEN = 0.3  # share of steps, copies and signals that sleep
COMPARED = 5  # repetitions between two comparisons, so that their streams run into each other


class Way(NamedTuple):
    """How a run goes: local rows, what computes and carries, repetitions, and one to spoil."""

    rows: int
    backend: str
    exchange: str
    repetitions: int
    spoiled: int | None = None


# Different rows travel in each, and in the second not to every rank.
LAYERS = (
    {"layout": "zigzag", "causal": True},
    {"layout": "contiguous", "causal": True, "window_size": (100, 0)},
)


class Layer:
    """One layer's tensors on this rank, q, k, v, dout [1, L, H, D], and how it is called."""

    def __init__(self, index: int, rank: int, device: torch.device, way: Way) -> None:
        self._options = LAYERS[index] | {"backend": way.backend, "deterministic": True}
        generator = torch.Generator().manual_seed(10 * index + rank)
        head_dim, dtype = (128, torch.bfloat16) if device.type == "cuda" else (8, torch.float32)
        self._tensors = [
            torch.randn(1, way.rows, heads, head_dim, generator=generator).to(device, dtype)
            for heads in (8, 2, 2, 8)
        ]

    def forward(self, exchange: str) -> Callable[[], list[torch.Tensor]]:
        """Run the forward; return what runs the backward and returns out, lse, dq, dk, dv."""
        *inputs, dout = self._tensors
        leaves = [x.detach().requires_grad_() for x in inputs]
        out, lse = ring_attention(*leaves, exchange=exchange, **self._options)
        return lambda: [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]


def late(owner: type, name: str, stream: Callable[..., torch.cuda.Stream | None]) -> None:
    """Let a method put a sleep of the GPU on a stream first, now and then.

    stream: of the method's arguments; None for the current one.
    """
    works = getattr(owner, name)

    def slept(*given):
        if random.random() < OFTEN:
            with torch.cuda.stream(stream(*given)):
                torch.cuda._sleep(random.randrange(1000, CLOCKS))
        return works(*given)

    setattr(owner, name, slept)


def poison(rank: int) -> None:
    """Fill what this rank fetches, and what its peers hand in, with NaN."""
    for group in choose._groups.values():
        for store in group.stores.values():
            for x in (store.slots, *store.landing[rank : rank + 1]):
                x.fill_(torch.nan)


def differing(got: list[torch.Tensor], want: list[torch.Tensor]) -> list[str]:
    """Return the names of results that differ in a bit; a NaN does."""
    return [name for name, x, y in zip(NAMES, got, want, strict=True) if not torch.equal(x, y)]


def against(ring: list[torch.Tensor], got: list[torch.Tensor]) -> list[str]:
    """Return what differs from the ring's by more than rounding.

    It sums dk and dv in another order. From three ranks on one launch over several sources rounds
    the others differently too; lse, of float32, by less than numbers of 16 bits.
    """
    bad, merged = [], dist.get_world_size() > 2
    for name, x, y in zip(NAMES, got, ring, strict=True):
        rounding = 2**-16 if name == "lse" else 2**-7
        near = rounding * y.abs().max().item() if merged or name in ("dk", "dv") else 0.0
        if not torch.allclose(x, y, rtol=0, atol=near):
            bad.append(f"{name} against the ring")
    return bad


def repeated(rank: int, way: Way) -> list[str]:
    """Return what differs from the first calls in a bit, or from the ring by more than rounding."""
    on_gpu = torch.cuda.is_available()
    device = gpu_of(rank) if on_gpu else torch.device("cpu")
    layers = [Layer(index, rank, device, way) for index in range(len(LAYERS))]
    first = [layer.forward(way.exchange)() for layer in layers]
    complaints = []
    for layer, results in zip(layers, first, strict=True):
        complaints += against(layer.forward("ring")(), results)
    random.seed(rank)  # other sleeps on each rank
    if on_gpu:
        from ring_flash_attn.backends.triton import TritonBackend

        for name in ("forward", "backward"):
            late(TritonBackend, name, lambda *_: None)
        for name in ("copy", "signal"):
            late(PeerMemory, name, lambda _, stream, *__: stream)
    kept = []
    for index in range(way.repetitions):
        poison(rank)
        backward = layers[index % 2].forward(way.exchange)
        between = layers[1 - index % 2].forward(way.exchange)  # a later layer's, as in a pipeline
        results = [(index % 2, backward()), (1 - index % 2, between())]
        if index == way.spoiled:
            results[0][1][3][0, 0, 0, 0] += 1
        kept += [(index, *each) for each in results]
        time.sleep(random.random() * 2e-3)
        if len(kept) >= 2 * COMPARED or index == way.repetitions - 1:
            for number, layer, got in kept:
                bad = differing(got, first[layer])
                complaints += [f"{name} of layer {layer}, repetition {number}" for name in bad]
            kept.clear()
    return complaints


def test_repetitions_on_the_cpu():
    assert run_ranks(2, repeated, Way(120, "reference", "ring", 6)) == [[], []]


def test_a_wrong_repetition_is_found():
    found = run_ranks(2, repeated, Way(120, "reference", "ring", 4, spoiled=2))
    assert found == [["dk of layer 0, repetition 2"]] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2, 4])
def test_repetitions_on_gpus(size):
    way = Way(1024, "triton", "copy-engine", 200)
    transport = gpu_transport(size)
    assert run_ranks(size, repeated, way, transport=transport, timeout_s=300) == [[]] * size
