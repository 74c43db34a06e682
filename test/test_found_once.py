"""What is found once for all calls that are alike: never for another one, and not kept for ever."""

import gc
import weakref
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import oracle
from ring_flash_attn.core import schedule, validate
from ring_flash_attn.core.attention import Attention
from ring_flash_attn.core.function import Call, RingAttention, run_forward
from ring_flash_attn.core.layout import Layout
from ring_flash_attn.core.packed import Documents, on_device, plan_packed
from ring_flash_attn.core.peer_buffers import PeerBuffers, PeerStore, size_of
from ring_flash_attn.core.plan import RingPlan, plan_local, plan_ring
from ring_flash_attn.core.traffic import packed_traffic, ring_traffic

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]
ROWS = 24


@pytest.fixture
def backend():
    from ring_flash_attn.backends.triton import TritonBackend

    return TritonBackend()


def draw(device, seed=0, rows=ROWS, head_dim=16):
    generator = torch.Generator().manual_seed(seed)
    heads = 2, 1, 1, 2
    return [torch.randn(1, rows, n, head_dim, generator=generator).to(device) for n in heads]


def dense(attention, tensors):
    """Return out, dq, dk, dv of attention over all rows in float64."""
    q, k, v, dout = (x.double() for x in tensors)
    rows = list(range(q.shape[1]))
    seen = oracle.visible(rows, rows, attention.causal, attention.window, q.device)
    result = oracle.dense(q, k, v, seen, dout, None, attention.softmax_scale)
    return result.out, result.dq, result.dk, result.dv


def compute(backend, plan, attention, tensors):
    """Return out, dq, dk, dv of a call."""
    q, k, v, dout = tensors
    call = Call(attention, plan, backend)
    out, lse = run_forward(call, q, k, v)
    with torch.no_grad():
        return out, *call.backward(dout, q, k, v, out, lse, None)


def close(got, want):
    for name, x, y in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=0, atol=2e-5, msg=lambda m, n=name: n + m)


@pytest.mark.kernel
def test_calls_that_are_alike_find_their_steps(backend, device):
    attention = Attention(0.3, True)
    plan = RingPlan(0, 1, (plan_local(attention, ROWS, ROWS),))
    for seed in range(3):
        tensors = draw(device, seed)
        close(compute(backend, plan, attention, tensors), dense(attention, tensors))
    assert len(backend._forwards) == len(backend._backwards) == 1


def strided(x):
    return torch.stack([x, x], 3)[:, :, :, 0]


def moved(x):
    """Return x at an address that is no multiple of 16."""
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)


@pytest.mark.kernel
@pytest.mark.parametrize("which", range(4), ids=["q", "k", "v", "dout"])
@pytest.mark.parametrize("change", [strided, moved])
def test_another_stride_or_address_finds_another_step(backend, device, change, which):
    attention = Attention(0.3, True)
    plan = RingPlan(0, 1, (plan_local(attention, ROWS, ROWS),))
    tensors = draw(device)
    want = dense(attention, tensors)
    close(compute(backend, plan, attention, tensors), want)
    tensors[which] = change(tensors[which])
    close(compute(backend, plan, attention, tensors), want)
    assert len(backend._backwards) == 2
    assert len(backend._forwards) == (1 if which == 3 else 2)


@pytest.mark.kernel
def test_another_scale_finds_another_step_of_the_same_plan(backend, device):
    tensors = draw(device)
    plan = RingPlan(0, 1, (plan_local(Attention(0.3, True), ROWS, ROWS),))
    for count, scale in enumerate((0.3, 0.7), 1):
        attention = Attention(scale, True)
        close(compute(backend, plan, attention, tensors), dense(attention, tensors))
        assert len(backend._forwards) == len(backend._backwards) == count


@pytest.mark.kernel
def test_documents_of_the_same_number_are_not_those_of_the_call_before(backend, device):
    attention = Attention(0.3, True)
    plan = plan_packed(attention, "contiguous", 1, 0)
    tensors = draw(device)
    for edges in ([0, 5, 24], [0, 20, 24], [0, 0, 24]):
        cu_seqlens = torch.tensor(edges, dtype=torch.int32, device=device)
        documents = Documents(cu_seqlens, cu_seqlens, ROWS, ROWS)
        parts = [
            dense(attention, [x[:, begin:end] for x in tensors])
            for begin, end in pairwise(edges)
            if begin < end
        ]
        want = [torch.cat(part, 1) for part in zip(*parts, strict=True)]
        close(compute(backend, on_device(plan, documents), attention, tensors), want)
    assert len(backend._forwards) == 1


@pytest.mark.kernel
def test_a_step_keeps_the_plan_that_it_is_known_by(backend, device):
    attention, tensors = Attention(0.3), draw(device)
    step = plan_local(attention, ROWS, ROWS)
    compute(backend, RingPlan(0, 1, (step,)), attention, tensors)
    [found] = backend._forwards.values()
    assert found.alive is step


@pytest.mark.kernel
def test_steps_are_bounded(backend, device, monkeypatch):
    from ring_flash_attn.backends import triton

    monkeypatch.setattr(triton, "_KEPT_STEPS", 3)
    tensors = draw(device)
    for number in range(1, 6):
        attention = Attention(0.1 * number)
        plan = RingPlan(0, 1, (plan_local(attention, ROWS, ROWS),))
        close(compute(backend, plan, attention, tensors), dense(attention, tensors))
        assert len(backend._forwards) <= 3 and len(backend._backwards) <= 3


class Memory:
    """Memory of this process alone."""

    def __init__(self, rank, size):
        self.rank, self.world_size = rank, size

    def shared(self, shape, dtype):
        return [self.local(shape, dtype) for _ in range(self.world_size)]

    def local(self, shape, dtype):
        return torch.zeros(tuple(shape), dtype=dtype)


def buffers_of(size, rows=8):
    shape = 1, rows, 1, 4
    store = PeerStore(Memory(0, size), size_of(shape, size), torch.float32, torch.float32)
    return PeerBuffers(store, shape)


def test_a_schedule_is_that_of_the_plan_the_pass_and_the_launches():
    buffers, layout = buffers_of(4), Layout("zigzag", 8, 4)
    given = {}
    for attention in (Attention(1.0, True), Attention(1.0, True, (9, 0))):
        plan = plan_ring(attention, layout, layout, 0)
        traffic = ring_traffic(attention, layout, layout, 0)
        for backward in (False, True):
            for merges in (False, True):
                given[attention, backward, merges] = traffic, plan, backward, merges
    made = {key: schedule.schedule_of(buffers, *x) for key, x in given.items()}
    assert len({id(x) for x in made.values()}) == 8
    for key, x in given.items():
        assert schedule.schedule_of(buffers, *x) is made[key]
        assert len(made[key].rounds) == (1 if key[2] else 3)
    # Both passes of a call walk the same steps.
    attention = Attention(1.0, True)
    plans = [
        made[attention, backward, True].steps_of(given[attention, backward, True][1])
        for backward in (False, True)
    ]
    assert plans[0] is plans[1]


def test_a_schedule_holds_neither_documents_nor_the_memory_it_is_kept_by():
    attention, buffers = Attention(1.0, True), buffers_of(4)
    plan, traffic = (
        plan_packed(attention, "zigzag", 4, 0),
        packed_traffic(attention, "zigzag", 4, 0, 8),
    )
    cu_seqlens = torch.tensor([0, 8], dtype=torch.int32)
    documents = Documents(cu_seqlens, cu_seqlens, 8, 8)
    placed = on_device(plan, documents)
    found = schedule.schedule_of(buffers, traffic, placed, True, True)
    assert found.steps_of(placed).steps[0].documents is documents
    gone = weakref.ref(documents), weakref.ref(buffers)
    gc.disable()
    try:
        del documents, placed, buffers
        assert [x() for x in gone] == [None, None]
    finally:
        gc.enable()


def test_schedules_are_bounded(monkeypatch):
    monkeypatch.setattr(schedule, "_KEPT", 3)
    buffers, layout = buffers_of(2), Layout("contiguous", 8, 2)
    for left in range(5):
        attention = Attention(1.0, True, (left, 0))
        plan, traffic = (f(attention, layout, layout, 0) for f in (plan_ring, ring_traffic))
        schedule.schedule_of(buffers, traffic, plan, False, False)
        assert len(buffers.schedules) <= 3


def test_what_has_passed_lets_nothing_else_pass(monkeypatch):
    monkeypatch.setattr(validate, "_passed", set())
    monkeypatch.setattr(validate, "_KEPT", 2)
    good = [torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 1, 8), torch.zeros(1, 4, 1, 8)]
    for _ in range(2):
        validate.check_tensors(*good)
    assert len(validate._passed) == 1
    for place, bad in ((0, np.zeros((1, 4, 2, 8))), (1, good[1].double()), (2, good[0]), (0, None)):
        with pytest.raises((TypeError, ValueError), match=r"^[qkv]"):
            validate.check_tensors(*good[:place], bad, *good[place + 1 :])
    alike = SimpleNamespace(dtype=torch.float32, device=torch.device("cpu"), shape=(1, 4, 2, 8))
    with pytest.raises(TypeError, match="q must be a tensor"):
        validate.check_tensors(alike, *good[1:])
    for rows in range(1, 9):
        validate.check_tensors(*(torch.zeros(1, rows, 1, 8) for _ in range(3)))
        assert len(validate._passed) <= 2


class Passes:
    """A call that returns q and sums of its rows, and gradients of ones."""

    def forward(self, q, k, v):
        assert q.dim() == k.dim() == v.dim() == 4
        return q.clone(), q.sum(-1).transpose(1, 2).contiguous()

    def backward(self, dout, q, k, v, out, lse, dlse):
        assert {x.dim() for x in (dout, q, k, v, out)} == {4} and lse.dim() == dlse.dim() == 3
        return torch.ones_like(q), torch.ones_like(k), torch.ones_like(v)


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_results_are_no_views_and_have_one_node(packed):
    q, k, v, _ = draw("cpu")
    if packed:
        q, k, v = (x[0].clone() for x in (q, k, v))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = RingAttention.apply(*leaves, Passes())
    assert out.shape == q.shape and lse.shape == q.sum(-1).transpose(-1, -2).shape
    assert out.grad_fn is lse.grad_fn and out._base is None and lse._base is None
    assert [type(x).__name__ for x, _ in out.grad_fn.next_functions[:3]] == ["AccumulateGrad"] * 3
    (out.sum() + lse.sum()).backward()
    assert all(torch.equal(x.grad, torch.ones_like(x)) for x in leaves)
