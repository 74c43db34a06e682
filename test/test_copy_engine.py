"""The copy-engine exchange itself, on emulated streams: every order that its waits allow.

Numbers are float64 through the reference backend, compared with the dense oracle and, bit for bit,
with the ring over gloo. Memory that nobody wrote is NaN.
"""

from functools import partial

import pytest
import torch

import oracle
from copy_engine_programs import (
    MIXED,
    bad_luck,
    execute,
    infer,
    interleave,
    pair,
    recompute,
    train,
    two_streams,
)
from copy_engine_ranks import CAUSAL, FULL, WINDOW, Broken, Layer, Member, wrong
from ranks import run_ranks
from ring_flash_attn.core import merge, schedule
from ring_flash_attn.core.attention import Attention
from ring_flash_attn.core.copy_engine import CopyEngineExchange
from ring_flash_attn.core.layout import Layout
from ring_flash_attn.core.peer_buffers import PeerBuffers, PeerStore, copy_engine_bytes, size_of
from ring_flash_attn.core.plan import plan_ring
from ring_flash_attn.core.traffic import ring_traffic
from stream_emulator import World

pytestmark = pytest.mark.usefixtures("empty_is_nan")


# ---- it computes attention


@pytest.mark.parametrize("mask", [FULL, CAUSAL, WINDOW, (False, (9, 3))], ids=str)
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 3, 4], ids=lambda n: f"P{n}")
def test_float64_passes_equal_dense(size, layout, mask):
    program = partial(train, pair(layout, mask, local_len=6, batch=2))
    for seed in range(3):
        assert not execute(program, size, seed)


@pytest.mark.parametrize("mask", [FULL, CAUSAL, WINDOW], ids=str)
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
@pytest.mark.parametrize(
    ("size", "sources", "first"),
    [(3, 3, None), (4, 3, 1), (4, 2, None), (6, 2, 1), (6, 3, None), (8, 3, 1)],
)
def test_several_sources_in_a_launch_equal_dense(size, sources, first, layout, mask, monkeypatch):
    monkeypatch.setattr(merge, "SOURCES", sources)
    # Forward alone, so that the passes of a plan differ.
    monkeypatch.setattr(schedule, "first_round", lambda *given: None if given[2] else first)
    program = partial(train, pair(layout, mask, local_len=6))
    for seed in range(2):
        assert not execute(program, size, seed, merges=True)


PROGRAMS = {
    "train": partial(train, MIXED),
    "infer": partial(infer, MIXED),
    "interleave": partial(interleave, MIXED),
    "recompute": partial(recompute, MIXED[::2]),
    "two streams": partial(two_streams, MIXED),
    "two shapes": partial(train, [Layer("zigzag"), Layer("zigzag", local_len=4)]),
    "three shapes in one memory": partial(
        train, [Layer("zigzag"), Layer("contiguous", local_len=4), Layer("stripe", local_len=6)]
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize(
    ("size", "merges"), [(2, False), (3, False), (4, False), (3, True), (5, True)]
)
def test_programs_are_right_whoever_is_slow(size, merges, name):
    for seed, slow in enumerate(bad_luck(size)):
        assert not execute(PROGRAMS[name], size, seed, slow, merges=merges), f"slow: {slow}"


def test_a_merged_pass_launches_once_for_several_sources():
    launched = {}
    for merges in (False, True):
        world = World(4)
        members = [Member(world, rank, merges=merges) for rank in range(4)]
        kept = [train([Layer("zigzag")], member) for member in members]
        names = [operation.name for stream in world.streams for operation, _ in stream.queue]
        world.run(0)
        for member, [held] in zip(members, kept, strict=True):
            assert not wrong(member, held)
        launched[merges] = names.count("forward"), names.count("backward")
    assert launched == {False: (16, 16), True: (8, 8)}


def ring_results(rank, size, layers):
    """Return out, lse, dq, dk, dv of the ring over gloo, by layer."""
    from ring_flash_attn.backends.reference import ReferenceBackend
    from ring_flash_attn.core.function import Call, run_backward, run_forward
    from ring_flash_attn.core.layout import Layout
    from ring_flash_attn.core.plan import plan_ring
    from simulated_ring import attention_of

    results = []
    for layer in layers:
        q, k, v, dout = (oracle.shard(x, layer.layout, size, rank) for x in layer.given(size)[:4])
        dlse = oracle.shard(layer.given(size).dlse, layer.layout, size, rank, 2)
        attention, layout = attention_of(layer.mask), Layout(layer.layout, layer.local_len, size)
        call = Call(attention, plan_ring(attention, layout, layout, rank), ReferenceBackend())
        out, lse = run_forward(call, q, k, v)
        results.append([out, lse, *run_backward(call, dout, q, k, v, out, lse, dlse)])
    return results


def test_results_equal_the_ring_s():
    size, layers = 3, [Layer(layout, mask) for layout in oracle.LAYOUTS for mask in (FULL, WINDOW)]
    ring = run_ranks(size, ring_results, size, layers)
    world = World(size)
    members = [Member(world, rank) for rank in range(size)]
    kept = [train(layers, member) for member in members]
    world.run(0)
    for rank in range(size):
        for held, theirs in zip(kept[rank], ring[rank], strict=True):
            out, lse, dq, dk, dv = held.results
            for x, y in zip((out, lse, dq), theirs, strict=False):
                assert torch.equal(x, y), held.layer
            for x, y in zip((dk, dv), theirs[3:], strict=True):  # summed in another order
                torch.testing.assert_close(x, y, rtol=0, atol=1e-13)


def test_the_order_of_events_changes_no_bit():
    def bits(seed):
        world = World(3)
        kept = [train(pair("zigzag"), Member(world, rank)) for rank in range(3)]
        world.run(seed)
        return [x for rank in kept for held in rank for x in held.results]

    first = bits(0)
    for seed in range(1, 10):
        assert all(torch.equal(x, y) for x, y in zip(first, bits(seed), strict=True))


def test_a_captured_pass_replays_with_fresh_inputs():
    size, layer = 3, Layer("zigzag")
    other = layer._replace(sign=-0.7)
    world = World(size)
    members = [Member(world, rank) for rank in range(size)]
    for member in members:
        train([layer], member)
    world.run(0)
    captured = []
    for member in members:
        with member.transport.capture() as graph:
            held = member.forward(layer)
            member.backward(held)
        # The capture loads the inputs of `layer`; what a replay reads are those of `other`.
        graph.operations = [x for x in graph.operations if x[1].name != "input"]
        own = member.load(other).tensors
        world.run(0)
        for target, x in zip(held.tensors, own, strict=True):
            target.copy_(x)
        held.layer = other
        captured.append((graph, held))
    for seed in range(3):
        for graph, _ in captured:
            graph.replay()
            graph.replay()
        for member in members:
            train([layer], member)  # calls outside the graph in between
        world.run(seed)
        assert world.at_rest()
        for member, (_, held) in zip(members, captured, strict=True):
            assert not wrong(member, held)


# ---- errors on one rank


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("broken", [0, 2])
def test_a_rank_that_fails_leaves_no_peer_waiting_and_no_wrong_number(layout, step, broken):
    size, layer = 3, Layer(layout)
    for seed, slow in enumerate(bad_luck(size)):
        world = World(size)
        members = [Member(world, rank) for rank in range(size)]
        kept, after = [], []
        for member in members:
            failing = {"backend": Broken, "step": step} if member.rank == broken else {}
            member.forward(layer, **failing)
            held = member.forward(layer)
            member.backward(held, **failing)
            kept.append(held)
            after.append(train([layer._replace(sign=-0.7)], member))
        world.run(seed, [x for x in world.streams if (x.rank, x.name) in slow])
        assert world.at_rest()
        for member, [held] in zip(members, after, strict=True):
            assert not wrong(member, held), "the next calls"
        for member, held in zip(members, kept, strict=True):
            if member.rank == broken:
                assert len(held.results) <= 2 or layout == "contiguous"
                continue
            for error in wrong(member, held):
                assert error.startswith(("dk", "dv")), "out, lse, dq need its keys alone"
                assert held.results[3].isnan().any(), "what is missing is loud"


# ---- memory


@pytest.mark.parametrize("size", [1, 2, 3, 4], ids=lambda n: f"P{n}")
def test_the_formula_counts_what_is_allocated(size):
    shape = (2, 64, 4, 16)
    world = World(size)
    ranks = [
        PeerStore(transport, size_of(shape, size), torch.bfloat16, torch.float32)
        for transport in world.ranks
    ]
    for backward in (False, True):
        if backward:
            for buffers in ranks:
                buffers.open_backward()
                buffers.open_backward()
        want = copy_engine_bytes(shape, torch.bfloat16, torch.float32, size, backward)
        assert world.bytes == [want] * size


def test_calls_allocate_once():
    world = World(3)
    members = [Member(world, rank) for rank in range(3)]
    for member in members:
        train([Layer("zigzag")], member)
    world.run(0)
    before = list(world.bytes)
    assert before == [copy_engine_bytes((1, 8, 1, 4), torch.float64, torch.float64, 3)] * 3
    for member in members:
        for _ in range(5):
            train([Layer("zigzag"), Layer("stripe")], member)
    world.run(1)
    assert world.bytes == before


class Log:
    """A transport of two ranks that only notes what it is asked to put on its side streams."""

    rank, world_size = 0, 2
    pull_stream = "pull"

    def __init__(self):
        self.calls = []

    def shared(self, shape, dtype):
        return [torch.zeros(shape, dtype=dtype) for _ in range(self.world_size)]

    def local(self, shape, dtype):
        return torch.zeros(shape, dtype=dtype)

    def open_pass(self):
        return "compute"

    def capturing(self):
        return False

    def record(self, stream):
        return object()

    def __getattr__(self, name):
        return lambda stream, *_: self.calls.append((name, stream))


def test_k_and_v_are_staged_before_step_0_and_fetched_behind_its_launch():
    """Its kernels leave no SM for the first, a copy within a GPU. They hide the second, which the
    GPU should not wait for the host to issue."""
    layout, attention = Layout("zigzag", 8, 2), Attention(1.0, True)
    plan, traffic = (
        plan_ring(attention, layout, layout, 0),
        ring_traffic(attention, layout, layout, 0),
    )
    k = torch.zeros(1, 8, 1, 4)
    log = Log()
    store = PeerStore(log, size_of(tuple(k.shape), 2), k.dtype, torch.float32)
    buffers = PeerBuffers(store, tuple(k.shape))
    exchange = CopyEngineExchange(buffers, traffic, plan, k, k, torch.float32, False)
    exchange.kv(0)
    assert log.calls.count(("copy", "pull")) == 2
    exchange.kv_done(0)
    assert log.calls.count(("copy", "pull")) > 2
