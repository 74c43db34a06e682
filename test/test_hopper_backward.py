"""The Hopper backward, executed on the CPU by test/gluon_emulator.py with the library's own tables.

As test_hopper_forward.py: what the emulator cannot know test_aot.py and a GPU must show.
"""

from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from triton.runtime.errors import InterpreterError

import oracle
from gluon_emulator import EmulationError
from hopper_backward_cases import CAUSAL, FULL, MARKS, check, emulation, wrong
from ring_flash_attn.backends import hopper, hopper_backward
from ring_flash_attn.backends.base import GradTarget, TargetOnRequest
from ring_flash_attn.backends.descriptors import like
from ring_flash_attn.backends.work import BackwardInputs
from ring_flash_attn.core.attention import Attention
from ring_flash_attn.core.layout import Layout
from ring_flash_attn.core.merge import merge_plan
from ring_flash_attn.core.plan import plan_local, plan_ring
from ring_flash_attn.kernels.hopper.configs import BACKWARD, WIDE
from simulated_ring import SCALE, Shape, inputs, mask_id, poisoned, truth, zero

pytestmark = MARKS


@pytest.fixture
def emulated(monkeypatch):
    yield from emulation(monkeypatch)


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
    launch = hopper_backward.FusedStep._fused

    def note(self, step_plan, given, dq, target, copies=1):
        used.add(copies)
        assert target.dk.shape[2] == heads[1] * copies
        launch(self, step_plan, given, dq, target, copies)

    monkeypatch.setattr(hopper_backward.FusedStep, "_fused", note)
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
        ("head // heads, out_head // copies", "head // heads, out_head"),
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


def test_wide_heads_are_as_repeatable_as_deterministic_asks(emulated):
    x = torch.zeros(1, 4, 2, 256, dtype=torch.bfloat16)
    choice = emulated()._choices(Attention(1.0, deterministic=True), like(x), x.device, False)
    assert choice.hopper_backward is WIDE[256]
    assert {(side.keys, side.tile_rows) for side in choice.sides} >= {(True, 64), (False, 128)}


def test_deterministic_gradients_come_from_the_portable_kernels(emulated):
    backend = emulated()
    zeros = torch.zeros(1, 4, 2, 64, dtype=torch.bfloat16)
    choose = [
        backend._choices(Attention(1.0, deterministic=x), like(zeros), zeros.device, False)
        for x in (False, True)
    ]
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
        rows = torch.zeros(1, 4, 6).stride()
        likes = [like(x) for x in sources.values()]
        inputs = BackwardInputs(*likes, rows, rows, 1.0, documents)
        return hopper_backward.addresses(config, inputs, None if dq is None else like(dq))

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
