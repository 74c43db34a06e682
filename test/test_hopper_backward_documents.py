"""The Hopper backward in the emulator on packed documents: right, and none sees another's rows."""

from itertools import accumulate, pairwise

import pytest
import torch

import oracle
from hopper_backward_cases import CAUSAL, FULL, GRADIENTS, MARKS, emulation, wrong
from ring_flash_attn.backends.base import GradTarget
from ring_flash_attn.core.attention import Attention
from ring_flash_attn.core.packed import Documents, on_device, plan_packed
from simulated_ring import SCALE, Shape, inputs, poisoned, truth

pytestmark = MARKS


@pytest.fixture
def emulated(monkeypatch):
    yield from emulation(monkeypatch)


LENGTHS = (130, 2, 200, 66)
EDGES = [0, *accumulate(LENGTHS)]
FILLED = (*LENGTHS, 9)  # nine rows of no document


def documents(backend, layout, mask, given, saved):
    """Return dq, dk, dv of documents of LENGTHS on a ring of one rank, and of the rows after."""
    attention = Attention(SCALE, *mask)
    cu_seqlens = torch.tensor(EDGES, dtype=torch.int32)
    rows = given.q.shape[1]
    plan = on_device(
        plan_packed(attention, layout, 1, 0), Documents(cu_seqlens, cu_seqlens, rows, rows)
    )
    result = poisoned(given.q, given.q.dtype)
    dk, dv = (poisoned(given.k, torch.float32) for _ in range(2))
    for step in plan.steps:
        target = GradTarget(dk, dv, add=False)
        arguments = step, saved, *given[:3], None
        backend.backward(attention, *arguments, lambda target=target: target, result)
    return result, dk, dv


def rows_of(given, begin, end):
    part = [x[:, begin:end] for x in given[:4]]
    return type(given)(*part, given.dlse[:, :, begin:end])


def prepared(backend, mask, given):
    """Return what prepare_backward makes of the true out and lse, document by document."""
    out = torch.zeros_like(given.q)
    lse = torch.full(given.dlse.shape, -torch.inf)
    for begin, end in pairwise(EDGES):
        want, _ = truth(mask, rows_of(given, begin, end))
        out[:, begin:end], lse[:, :, begin:end] = want.out, want.lse
    return backend.prepare_backward(given.dout, out, lse, given.dlse)


PACKED = [
    ("stripe", CAUSAL, 128),
    ("stripe", FULL, 64),
    ("stripe", (True, (30, 0)), 96),
    ("zigzag", CAUSAL, 64),
    ("zigzag", (True, (30, 0)), 128),
    ("stripe", CAUSAL, 256),
    ("zigzag", (True, (30, 0)), 192),
]


@pytest.mark.parametrize(("layout", "mask", "head_dim"), PACKED, ids=str)
def test_documents_equal_dense_and_nan_stays_in_its_own(emulated, layout, mask, head_dim):
    backend = emulated()
    given = inputs(Shape(sum(FILLED), sum(FILLED), 1, 2, 1, head_dim), torch.bfloat16)
    got = documents(backend, layout, mask, given, prepared(backend, mask, given))
    for begin, end in pairwise(EDGES):
        part = rows_of(given, begin, end)
        want, seen = truth(mask, part)
        dense = oracle.dense_in_dtype(*part[:3], seen, part.dout, part.dlse, SCALE)
        broken = wrong([x[:, begin:end] for x in got], want, dense)
        assert not broken, "\n".join(broken)
    assert all((x[:, EDGES[-1] :] == 0).all() for x in got)
    assert not leaked(backend, layout, mask, given, got)


def leaked(backend, layout, mask, given, got):
    """Return which gradients differ where NaN fills other documents' rows, and nobody's rows."""
    begin, end = EDGES[2:4]
    spoiled = type(given)(*(x.clone() for x in given))
    for x in spoiled[:4]:
        x[:, begin:end] = torch.nan
        x[:, EDGES[-1] :] = torch.nan
    saved = prepared(backend, mask, spoiled)
    saved.lse[:, :, begin:end] = torch.nan
    again = documents(backend, layout, mask, spoiled, saved)
    assert all(x[:, begin:end].isnan().all() for x in again)
    others = [*range(begin), *range(end, EDGES[-1])]
    pairs = zip(GRADIENTS, got, again, strict=True)
    return [name for name, x, y in pairs if not torch.equal(x[:, others], y[:, others])]


LEAKS = {
    "rows past the entry": ("FAR, end, FAR - end + row", "FAR, end + 5, FAR - end - 5 + row"),
    "lse past the entry": ("inside = rows < end", "inside = rows < end + 5"),
}


@pytest.mark.parametrize("name", LEAKS)
def test_planted_leaks_are_seen(emulated, name):
    given = inputs(Shape(sum(FILLED), sum(FILLED), 1, 2, 1, 64), torch.bfloat16)
    backend = emulated()
    got = documents(backend, "stripe", FULL, given, prepared(backend, FULL, given))
    backend = emulated(bugs=dict([LEAKS[name]]))
    assert leaked(backend, "stripe", FULL, given, got)


def test_a_row_that_no_tile_has_stays_as_it_was(emulated):
    """Zigzag needs even lengths; an odd one that nobody checked must be loud."""
    backend, edges = emulated(), torch.tensor([0, 20, 33, 50], dtype=torch.int32)
    given = inputs(Shape(50, 50, 1, 2, 1, 64), torch.bfloat16)
    attention = Attention(SCALE, True)
    plan = on_device(plan_packed(attention, "zigzag", 2, 0), Documents(edges, edges, 50, 50))
    lse = torch.zeros(given.dlse.shape)
    saved = backend.prepare_backward(given.dout, torch.zeros_like(given.q), lse, None)
    result, dq = poisoned(given.q, given.q.dtype), poisoned(given.q, torch.float32)
    for step in plan.steps:
        target = GradTarget(*(torch.zeros(given.k.shape) for _ in range(2)), not step.first)
        arguments = step, saved, *given[:3], dq
        backend.backward(attention, *arguments, lambda target=target: target, result)
    missed = [32, 49]
    assert result[:, missed].isnan().all()
    result[:, missed] = 0
    assert result.isfinite().all()
