"""The Hopper backward, executed on the CPU by test/gluon_emulator.py with the library's own tables.

As test_hopper_forward.py: what the emulator cannot know test_aot.py and a GPU must show.
"""

from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import InterpreterError

import oracle
from gluon_emulator import EmulationError, load_module
from gluon_memory import TensorDescriptor
from ring_flash_attn.backends import hopper, hopper_backward
from ring_flash_attn.backends import launch as launching
from ring_flash_attn.backends import triton as triton_backend
from ring_flash_attn.backends.base import GradTarget, Saved, TargetOnRequest
from ring_flash_attn.backends.work import backward_inputs
from ring_flash_attn.core.attention import Attention
from ring_flash_attn.core.layout import Layout
from ring_flash_attn.core.merge import merge_plan
from ring_flash_attn.core.packed import Documents, on_device, plan_packed
from ring_flash_attn.core.plan import plan_local, plan_ring
from ring_flash_attn.kernels.hopper.configs import BACKWARD, WIDE, BackwardConfig, backward_config
from simulated_ring import SCALE, Shape, inputs, mask_id, poisoned, state_and_result, truth, zero

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(not hopper.SUPPORTED, reason="made for Triton 3.6"),
    # Triton's interpreter, which runs the kernels beside it.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]

FOLDER = Path(hopper.__file__).parents[1] / "kernels" / "hopper"
FILES = {
    "_hopper_bwd_kernel": "backward.py",
    "_hopper_dkv_kernel": "backward_wide.py",
    "_hopper_dq_kernel": "backward_wide_dq.py",
}
CAUSAL, FULL = (True, (-1, -1)), (False, (-1, -1))
GRADIENTS = ("dq", "dk", "dv")


def winning(head_dim):
    """Return a head dim's row as if it were the faster one."""
    row = backward_config(head_dim)
    return replace(row, wins=True) if isinstance(row, BackwardConfig) else row


@pytest.fixture
def emulated(monkeypatch):
    """Make a backend's backward run the Hopper kernels in the emulator; take a config to do so.

    `bugs` go into all kernels, or into the one named `bugged`.
    """

    def start(config=None, bugs=None, seed=None, bugged=None):
        @cache
        def kernel(name):
            planted = bugs if bugged in (None, name) else None
            return getattr(load_module(FOLDER / FILES[name], planted, seed=seed), name)

        def launch(given, grid, arguments, **options):
            name = given.fn.__name__
            runs = kernel(name) if name in FILES else given
            runs[grid](**arguments, **options)

        monkeypatch.setattr(launching, "launch", launch)
        monkeypatch.setattr(hopper, "TensorDescriptor", TensorDescriptor)
        monkeypatch.setattr(hopper, "unsupported_part", lambda *_: [])
        monkeypatch.setattr(hopper_backward, "backward_config", winning)
        triton_backend._choices.cache_clear()
        return triton_backend.TritonBackend(hopper_forward=False, hopper_backward=config or True)

    yield start
    triton_backend._choices.cache_clear()


def gradients(backend, mask, layout, size, given, landing=False):
    """Run every step of every rank backward, on the true out and lse; return dq, dk, dv.

    landing: as in simulated_ring.ring.
    """
    attention = Attention(SCALE, *mask)
    want, _ = truth(mask, given)
    out, lse = want.out.to(given.q.dtype), want.lse.float()

    def shards(x, dim=1):
        return [oracle.shard(x, layout, size, rank, dim) for rank in range(size)]

    q, k, v, dout, outs = (shards(x) for x in (*given[:4], out))
    lses, dlses = shards(lse, 2), shards(given.dlse, 2)
    layouts = [Layout(layout, x[0].shape[1], size) for x in (q, k)]
    plans = [plan_ring(attention, *layouts, rank) for rank in range(size)]
    states = [state_and_result(plan, x) for plan, x in zip(plans, q, strict=True)]
    saved = [backend.prepare_backward(*x) for x in zip(dout, outs, lses, dlses, strict=True)]
    dks, dvs = ([poisoned(x, torch.float32) for x in xs] for xs in (k, v))
    for hop in range(len(plans[0].steps)):
        for rank, plan in enumerate(plans):
            step = plan.steps[hop]
            source = step.source
            dk, dv = dks[source], dvs[source]
            if landing:
                dk, dv = poisoned(dk, torch.float32), poisoned(dv, torch.float32)
            target = GradTarget(dk, dv, add=not (landing or step.first))
            if not target.add:
                zero(dk, step.unseen_k())
                zero(dv, step.unseen_k())
            dq, result = states[rank]
            arguments = step, saved[rank], q[rank], k[source], v[source], dq
            ask = TargetOnRequest(lambda target=target: target, late=not landing)
            backend.backward(attention, *arguments, ask, result)
            if landing:
                dks[source] = dk if step.first else dks[source] + dk
                dvs[source] = dv if step.first else dvs[source] + dv
    dqs = [result for _, result in states]
    return [oracle.unshard(x, layout) for x in (dqs, dks, dvs)]


def wrong(got, want, dense):
    """Return what is beyond the bound of 16-bit results, in words."""
    found = []
    for name, x in zip(GRADIENTS, got, strict=True):
        ours = oracle.errors(x, getattr(want, name))
        allowed = oracle.errors(getattr(dense, name), getattr(want, name))
        for measure in ("max_abs", "rmse"):
            error, bound = getattr(ours, measure), 2 * getattr(allowed, measure) + 1e-5
            if not error <= bound:
                found.append(f"{name} {measure} {error} > {bound}")
    return found


def check(backend, mask, layout, size, given, landing=False):
    got = gradients(backend, mask, layout, size, given, landing)
    want, seen = truth(mask, given)
    q, k, v, dout, dlse = given
    return wrong(got, want, oracle.dense_in_dtype(q, k, v, seen, dout, dlse, SCALE))


CASES = [
    # layout, P, mask, shape, dtype
    ("contiguous", 1, CAUSAL, Shape(300, 300, 2, 2, 1, 128), torch.bfloat16),
    ("contiguous", 2, FULL, Shape(140, 300, 1, 3, 3, 64), torch.float16),
    ("contiguous", 1, (False, (3, 2)), Shape(400, 150, 1, 2, 1, 64), torch.bfloat16),
    ("contiguous", 2, CAUSAL, Shape(300, 300, 1, 2, 1, 80), torch.bfloat16),
    ("contiguous", 1, (True, (40, 0)), Shape(520, 520, 1, 1, 1, 96), torch.float16),
    ("zigzag", 2, CAUSAL, Shape(600, 600, 1, 4, 2, 128), torch.bfloat16),
    ("zigzag", 2, (True, (200, 0)), Shape(1000, 1000, 1, 1, 1, 64), torch.bfloat16),
    ("zigzag", 2, (False, (-1, 4)), Shape(520, 520, 1, 2, 1, 40), torch.float16),
    ("stripe", 3, CAUSAL, Shape(630, 630, 1, 2, 2, 64), torch.bfloat16),
    ("contiguous", 1, FULL, Shape(140, 200, 2, 2, 1, 256), torch.float16),
    ("zigzag", 2, (True, (90, 0)), Shape(300, 300, 1, 2, 1, 256), torch.bfloat16),
    ("stripe", 2, CAUSAL, Shape(200, 200, 1, 2, 2, 160), torch.bfloat16),
]


@pytest.mark.parametrize(
    ("layout", "size", "mask", "shape", "dtype"),
    CASES,
    ids=[f"{c[0]}-P{c[1]}-{mask_id(c[2])}-D{c[3].head_dim}" for c in CASES],
)
def test_rings_equal_dense(emulated, layout, size, mask, shape, dtype):
    broken = check(emulated(), mask, layout, size, inputs(shape, dtype))
    assert not broken, "\n".join(broken)


SMALL = Shape(270, 270, 1, 2, 1, 64)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dq_stages", [1, 2, 3])
def test_in_any_order(emulated, dq_stages, seed):
    backend = emulated(replace(BACKWARD[64], dq_stages=dq_stages), seed=seed)
    broken = check(backend, CAUSAL, "contiguous", 2, inputs(SMALL, torch.bfloat16))
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("block_m", "q_stages", "dout_stages"), [(64, 1, 1), (64, 3, 2), (128, 1, 2), (128, 2, 1)]
)
def test_any_number_of_stages_and_rows(emulated, block_m, q_stages, dout_stages):
    config = replace(BACKWARD[64], block_m=block_m, q_stages=q_stages, dout_stages=dout_stages)
    given = inputs(SMALL, torch.float16)
    assert not check(emulated(config), (False, (70, 30)), "contiguous", 1, given)


@pytest.mark.parametrize("keys_in_registers", [False, True])
def test_keys_as_operands_from_either_memory(emulated, keys_in_registers):
    given = inputs(SMALL, torch.bfloat16)
    backend = emulated(replace(BACKWARD[64], keys_in_registers=keys_in_registers))
    assert not check(backend, CAUSAL, "contiguous", 2, given)


@pytest.mark.parametrize("rotate", [False, True])
def test_full_attention_from_any_block_on(emulated, rotate):
    given = inputs(Shape(450, 600, 1, 2, 1, 64), torch.bfloat16)
    backend = emulated(replace(BACKWARD[64], rotate=rotate))
    assert not check(backend, FULL, "contiguous", 1, given)


@pytest.mark.parametrize(
    ("heads", "copies", "landing"),
    [((6, 1), 2, False), ((8, 2), 4, False), ((3, 1), 1, False), ((4, 1), 4, True)],
)
def test_few_programs_share_out_the_query_heads_of_a_key_head(
    emulated, monkeypatch, heads, copies, landing
):
    backend = emulated()
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: 10_000)
    used = set()
    launch_fused = hopper_backward.HopperStep.launch_fused

    def note(self, config, dq, target, copies=1):
        used.add(copies)
        assert target.dk.shape[2] == heads[1] * copies
        launch_fused(self, config, dq, target, copies)

    monkeypatch.setattr(hopper_backward.HopperStep, "launch_fused", note)
    given = inputs(Shape(144, 144, 2, *heads, 64), torch.bfloat16)
    broken = check(backend, CAUSAL, "zigzag" if landing else "contiguous", 2, given, landing)
    assert used == {copies} and not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("mask", "heads", "slots", "apart"),
    [
        (FULL, (2, 1), 1, False),
        (CAUSAL, (1, 1), 1, False),
        (CAUSAL, (3, 1), 1, True),
        ((True, (140, 0)), (3, 1), 2, True),
    ],
)
def test_slots_and_the_order_of_heads_are_as_chosen(
    emulated, monkeypatch, mask, heads, slots, apart
):
    backend, used = emulated(), set()
    fused_launch = hopper_backward._fused_launch

    def note(config, *rest):
        used.add((config.dq_stages, config.heads_apart))
        return fused_launch(config, *rest)

    monkeypatch.setattr(hopper_backward, "_fused_launch", note)
    given = inputs(Shape(270, 270, 1, *heads, 128), torch.bfloat16)
    broken = check(backend, mask, "contiguous", 1, given)
    assert used == {(slots, apart)} and not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("fragment", "instead"),
    [
        ("out_head // copies,", "out_head,"),
        ("out_head * group, group,", "out_head // copies * group, group,"),
    ],
)
def test_bugs_in_who_computes_which_heads_are_seen(emulated, monkeypatch, fragment, instead):
    backend = emulated(bugs={fragment: instead})
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: 10_000)
    given = inputs(Shape(136, 136, 1, 4, 2, 64), torch.bfloat16)
    with suppress(EmulationError, InterpreterError, IndexError):  # a head that is not there
        assert check(backend, CAUSAL, "contiguous", 1, given)


def test_shares_that_land_by_themselves(emulated):
    """A later step's target that is to be stored."""
    given = inputs(Shape(300, 300, 1, 2, 1, 64), torch.bfloat16)
    assert not check(emulated(), CAUSAL, "zigzag", 3, given, landing=True)


@pytest.mark.parametrize("programs", [1, 10_000], ids=["whole groups", "copies"])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_several_sources_in_a_launch(emulated, monkeypatch, head_dim, programs):
    """Each one's dk and dv go to where they would by themselves, what lies between to nowhere."""
    backend = emulated()
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: programs)
    size, rank, length, heads, key_heads = 4, 2, 88, 2, 1
    attention, layout = Attention(SCALE, True), Layout("zigzag", length, size)
    plan = plan_ring(attention, layout, layout, rank)
    given = inputs(Shape(length, length, 1, heads, key_heads, head_dim), torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    slots = torch.randn(3, 2, length, key_heads, head_dim, generator=generator).to(torch.bfloat16)
    span, row = 2 * length, key_heads * head_dim
    merged = merge_plan(plan, ((1, 2, 3),), span)
    want, _ = truth(CAUSAL, given)
    saved = backend.prepare_backward(
        given.dout, want.out.to(torch.bfloat16), want.lse.float() + 1.0, given.dlse.float()
    )

    def run(steps, keys, targets):
        dq = torch.zeros_like(given.q, dtype=torch.float32)
        for step, (k, v), target in zip(steps, keys, targets, strict=True):
            backend.backward(
                attention,
                step,
                saved,
                given.q,
                k,
                v,
                dq,
                TargetOnRequest(lambda x=target: x, False),
            )
        return dq

    # Landing slots of three owners, in no order, in one memory.
    apart, together = torch.full((2, 3, 3, 2, 1, length, key_heads, head_dim), torch.nan)
    places = [(2, 0), (0, 1), (1, 2)]
    shares = [[memory[place] for place in places] for memory in (apart, together)]
    own = [x.unsqueeze(1) for x in slots]
    each = [GradTarget(*share, add=False) for share in shares[0]]
    alone = run(plan.steps[1:], own, each)
    k, v = (
        x.as_strided((1, 2 * span + length, *x.shape[1:]), (0, *x.stride()), x.storage_offset())
        for x in slots[0]
    )
    first, *others = shares[1]
    numbers = [
        (share.data_ptr() - first.data_ptr()) // 4 - index * span * row
        for index, share in enumerate(shares[1])
    ]
    offsets = torch.tensor(numbers) // 4
    target = GradTarget(*first, add=False, others=tuple(map(tuple, others)), offsets=offsets)
    target.dk.reaches, target.dv.reaches = zip(*target.others, strict=True)
    got = run(merged.steps[1:], [(k, v)], [target])
    torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-5)
    for x, y in zip(*shares, strict=True):
        torch.testing.assert_close(y, x, rtol=0, atol=0, equal_nan=True)
    assert together.isnan().equal(apart.isnan()), "nothing else is written"


@pytest.mark.parametrize("head_dim", [64, 80])
def test_dk_and_dv_are_added_in_the_kernel(emulated, head_dim):
    """A first step whose target holds something."""
    backend, given = emulated(), inputs(Shape(200, 200, 2, 2, 1, head_dim), torch.bfloat16)
    attention = Attention(SCALE, True)
    step = plan_ring(attention, *[Layout("contiguous", 200, 1)] * 2, 0).steps[0]
    want, _ = truth(CAUSAL, given)
    q, k, v, dout, dlse = given
    saved = backend.prepare_backward(dout, want.out.bfloat16(), want.lse.float(), dlse)

    def backward(add, held):
        target = GradTarget(*(torch.full(k.shape, held) for _ in range(2)), add)
        result = poisoned(q, q.dtype)
        backend.backward(attention, step, saved, q, k, v, None, lambda: target, result)
        return target.dk, target.dv, result

    stored, added = backward(False, torch.nan), backward(True, 4.0)
    for x, y in zip(stored[:2], added[:2], strict=True):
        assert torch.equal(x + 4.0, y)
    assert torch.equal(stored[2], added[2])


def test_rows_that_saw_nothing_have_no_gradient(emulated):
    """Queries before the first key: their lse is -inf, and a block has such rows and others."""
    given = inputs(Shape(200, 150, 1, 2, 1, 64), torch.bfloat16)
    attention = Attention(SCALE, True)
    step = plan_local(attention, 200, 150)
    seen = oracle.visible(range(-50, 150), range(150), True)
    q, k, v, dout, dlse = given
    want = oracle.dense(*(x.double() for x in (q, k, v)), seen, dout.double(), dlse.double(), SCALE)
    saved_lse = want.lse.float()
    assert (saved_lse == -torch.inf).any()
    backend = emulated()
    saved = backend.prepare_backward(dout, want.out.bfloat16(), saved_lse, dlse)
    result, dk, dv = poisoned(q, q.dtype), *(poisoned(k, torch.float32) for _ in range(2))
    zero(result, step.unseen_q())
    # The step as a block that has all rows, the unseen ones too.
    block = step.blocks[0]._replace(q_begin=0)
    step = step._replace(blocks=(block,), finished=((0, 200),))
    target = GradTarget(dk, dv, False)
    backend.backward(attention, step, saved, q, k, v, None, lambda: target, result)
    dense = oracle.dense_in_dtype(q, k, v, seen, dout, dlse, SCALE)
    broken = wrong((result, dk, dv), want, dense)
    assert not broken, "\n".join(broken)
    assert (result[:, :50] == 0).all()


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


WAIT_DV = "    dv = warpgroup_mma_wait(1, [dv])\n"
RELEASE_DOUT = "    program.dout.release(dout_slot)\n"
WAIT_DK = "    dk = warpgroup_mma_wait(0, [dk])\n"
RELEASE_Q = "    program.q.release(q_slot)\n"
FENCE = "    fence_async_shared()\n"
HAND_ON, HAND_ON_LAST = (
    f"    _hand_on_dq(program, {t}, CONSUMER)\n" for t in ("t", "program.total")
)
BUGS = {
    "no wait for K": ("            await_full(program.k, c, 0)\n", "            pass\n"),
    "no wait for V": ("        await_full(program.v, CONSUMER, 0)\n", ""),
    "no wait for Q": ("    await_full(program.q, q_slot, t // Q_STAGES)\n", ""),
    "no wait for dout": ("    await_full(program.dout, dout_slot, t // DOUT_STAGES)\n", ""),
    "no wait for lse": ("q, box, FIRST_EMPTY, 2)", "q, box, FIRST_EMPTY)"),
    "phase of an empty slot": ("turn & 1 ^ 1)", "turn & 1)"),
    "phase of a full slot": ("full.index(slot), turn & 1)", "full.index(slot), 0)"),
    "dout released before its product": (WAIT_DV + RELEASE_DOUT, RELEASE_DOUT + WAIT_DV),
    "Q released before its product": (WAIT_DK + RELEASE_Q, RELEASE_Q + WAIT_DK),
    "Q never released": (RELEASE_Q, ""),
    "ds used before both have stored it": ("    meet(DS_FULL + turn)\n", ""),
    "dq used before it is there": ("    dq = warpgroup_mma_wait(0, [dq])\n", ""),
    "scores used before they are there": ("    s_t = warpgroup_mma_wait(1, [s_t])\n", ""),
    "dq stored where an older one is": (
        "    program.dq.await_empty(t % DQ_STAGES, t // DQ_STAGES)\n",
        "",
    ),
    "a slot of dq given back early": ("        tma.store_wait(DQ_STAGES - 1)\n", ""),
    "the wrong slot of dq given back": ("release((t + 1) % DQ_STAGES)", "release(t % DQ_STAGES)"),
    "a slot of dq given back before its time": ("t >= DQ_STAGES - 1:", "t >= 0:"),
    "the last dq not waited for": ("    tma.store_wait(0)\n", ""),
    "dq not waited for by the writer": ("        await_at(dq_full(program.options)", "# "),
    "a turn that is nobody's": ("    if turn == CONSUMER:\n", "    if turn > CONSUMER:\n"),
    "the other's turn": ("    if turn == CONSUMER:\n", "    if turn != CONSUMER:\n"),
    "ds announced by whose turn it is": ("turn != CONSUMER,", "turn == CONSUMER,"),
    "one barrier for both turns": {
        "arrive_if(DS_FULL + turn,": "arrive_if(DS_FULL,",
        "meet(DS_FULL + turn)": "meet(DS_FULL)",
    },
    "one slot of ds for both turns": {
        "ds.index(turn * CONSUMERS + CONSUMER)": "ds.index(turn * 0 + CONSUMER)",
        "ds.index(turn * CONSUMERS + c)": "ds.index(turn * 0 + c)",
    },
    "ds announced before it is fenced": (FENCE + HAND_ON, HAND_ON),
    "dq handed on by the other": ("(t - 1) % CONSUMERS == CONSUMER", "t % CONSUMERS == CONSUMER"),
    "dq handed on by whose turn it is, before it is there": {
        "(t - 1) % CONSUMERS == CONSUMER": "t % CONSUMERS == CONSUMER",
        "stage = (t - 1) %": "stage = t %",
    },
    "dq handed on where it is stored, without a fence": {
        "swapped).store(_swap_halves(dq))\n": "swapped).store(_swap_halves(dq))\n"
        "    arrive_if(dq_full(program.options) + t % DQ_STAGES, t >= 0, 128 + 32)\n",
        HAND_ON: "",
        FENCE + HAND_ON_LAST: "",
    },
    "the last dq not handed on": (HAND_ON_LAST, ""),
    "the last dq not fenced": (FENCE + HAND_ON_LAST, HAND_ON_LAST),
    "halves not swapped": ("gl.where(odd, low, high))", "high)"),
    "halves of even rows swapped": ("rows % 2 == 1", "rows % 2 == 0"),
    "a layout without the swap": ("[1, 4 ^ 16]", "[1, 4]"),
    "a layout without the swizzle": ("[2, 8], [4, 16]", "[2, 0], [4, 0]"),
    "mask a row too wide": ("(hi - lo + 1)", "(hi - lo + 2)"),
    "no mask on the left": ("(start < last + lo) | ", ""),
    "no mask on the right": (" | (start + BLOCK_M - 1 > row + hi)", ""),
    "keys past the tile": ("offs_n < walk.row_end, ", "offs_n < walk.row_end + 64, "),
    "the band of a query": ("lo, hi = -hi, -lo", "lo, hi = -lo, -hi"),
    "the last block left out": ("(last - first + BLOCK - 1)", "(last - first)"),
    "one head of the group": (
        "        head += 1\n        if",
        "        head += walk.group\n        if",
    ),
    "one head, where they are apart": (
        "                head += 1\n",
        "                head += 0\n",
    ),
    "a later head's first entry": ("entry -= walk.end_entry - walk.first_entry", "pass"),
    "one batch": ("(head // heads, out_head //", "(head * 0, out_head //"),
    "a row too many stored": ("mask = (rows < row_end)", "mask = (rows < row_end + 1)"),
    "delta in another scale": ("            delta *= program.softmax_scale", "            pass"),
    "a row that saw nothing": ('lse == float("-inf"), float("inf"),', "lse != lse, 0.0,"),
}


# Slots of dq and of Q, whether heads are walked apart, seed.
ORDERS = [(1, 2, False, None), (2, 3, True, None), (1, 3, True, 0), (2, 2, False, 1)]


def planted(emulated, bugs=None):
    """Return what is wrong in a case that all above has a part in, in the first of ORDERS with."""
    given = inputs(Shape(280, 280, 2, 2, 1, 64), torch.bfloat16)
    for dq_stages, q_stages, apart, seed in ORDERS:
        slots = {"dq_stages": dq_stages, "q_stages": q_stages}
        config = replace(BACKWARD[64], **slots, heads_apart=apart)
        try:
            broken = check(emulated(config, bugs, seed), (True, (110, 0)), "zigzag", 2, given)
        except (EmulationError, InterpreterError, AssertionError) as failure:
            broken = [str(failure)]
        if broken:
            return broken
    return []


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_seen(emulated, name):
    bug = BUGS[name]
    assert planted(emulated, bug if isinstance(bug, dict) else dict([bug]))


def test_the_case_of_the_planted_bugs_is_right_without_one(emulated):
    assert not planted(emulated)


RELEASE_K = "        program.kv.release(k_slot)\n"
WAIT_DQ = "        dq = warpgroup_mma_wait(0, [dq])\n"
LAST_DK = "dk = warpgroup_mma(ds, _tile(program.q, last, BLOCK_D), dk, is_async=True)"
NEXT_DOUT = (
    "            program.dout.release(previous)\n",
    "            await_full(program.dout, slot, t // 2)\n",
)
WIDE_BUGS = {
    "no wait for p": ("dkv", "        await_full(program.p, slot, t // 2)\n", ""),
    "p in another unit": ("dkv", "dv * P_UNIT", "dv"),
    "lse not shifted": ("dkv", "lse2 - program.options.P_SHIFT", "lse2"),
    "no wait for the next dout": ("dkv", NEXT_DOUT[0] + NEXT_DOUT[1], NEXT_DOUT[0]),
    "the last dk left out": ("dkv", LAST_DK, "dk = dk"),
    "Q never given back": (
        "dkv",
        "            program.q.release(previous)\n",
        "            pass\n",
    ),
    "K given back before its product": ("dq", WAIT_DQ + RELEASE_K, RELEASE_K + WAIT_DQ),
    "V never given back": ("dq", "        program.kv.release(v_slot)\n", ""),
    "no wait for V": (
        "dq",
        "    await_full(program.kv, v_slot, (2 * t + 1) // STAGES)\n",
        "    pass\n",
    ),
    "no wait for dout": ("dq", "        await_full(program.dout, CONSUMER, 0)\n", ""),
    "keys past the entry": ("dq", "gl.minimum(offs_m + hi + 1, end)", "(offs_m + hi + 1)"),
    "the head of another group": ("dq", "head % heads // group", "head % heads * 0"),
    "old dq forgotten": ("dq", "x += gl.load(states,", "x *= 1.0 + 0.0 * gl.load(states,"),
    "finished rows in the state": ("dq", "gl.store(results, x.to(", "gl.store(states, x.to("),
}


def planted_wide(emulated, kernel=None, bugs=None):
    """Return what is wrong in a case of the wide kernels, in the first order of partitions with."""
    given = inputs(Shape(420, 420, 1, 2, 2, 136), torch.bfloat16)
    for seed in (None, 0, 1):
        try:
            backend = emulated(bugs=bugs, seed=seed, bugged=kernel)
            broken = check(backend, (True, (250, 0)), "zigzag", 2, given)
        except (EmulationError, InterpreterError, AssertionError) as failure:
            broken = [str(failure)]
        if broken:
            return broken
    return []


@pytest.mark.parametrize("name", WIDE_BUGS)
def test_planted_bugs_of_the_wide_kernels_are_seen(emulated, name):
    kernel, fragment, instead = WIDE_BUGS[name]
    assert planted_wide(emulated, f"_hopper_{kernel}_kernel", {fragment: instead})


def test_the_case_of_the_wide_kernels_bugs_is_right_without_one(emulated):
    assert not planted_wide(emulated)


def test_wide_heads_are_as_repeatable_as_deterministic_asks(emulated):
    x = torch.zeros(1, 4, 2, 256, dtype=torch.bfloat16)
    choice = emulated()._choices(Attention(1.0, deterministic=True), x, False)
    assert choice.hopper_backward is WIDE[256]
    assert {(side.keys, side.tile_rows) for side in choice.sides} >= {(True, 64), (False, 128)}


def test_deterministic_gradients_come_from_the_portable_kernels(emulated):
    backend = emulated()
    x = torch.zeros(1, 4, 2, 64, dtype=torch.bfloat16)
    choose = [backend._choices(Attention(1.0, deterministic=d), x, False) for d in (False, True)]
    assert choose[0].hopper_backward is BACKWARD[64] and choose[1].hopper_backward is None
    assert choose[0].hopper_forward is None
    assert {side.tile_rows for side in choose[0].sides if side.keys} == {BACKWARD[64].key_rows}


def test_reasons_against_it(monkeypatch):
    unsupported = hopper_backward.unsupported
    assert unsupported(90, torch.bfloat16, 128) == []
    assert "sm_100" in unsupported(100, torch.bfloat16, 128)[0]
    assert "float32" in unsupported(90, torch.float32, 128)[0]
    assert "any order" in unsupported(90, torch.bfloat16, 128, deterministic=True)[0]
    assert unsupported(90, torch.bfloat16, 256, deterministic=True) == []
    assert unsupported(90, torch.bfloat16, 64) == []
    slow = {64: replace(BACKWARD[64], wins=False)}
    monkeypatch.setattr(hopper_backward, "backward_config", lambda head_dim: slow[64])
    assert "faster" in unsupported(90, torch.bfloat16, 64)[0]
    assert unsupported(90, torch.bfloat16, 64, given=slow[64]) == []
    monkeypatch.undo()
    assert "any order" in unsupported(90, torch.bfloat16, 64, deterministic=True)[0]
    for head_dim in (8, 32, 44, 264):
        assert str(head_dim) in unsupported(90, torch.float16, head_dim)[0]
    assert len(unsupported(80, torch.float32, 128, deterministic=True)) == 3


def test_what_it_can_address():
    def sources(**changed):
        x = torch.zeros(1, 6, 4, 64, dtype=torch.bfloat16)
        return dict.fromkeys(("q", "k", "v", "dout"), x) | changed

    def addresses(sources, dq, documents, config=BACKWARD[64]):
        rows = torch.zeros(1, 4, 6)
        saved = Saved(sources["dout"], sources["q"], rows, None, rows)
        inputs = backward_inputs(Attention(1.0), saved, sources, documents)
        return hopper_backward.addresses(config, inputs, dq)

    dq = torch.zeros(1, 6, 4, 64)
    for documents in (False, True):
        assert addresses(sources(), None, documents) and addresses(sources(), dq, documents)
        assert not addresses(sources(), dq.bfloat16(), documents)
        assert not addresses(sources(), torch.zeros(1, 6, 4, 65)[..., :64], documents)
        odd = torch.zeros(1, 6, 4, 66, dtype=torch.bfloat16)[..., :64]
        assert not addresses(sources(dout=odd), dq, documents)
    two = torch.zeros(2, 6, 4, 64, dtype=torch.bfloat16)
    assert addresses(sources(k=two), dq, False) and not addresses(sources(k=two), dq, True)
    # The wide kernels store dq by pointer.
    assert addresses(sources(), torch.zeros(1, 6, 4, 65)[..., :64], False, WIDE[256])
