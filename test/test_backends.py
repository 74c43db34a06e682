"""Backends that compute block by block, against the oracle: all ranks of a ring in one process.

Every tensor that a backend writes starts as NaN, and the caller zeroes only what the interface says
it zeroes, so a row left unwritten shows.
"""

from typing import NamedTuple

import pytest
import torch

import oracle
from ring_flash_attn.backends.aten import AtenBackend
from ring_flash_attn.backends.base import GradTarget, state_dtype
from ring_flash_attn.backends.blocks import fold
from ring_flash_attn.backends.fused import open_window, split_tall
from ring_flash_attn.backends.reference import ReferenceBackend
from ring_flash_attn.core.plan import Block, StepPlan, plan_local, trim
from simulated_ring import (
    MASKS,
    SCALE,
    Shape,
    attention_of,
    check_bound,
    check_bound_on_gpu,
    check_exact,
    inputs,
    mask_id,
    poisoned,
    ring,
    truth,
    zero,
)

BACKENDS = {backend.name: backend for backend in (ReferenceBackend(), AtenBackend())}


@pytest.mark.parametrize("mask", MASKS, ids=mask_id)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_ring_in_float64_is_exact(backend, layout, size, mask):
    for local_len in (6, 2) if layout == "zigzag" else (5, 1):
        given = inputs(Shape(local_len * size, local_len * size, heads=4, key_heads=2))
        got = ring(BACKENDS[backend], attention_of(mask), layout, size, given)
        check_exact(got, truth(mask, given)[0])
        assert {x.dtype for x in got} == {torch.float64}


@pytest.mark.parametrize("mask", MASKS, ids=mask_id)
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_shares_that_land_apart_sum_to_the_same(backend, layout, mask):
    given = inputs(Shape(18, 18), with_dlse=False)
    got = ring(BACKENDS[backend], attention_of(mask), layout, 3, given, landing=True)
    check_exact(got, truth(mask, given)[0])


@pytest.mark.parametrize("heads", [(3, 3), (4, 2), (4, 1)], ids=lambda h: f"{h[0]}over{h[1]}")
@pytest.mark.parametrize("with_dlse", [False, True], ids=["no_dlse", "dlse"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_heads_batches_and_dlse(backend, with_dlse, heads):
    for mask in MASKS[:4]:
        given = inputs(Shape(18, 18, 2, *heads, head_dim=5), with_dlse=with_dlse)
        got = ring(BACKENDS[backend], attention_of(mask), "zigzag", 3, given)
        check_exact(got, truth(mask, given)[0])


@pytest.mark.parametrize("lengths", [(3, 7), (7, 3), (1, 5), (5, 1)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_cross_attention_without_a_mask(backend, lengths):
    q_len, k_len = lengths
    given = inputs(Shape(3 * q_len, 3 * k_len))
    got = ring(BACKENDS[backend], attention_of(MASKS[0]), "contiguous", 3, given)
    check_exact(got, truth(MASKS[0], given)[0])


@pytest.mark.parametrize("mask", MASKS, ids=mask_id)
@pytest.mark.parametrize("lengths", [(4, 6), (6, 4), (2, 10), (10, 2)], ids=str)
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_see_nothing_are_zero(backend, layout, lengths, mask):
    """With lengths that differ, some rows and columns of a masked ring take no part at all."""
    given = inputs(Shape(2 * lengths[0], 2 * lengths[1]))
    got = ring(BACKENDS[backend], attention_of(mask), layout, 2, given)
    check_exact(got, truth(mask, given)[0])


@pytest.mark.parametrize("mask", MASKS, ids=mask_id)
@pytest.mark.parametrize("lengths", [(7, 7), (4, 9), (9, 4), (1, 8), (8, 1)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_device_aligns_the_last_rows(backend, lengths, mask):
    q_len, k_len = lengths
    given = inputs(Shape(q_len, k_len, heads=2, key_heads=2))
    got = single(
        BACKENDS[backend], attention_of(mask), plan_local(attention_of(mask), *lengths), given
    )
    seen = oracle.visible(range(k_len - q_len, k_len), range(k_len), *mask)
    check_exact(got, oracle.dense(*given[:3], seen, given.dout, given.dlse, SCALE))


def single(backend, attention, step, given):
    """Run one step, forward and backward."""
    state = state_dtype(given.q.dtype)
    out = poisoned(given.q, state)
    lse = poisoned(out[..., 0].transpose(1, 2), state)
    zero(out, step.unseen_q())
    zero(lse, step.unseen_q(), 2, -torch.inf)
    backend.forward(attention, step, given.q, given.k, given.v, out, lse)
    saved = backend.prepare_backward(given.dout, out.to(given.q.dtype), lse, given.dlse)
    dq, dk, dv = (poisoned(x, state) for x in (given.q, given.k, given.v))
    zero(dq, step.unseen_q())
    zero(dk, step.unseen_k())
    zero(dv, step.unseen_k())
    backend.backward(
        attention, step, saved, given.q, given.k, given.v, dq, lambda: GradTarget(dk, dv, False)
    )
    return oracle.Result(out, lse, dq, dk, dv)


def bands(q_len, k_len):
    """Return trimmed blocks of every kind on one rectangle, at an offset in longer tensors."""
    for lo in (1 - q_len, -2, 0, k_len - q_len):
        for hi in (-1, 0, 1, k_len - q_len, k_len - 1):
            step = plan_of_band(q_len, k_len, lo, hi)
            if step.blocks:
                yield step


def plan_of_band(q_len, k_len, lo, hi):
    block = trim(Block(0, q_len, 0, k_len, lo, hi))
    if block is not None:
        shifted = Block(*(x + 3 for x in block[:2]), *(x + 1 for x in block[2:4]), lo - 2, hi - 2)
        block = trim(shifted)
    return StepPlan(0, 0, () if block is None else (block,), q_len + 4, k_len + 4)


def mask_of(step, device="cpu"):
    i = torch.arange(step.q_len, device=device).unsqueeze(1)
    j = torch.arange(step.k_len, device=device).unsqueeze(0)
    seen = torch.zeros(step.q_len, step.k_len, dtype=torch.bool, device=device)
    for b in step.blocks:
        inside = (i >= b.q_begin) & (i < b.q_end) & (j >= b.k_begin) & (j < b.k_end)
        seen |= inside & (j - i >= b.lo) & (j - i <= b.hi)
    return seen


@pytest.mark.parametrize("lengths", [(6, 6), (3, 8), (8, 3), (1, 4), (4, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_kind_of_band(backend, lengths):
    for step in bands(*lengths):
        given = inputs(Shape(step.q_len, step.k_len))
        got = single(BACKENDS[backend], attention_of(MASKS[0]), step, given)
        seen = mask_of(step)
        check_exact(got, oracle.dense(*given[:3], seen, given.dout, given.dlse, SCALE))


def shown_by_flash_attention_2(q_len, k_len, left, right):
    """Return the mask that its host code makes of a window: mha_fwd and set_params_fprop."""
    left, right = (-1 if side >= k_len else side for side in (left, right))
    if (left, right) == (-1, -1):
        return torch.ones(q_len, k_len, dtype=torch.bool)
    left, right = (k_len if side < 0 else side for side in (left, right))
    offset = torch.arange(k_len) - torch.arange(q_len).unsqueeze(1) - (k_len - q_len)
    return (offset >= -left) & (offset <= right)


@pytest.mark.parametrize("lengths", [(8, 1), (9, 2), (9, 4), (5, 5), (6, 5), (4, 9)], ids=str)
def test_every_block_is_cut_into_windows_that_flash_attention_2_can_express(lengths):
    q_len, k_len = lengths
    whole = 0
    for lo in range(1 - q_len, k_len):
        for hi in range(lo, k_len):
            block = trim(Block(0, q_len, 0, k_len, lo, hi))
            step = StepPlan(0, 0, (block,), q_len, k_len)
            cut = split_tall(step)
            whole += cut == step
            shown = torch.zeros(q_len, k_len, dtype=torch.int)
            for b in cut.blocks:
                window = shown_by_flash_attention_2(
                    b.q_end - b.q_begin, b.k_end - b.k_begin, *open_window(b)
                )
                shown[b.q_begin : b.q_end, b.k_begin : b.k_end] += window
            assert torch.equal(shown, mask_of(step).int()), (block, cut.blocks)
    assert whole


def test_aten_computes_the_blocks_so_cut(monkeypatch):
    step = StepPlan(0, 0, (trim(Block(0, 9, 0, 3, -7, 1)),), 9, 3)
    assert len(split_tall(step).blocks) == 3
    seen = {"attend": [], "gradients": []}
    for name, blocks in seen.items():
        whole = getattr(AtenBackend, name)

        def recorded(self, attention, block, *rest, whole=whole, blocks=blocks):
            blocks.append(block)
            return whole(self, attention, block, *rest)

        monkeypatch.setattr(AtenBackend, name, recorded)
    single(AtenBackend(), attention_of(MASKS[0]), step, inputs(Shape(9, 3), with_dlse=False))
    assert seen["attend"] == seen["gradients"] == list(split_tall(step).blocks)


def test_long_rows_cross_the_tiles_of_the_cpu_kernel():
    """torch's CPU kernel walks keys 512 at a time: some tiles show a row nothing."""
    given = inputs(Shape(700, 1200, heads=1))
    for lo, hi in ((500, 500), (300, 620), (-10, 520), (-699, 500)):
        step = plan_of_band(696, 1196, lo, hi)
        got = single(AtenBackend(), attention_of(MASKS[0]), step, given)
        check_exact(got, oracle.dense(*given[:3], mask_of(step), given.dout, given.dlse, SCALE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", MASKS[:5], ids=mask_id)
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_errors_stay_within_those_of_the_dtype(backend, layout, mask, dtype):
    given = inputs(Shape(96, 96, heads=2, head_dim=16), dtype)
    got = ring(BACKENDS[backend], attention_of(mask), layout, 4, given)
    assert [x.dtype for x in got] == [dtype, torch.float32, dtype, torch.float32, torch.float32]
    check_bound(got, mask, given)


@pytest.mark.parametrize("size", [1e-7, 1.0, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_dlse_of_any_size_reaches_the_gradients(dtype, size):
    """float16 alone would lose 1e-7 times q, and overflow at 1e5 times q."""
    given = inputs(Shape(12, 12), dtype)
    given = given._replace(dout=torch.zeros_like(given.dout), dlse=given.dlse * size)
    unrounded = {"result_dtype": torch.float32}
    got = ring(AtenBackend(), attention_of(MASKS[1]), "stripe", 2, given, **unrounded)
    want, _ = truth(MASKS[1], given)
    for name in ("dq", "dk"):
        assert oracle.errors(getattr(got, name), getattr(want, name)).relative < 1e-5, name
    assert not got.dv.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_continues_a_state_that_already_holds_rows(backend):
    """Rows that a later step touches are folded in, the others are left alone."""
    given = inputs(Shape(6, 4, heads=2))
    out, lse = oracle.attention(*given[:3], torch.ones(6, 4, dtype=torch.bool), SCALE)
    lse[:, :, 4] = -torch.inf  # row 4 has seen nothing so far
    out[:, 4] = 0.0
    step = StepPlan(1, 0, (Block(2, 5, 0, 4, -4, 1),), 6, 4)
    got_out, got_lse = out.clone(), lse.clone()
    BACKENDS[backend].forward(
        attention_of(MASKS[0]), step, given.q, given.k, given.v, got_out, got_lse
    )
    seen = torch.ones(6, 4, dtype=torch.bool)
    seen[4] = False
    twice = torch.cat([seen, mask_of(step)], 1)
    want = oracle.attention(
        given.q, *(torch.cat([x, x], 1) for x in (given.k, given.v)), twice, SCALE
    )
    assert oracle.errors(got_out, want[0]).max_abs < 1e-10
    assert oracle.errors(got_lse, want[1]).max_abs < 1e-10
    assert torch.equal(got_out[:, [0, 1, 5]], out[:, [0, 1, 5]])


def test_fold_of_nothing_with_nothing_is_nothing():
    out, lse = torch.zeros(1, 3, 2, 4), torch.full((1, 2, 3), -torch.inf)
    lse[:, :, 1], out[:, 1] = 0.5, 2.0
    block_out, block_lse = torch.zeros(1, 3, 2, 4), torch.full((1, 2, 3), -torch.inf)
    block_lse[:, :, 2], block_out[:, 2] = 0.25, 3.0
    fold(out, lse, block_out, block_lse)
    assert out[0, :, 0, 0].tolist() == [0.0, 2.0, 3.0]
    assert lse[0, 0].tolist() == [-torch.inf, 0.5, 0.25]


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend):
    """Views of a packed qkv, of heads-first tensors, with D strided, and an expanded dout."""
    step = plan_local(attention_of(MASKS[3]), 6, 6)
    given = inputs(Shape(6, 6, heads=2, key_heads=2))
    want = single(BACKENDS[backend], attention_of(MASKS[3]), step, given)
    packed = torch.stack(given[:3], 2)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given[:3]]
    strided = [torch.stack([x, x], -1)[..., 0] for x in given[:3]]
    for q, k, v in (packed.unbind(2), heads_first, strided):
        got = single(BACKENDS[backend], attention_of(MASKS[3]), step, given._replace(q=q, k=k, v=v))
        check_exact(got, want)
    ones = torch.ones((), dtype=torch.float64).expand(given.dout.shape)
    got = single(BACKENDS[backend], attention_of(MASKS[3]), step, given._replace(dout=ones))
    whole = given._replace(dout=ones.contiguous())
    check_exact(got, single(BACKENDS[backend], attention_of(MASKS[3]), step, whole))


def test_aten_on_cpu_repeats_bit_for_bit():
    attention = attention_of(MASKS[1], deterministic=True)
    given = inputs(Shape(256, 256, 1, 8, 2, 32), torch.float32)
    assert AtenBackend().unsupported(attention, *given[:3]) == []
    step = plan_local(attention, 256, 256)
    first = single(AtenBackend(), attention, step, given)
    for _ in range(3):
        again = single(AtenBackend(), attention, step, given)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_unsupported_names_every_reason():
    def reasons(backend, dtype=torch.float32, width=8, device="cpu"):
        q = torch.empty(1, 4, 2, 8, dtype=dtype, device=device)
        v = torch.empty(1, 4, 2, width, dtype=dtype, device=device)
        return backend.unsupported(attention_of(MASKS[0]), q, q, v)

    aten, reference = AtenBackend(), ReferenceBackend()
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        assert reasons(aten, dtype) == reasons(reference, dtype) == []
    assert reasons(aten, width=16) == ["v must be as wide as q, got 16 and 8"]
    assert reasons(aten, device="meta") == ["runs on cpu and cuda, got meta"]
    assert len(reasons(aten, torch.int32, width=16)) == 2
    assert "got torch.int32" in reasons(aten, torch.int32)[0]
    assert reasons(reference, torch.int32) == ["reference needs a float dtype, got torch.int32"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "computes in float16, bfloat16 on cuda, got torch.float32"),
        ({"head_dim": 12}, "needs a head dim that 8 divides, at most 256, got 12"),
        ({"head_dim": 264}, "needs a head dim that 8 divides, at most 256, got 264"),
        ({"capability": (7, 5)}, "needs sm_80 or newer, got sm_75"),
        ({"capability": (8, 9), "head_dim": 200}, "no backward of head dim 193 to 224 on sm_89"),
        ({"deterministic": True}, "deterministic"),
        ({"built": False}, "no flash attention"),
        ({"width": 64}, "v must be as wide as q, got 64 and 128"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_what_aten_lacks_on_cuda(monkeypatch, change, reason):
    class OnCuda(NamedTuple):
        shape: tuple[int, ...]
        dtype: torch.dtype
        device = torch.device("cuda", 0)

    def reasons(
        dtype=torch.bfloat16,
        head_dim=128,
        width=None,
        capability=(9, 0),
        deterministic=False,
        built=True,
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
        q, v = (OnCuda((1, 4, 2, d), dtype) for d in (head_dim, width or head_dim))
        return AtenBackend().unsupported(attention_of(MASKS[0], deterministic), q, q, v)

    assert reasons() == []
    assert reasons(head_dim=200) == reasons(capability=(8, 9), head_dim=256) == []
    (found,) = reasons(**change)
    assert reason in found


GPU_MASKS = [
    (False, (-1, -1)),
    (True, (-1, -1)),
    (True, (300, 0)),
    (False, (130, 70)),
    (False, (0, -1)),
    (False, (-1, 33)),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", GPU_MASKS, ids=mask_id)
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_aten_on_a_gpu(layout, size, mask, dtype):
    local_len = 514 if layout == "zigzag" else 513
    given = inputs(Shape(local_len * size, local_len * size, 1, 4, 2, 64), dtype, device="cuda")
    assert AtenBackend().unsupported(attention_of(mask), *given[:3]) == []
    # Its block results are rounded to 16 bits already; see the sum of them, not of one more.
    got = ring(AtenBackend(), attention_of(mask), layout, size, given, result_dtype=torch.float32)
    seen = oracle.visible(range(local_len * size), range(local_len * size), *mask, device="cuda")
    check_bound_on_gpu(got, seen, given)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(2, 2), (8, 1)], ids=lambda h: f"{h[0]}over{h[1]}")
@pytest.mark.parametrize("head_dim", [8, 40, 96, 128, 192, 224, 256])
def test_aten_on_a_gpu_in_every_width(head_dim, heads):
    given = inputs(Shape(774, 774, 2, *heads, head_dim), torch.bfloat16, device="cuda")
    for mask in GPU_MASKS[1:4]:
        unrounded = {"result_dtype": torch.float32}
        got = ring(AtenBackend(), attention_of(mask), "zigzag", 3, given, **unrounded)
        seen = oracle.visible(range(774), range(774), *mask, device="cuda")
        check_bound_on_gpu(got, seen, given)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "lengths", [(200, 200), (130, 400), (400, 130), (1, 64), (64, 1), (2, 3)], ids=str
)
def test_aten_on_a_gpu_every_kind_of_band(lengths):
    for step in bands(*lengths):
        given = inputs(Shape(step.q_len, step.k_len, 8, 4, 2, 64), torch.bfloat16, device="cuda")
        got = single(AtenBackend(), attention_of(MASKS[0]), step, given)
        check_bound_on_gpu(got, mask_of(step, "cuda"), given)


@pytest.mark.gpu
def test_aten_on_a_gpu_takes_any_strides():
    """Rows that do not start on 16 bytes, D strided, views of a packed qkv, an expanded dout."""
    step = plan_local(attention_of(MASKS[1]), 256, 256)
    given = inputs(Shape(256, 256, 1, 2, 2, 64), torch.float16, device="cuda")
    want = single(AtenBackend(), attention_of(MASKS[1]), step, given)
    packed = torch.stack(given[:3], 2)
    odd = [torch.nn.functional.pad(x, (1, 2))[..., 1:-2] for x in given[:3]]
    strided = [torch.stack([x, x], -1)[..., 0] for x in given[:3]]
    for q, k, v in (packed.unbind(2), odd, strided):
        got = single(AtenBackend(), attention_of(MASKS[1]), step, given._replace(q=q, k=k, v=v))
        for name in ("out", "lse"):
            assert torch.equal(getattr(got, name), getattr(want, name))
        for name in ("dq", "dk", "dv"):
            assert oracle.errors(getattr(got, name), getattr(want, name)).relative < 1e-3
    ones = torch.ones((), dtype=torch.float16, device="cuda").expand(given.dout.shape)
    got = single(AtenBackend(), attention_of(MASKS[1]), step, given._replace(dout=ones))
    whole = single(
        AtenBackend(), attention_of(MASKS[1]), step, given._replace(dout=ones.contiguous())
    )
    assert oracle.errors(got.dk, whole.dk).relative < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1e-7, 1.0, 1e5])
def test_dlse_of_any_size_on_a_gpu(size):
    given = inputs(Shape(512, 512, head_dim=64), torch.float16, device="cuda")
    given = given._replace(dout=torch.zeros_like(given.dout), dlse=given.dlse * size)
    unrounded = {"result_dtype": torch.float32}
    got = ring(AtenBackend(), attention_of(MASKS[1]), "stripe", 2, given, **unrounded)
    want, _ = truth(MASKS[1], given, oracle.chunked, "cuda")
    for name in ("dq", "dk"):
        assert oracle.errors(getattr(got, name), getattr(want, name)).relative < 2e-3, name
    assert not got.dv.any()


@pytest.mark.gpu
def test_a_long_sequence_on_a_gpu():
    given = inputs(Shape(8192, 8192, 1, 8, 2, 128), torch.bfloat16, device="cuda")
    seen = oracle.visible(range(8192), range(8192), True, device="cuda")
    for layout in oracle.LAYOUTS:
        got = ring(AtenBackend(), attention_of(MASKS[1]), layout, 8, given)
        check_bound_on_gpu(got, seen, given)
