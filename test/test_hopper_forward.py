"""The Hopper forward, executed on the CPU by test/gluon_emulator.py with the library's own tables.

What the emulator cannot know (layouts, registers, the hardware) test_aot.py and a GPU must show: on
sm_90 every other test of the Triton backend runs this kernel.
"""

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import oracle
from gluon_emulator import EmulationError, load_module
from gluon_memory import Memory, Pointer, TensorDescriptor
from ring_flash_attn.backends import hopper
from ring_flash_attn.backends import launch as launching
from ring_flash_attn.backends import triton as triton_backend
from ring_flash_attn.backends.descriptors import like
from ring_flash_attn.core.attention import Attention
from ring_flash_attn.core.layout import Layout
from ring_flash_attn.core.packed import Documents, on_device, plan_packed
from ring_flash_attn.core.plan import plan_ring
from ring_flash_attn.kernels.hopper.configs import FORWARD
from simulated_ring import SCALE, Shape, inputs, mask_id, poisoned, state_and_result, truth, zero

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(not hopper.SUPPORTED, reason="made for Triton 3.6"),
    # Triton's interpreter, which fills the tables of documents.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]

SOURCE = Path(hopper.__file__).parents[1] / "kernels" / "hopper" / "forward.py"
PROGRAMS = 3
CAUSAL, FULL = (True, (-1, -1)), (False, (-1, -1))


@pytest.fixture
def emulated(monkeypatch):
    """Make a backend's forward run the Hopper kernel in the emulator; take a config to do so."""

    def start(config=None, bugs=None, seed=None):
        kernel = load_module(SOURCE, bugs, seed=seed)._hopper_fwd_kernel
        counter = torch.zeros(2, dtype=torch.int32)

        def launch(given, grid, arguments, **options):
            runs = kernel if given.fn.__name__ == "_hopper_fwd_kernel" else given
            runs[grid](**arguments, **options)
            assert not counter.any(), "the next launch would start in the middle"

        monkeypatch.setattr(launching, "launch", launch)
        monkeypatch.setattr(hopper, "TensorDescriptor", TensorDescriptor)
        monkeypatch.setattr(hopper, "_counter", lambda device: counter)
        monkeypatch.setattr(hopper, "multiprocessors", lambda device: PROGRAMS)

        monkeypatch.setattr(hopper, "unsupported", lambda *_: [])
        triton_backend._choices.cache_clear()
        return triton_backend.TritonBackend(hopper_forward=config or True)

    yield start
    triton_backend._choices.cache_clear()


def attend(backend, mask, layout, size, given):
    """Run every step of every rank forward; return the global out and lse."""
    attention = Attention(SCALE, *mask)
    shards = [[oracle.shard(x, layout, size, rank) for rank in range(size)] for x in given[:3]]
    layouts = [Layout(layout, x[0].shape[1], size) for x in shards[:2]]
    outs, lses = [], []
    for rank in range(size):
        q = shards[0][rank]
        plan = plan_ring(attention, *layouts, rank)
        out, result = state_and_result(plan, q)
        lse = poisoned(q[..., 0].transpose(1, 2), torch.float32)
        zero(lse, plan.steps[0].unseen_q(), 2, -torch.inf)
        for step in plan.steps:
            source = shards[1][step.source], shards[2][step.source]
            backend.forward(attention, step, q, *source, out, lse, result)
        outs.append(result)
        lses.append(lse)
    return oracle.unshard(outs, layout), oracle.unshard(lses, layout, 2)


def wrong(out, lse, want, dense):
    """Return what is beyond the bound of 16-bit results, in words."""
    got = want._replace(out=out, lse=lse)
    return oracle.beyond_bound(got, want, dense, ("out", "lse"))


def check(backend, mask, layout, size, given):
    out, lse = attend(backend, mask, layout, size, given)
    want, seen = truth(mask, given)
    q, k, v, dout, dlse = given
    dense = oracle.dense_in_dtype(q, k, v, seen, dout, dlse, SCALE)
    return wrong(out, lse, want, dense)


CASES = [
    # layout, P, mask, shape, dtype
    ("contiguous", 1, CAUSAL, Shape(300, 300, 2, 2, 1, 128), torch.bfloat16),
    ("contiguous", 2, FULL, Shape(140, 300, 1, 3, 3, 256), torch.float16),
    ("contiguous", 1, (False, (3, 2)), Shape(400, 150, 1, 2, 1, 64), torch.bfloat16),
    ("contiguous", 2, CAUSAL, Shape(300, 300, 1, 2, 1, 80), torch.bfloat16),
    ("contiguous", 1, (True, (40, 0)), Shape(520, 520, 1, 1, 1, 192), torch.float16),
    ("zigzag", 2, CAUSAL, Shape(600, 600, 1, 4, 2, 128), torch.bfloat16),
    ("zigzag", 2, (True, (200, 0)), Shape(1000, 1000, 1, 1, 1, 64), torch.bfloat16),
    ("zigzag", 2, (False, (-1, 4)), Shape(520, 520, 1, 2, 1, 40), torch.float16),
    ("stripe", 3, CAUSAL, Shape(630, 630, 1, 2, 2, 64), torch.bfloat16),
]


@pytest.mark.parametrize(
    ("layout", "size", "mask", "shape", "dtype"),
    CASES,
    ids=[f"{c[0]}-P{c[1]}-{mask_id(c[2])}-D{c[3].head_dim}" for c in CASES],
)
def test_rings_equal_dense(emulated, layout, size, mask, shape, dtype):
    given = inputs(shape, dtype)
    broken = check(emulated(), mask, layout, size, given)
    assert not broken, "\n".join(broken)


SMALL = Shape(330, 330, 1, 2, 1, 64)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("ping_pong", [False, True])
@pytest.mark.parametrize("rescale_late", [False, True])
@pytest.mark.parametrize("consumers", [2, 3])
def test_every_option_in_any_order(emulated, consumers, rescale_late, ping_pong, seed):
    config = replace(
        FORWARD[64],
        consumers=consumers,
        block_n=64,
        ping_pong=ping_pong,
        rescale_late=rescale_late,
    )
    given = inputs(SMALL, torch.bfloat16)
    broken = check(emulated(config, seed=seed), CAUSAL, "contiguous", 2, given)
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(("k_stages", "v_stages"), [(1, 1), (2, 2), (2, 3), (3, 2)])
def test_any_number_of_stages(emulated, k_stages, v_stages):
    config = replace(FORWARD[64], block_n=64, k_stages=k_stages, v_stages=v_stages)
    assert not check(emulated(config), CAUSAL, "contiguous", 1, inputs(SMALL, torch.bfloat16))


BUGS = {
    "no wait for K": ("    await_full(program.k, slot, count // K_STAGES)\n", ""),
    "no wait for V": (
        "    await_full(program.v, previous, (count - 1) // V_STAGES)\n",
        "",
    ),
    "no wait for Q": ("        await_full(program.q, CONSUMER, tile)\n", ""),
    "V released before its product": (
        "    s = warpgroup_mma_wait(1, [s])\n",
        "    s = warpgroup_mma_wait(1, [s])\n    program.v.release(previous)\n",
    ),
    "K never released": ("    program.k.release(slot)\n", ""),
    "phase of an empty slot": ("turn & 1 ^ 1)", "turn & 1)"),
    "no wait for the numbers of a tile": ("    await_full(items, slot, tile >> 1)\n", ""),
    "numbers of a tile never given back": ("    items.release(slot)\n", ""),
    "scores used before they are there": ("    s = warpgroup_mma_wait(1, [s])\n", ""),
    "no turn given at the start": ("        _give_turn(FIRST_TURN)\n", "        pass\n"),
    "a turn given and not taken": ("        meet(FIRST_TURN)  #", "        pass  #"),
    "no rescaling": ("        acc = _rescale(acc, alpha)\n    return", "        pass\n    return"),
    "first block counted twice": ("begin + 1, band, offs_m", "begin, band, offs_m"),
    "a block too many passed over": (
        "+ BLOCK - 1) // BLOCK\n    unseen",
        "- 1) // BLOCK\n    unseen",
    ),
    "a block passed over and not counted": (
        "        program.v.release(count % V_STAGES)\n        count += 1\n",
        "        program.v.release(count % V_STAGES)\n",
    ),
    "V of a block passed over kept": ("        program.v.release(count % V_STAGES)\n", ""),
    "K of a block passed over kept": (
        "        program.k.release(count % K_STAGES)\n        if",
        "        if",
    ),
    "the turn of a block passed over not taken": ("            meet(FIRST_TURN + CONSUMER)\n", ""),
    "mask a column too wide": ("minimum(offs_m + hi + 1,", "minimum(offs_m + hi + 2,"),
    "full blocks begin too early": ("(full_first - first + BLOCK - 1)", "(full_first - first)"),
    "a row too many stored": ("mask = (rows < row_end)", "mask = (rows < row_end + 1)"),
    "old state forgotten": ("        old_weight = old / total_safe\n", ""),
    "heads of one batch only": ("(outputs, head // tables.heads, head", "(outputs, head * 0, head"),
    "state not waited for": (
        "            await_full(slots, slot, count // slots.STAGES)\n            if",
        "            if",
    ),
    "state of other rows": ("row + PIECE // PIECES * ROWS, PIECE", "row, PIECE"),
    "state loaded into a slot in use": (
        "    slots.await_empty(slot, count // STAGES)\n    mbarrier.expect",
        "    mbarrier.expect",
    ),
    "state's slots not counted by the producer": (
        "            count = _load_state(program, state, count, batch, head, row)\n",
        "            count = _load_state(program, state, count, batch, head, row) - 1\n",
    ),
    "a slot of state kept": (
        "            slots.release(slot)\n        count += 1\n",
        "        count += 1\n",
    ),
    "tiles passed over": ("+ gl.num_programs(0)\n", "+ gl.num_programs(0) * 2\n"),
    "counter left as it is": ("        gl.store(counter_ptr, 0)\n", ""),
}


FENCE = "        fence_async_shared()  # see release in slots.py\n"
GIVEN_BACK = (
    "        if program.options.Q_COLUMNS == BLOCK_D:\n            program.q.release(CONSUMER)\n"
)
READ = (
    "        await_full(program.q, CONSUMER, tile)\n"
    "        # As in _issue_scores, 0: else ptxas finds the addresses once, and spills them.\n"
    "        q_tile = program.q.buffers.index(CONSUMER + (tile >> 30)).reshape([ROWS, BLOCK_D])\n"
    "        q_left = left_operand(q_tile, s_layout, program.options.Q_COLUMNS)\n"
)


@pytest.mark.parametrize(
    "bug",
    [
        {READ + GIVEN_BACK: GIVEN_BACK + READ},
        {GIVEN_BACK: ""},
        {FENCE + "    return tile\n": "    return tile\n"},
    ],
    ids=["before", "never", "unfenced"],
)
def test_q_in_registers_is_given_back_once_it_is_read(emulated, bug):
    # Tiles of one block: the producer is at the next one's Q before a consumer has read this one's.
    given = inputs(Shape(1300, 100, 1, 2, 1, 128), torch.bfloat16)
    try:
        broken = check(emulated(bugs=bug), FULL, "contiguous", 1, given)
    except (EmulationError, AssertionError) as failure:
        broken = [str(failure)]
    assert broken


def test_the_old_state_is_read_before_its_slot_is_given_back(emulated):
    given = inputs(Shape(612, 612, 2, 2, 1, 64), torch.bfloat16)
    bug = {"        " + FENCE + "            slots": "            slots"}
    with pytest.raises(EmulationError, match=r"writes over what .*consume.* has read without"):
        check(emulated(bugs=bug), FULL, "contiguous", 2, given)


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_seen(emulated, name):
    """One case that everything above has a part in: two steps, a window, two batches, turns."""
    config = replace(FORWARD[64], consumers=2, block_n=64, ping_pong=True)
    given = inputs(Shape(612, 612, 2, 2, 1, 64), torch.bfloat16)
    fragment, instead = BUGS[name]
    try:
        broken = check(emulated(config, {fragment: instead}), (True, (150, 0)), "zigzag", 2, given)
    except (EmulationError, AssertionError) as failure:
        broken = [str(failure)]
    assert broken


def test_the_case_of_the_planted_bugs_is_right_without_one(emulated):
    config = replace(FORWARD[64], consumers=2, block_n=64, ping_pong=True)
    given = inputs(Shape(612, 612, 2, 2, 1, 64), torch.bfloat16)
    assert not check(emulated(config), (True, (150, 0)), "zigzag", 2, given)


def test_blocks_are_passed_over_that_no_row_sees():
    tiles = load_module(SOURCE.with_name("tiles.py"))
    draw = random.Random(0)
    passed = 0
    for _ in range(4000):
        block, consumers = draw.choice([(64, 2), (128, 2), (128, 3)])
        row, tall = 64 * draw.randrange(6), 64 * consumers
        row_end = min(row + tall, row + draw.randrange(1, tall + 70))
        begin, columns = draw.randrange(200), draw.randrange(1, 700)
        lo = draw.choice([-(1 << 20), draw.randrange(-400, 100)])
        hi = draw.choice([1 << 20, draw.randrange(max(lo, -400), 400)])
        entries = torch.tensor([[begin, begin + columns, lo, hi]], dtype=torch.int32)
        tables = SimpleNamespace(entries_ptr=Pointer(Memory(entries)))
        band = [int(x) for x in tiles.load_band(tables, 0, 1, row, row_end, block)]
        order = [tiles.block_start(band, i, block) for i in range(band[6] + band[7])]
        assert sorted(order) == [band[0] + i * block for i in range(len(order))]
        for first in range(row, row + tall, 64):
            n = int(tiles.unseen_blocks(band, first, row_end, 64, block))
            assert 0 <= n <= max(len(order) - 1, 0)
            rows = range(first, min(first + 64, row_end))
            for start in order[:n]:
                end = min(start + block, band[1])
                assert not any(max(r + lo, start) < min(r + hi + 1, end) for r in rows)
                passed += 1
            # Full blocks come last, and the last block is never passed over.
            if n + 1 < len(order) and n < band[7] - band[5] and rows:
                assert order[n] <= rows[-1] + hi
    assert passed > 1000


LENGTHS = (130, 2, 200, 66)


def documents(backend, layout, mask, tensors):
    """Return out, lse of documents of LENGTHS on a ring of one rank, and of the rows after them."""
    q, k, v = tensors
    attention = Attention(SCALE, *mask)
    edges = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    cu_seqlens = torch.tensor(edges, dtype=torch.int32)
    rows = q.shape[1]
    plan = on_device(
        plan_packed(attention, layout, 1, 0), Documents(cu_seqlens, cu_seqlens, rows, rows)
    )
    result = poisoned(q, q.dtype)
    lse = poisoned(q[..., 0].transpose(1, 2), torch.float32)
    for step in plan.steps:
        backend.forward(attention, step, q, k, v, None, lse, result)
    return result, lse, edges


@pytest.mark.parametrize("mask", [CAUSAL, FULL, (True, (30, 0))], ids=mask_id)
@pytest.mark.parametrize(("layout", "head_dim"), [("stripe", 128), ("zigzag", 64), ("stripe", 96)])
def test_documents_equal_dense_and_nan_stays_in_its_own(emulated, layout, head_dim, mask):
    backend = emulated()
    rows = sum(LENGTHS) + 9  # nine of no document
    given = inputs(Shape(rows, rows, 1, 2, 1, head_dim), torch.bfloat16)
    tensors = given[:3]
    out, lse, edges = documents(backend, layout, mask, tensors)
    for begin, end in pairwise(edges):
        part = given._replace(
            **{n: getattr(given, n)[:, begin:end] for n in ("q", "k", "v", "dout")}
        )
        part = part._replace(dlse=given.dlse[:, :, begin:end])
        want, seen = truth(mask, part)
        dense = oracle.dense_in_dtype(*part[:3], seen, part.dout, part.dlse, SCALE)
        broken = wrong(out[:, begin:end], lse[:, :, begin:end], want, dense)
        assert not broken, "\n".join(broken)
    assert (out[:, edges[-1] :] == 0).all() and (lse[:, :, edges[-1] :] == -torch.inf).all()

    begin, end = edges[2:4]
    spoiled = [x.clone() for x in tensors]
    for x in spoiled:
        x[:, begin:end] = torch.nan
        x[:, edges[-1] :] = torch.nan
    got, got_lse, _ = documents(backend, layout, mask, spoiled)
    others = [i for i in range(rows) if not begin <= i < end]
    assert torch.equal(got[:, others], out[:, others])
    assert torch.equal(got_lse[:, :, others], lse[:, :, others])
    assert got[:, begin:end].isnan().all()


def test_reasons_against_it():
    assert hopper.unsupported(90, torch.bfloat16, 128) == []
    assert "sm_100" in hopper.unsupported(100, torch.bfloat16, 128)[0]
    assert "float32" in hopper.unsupported(90, torch.float32, 128)[0]
    for head_dim in (8, 32, 44, 264):
        assert str(head_dim) in hopper.unsupported(90, torch.float16, head_dim)[0]


def test_what_it_can_address(emulated):
    emulated()

    def addresses(q, k, v, out, carry, documents):
        tensors = tuple(map(like, (q, k, v, out)))
        lse = torch.empty(out.shape[0], out.shape[2], out.shape[1])
        start = hopper.forward_launch(
            FORWARD[64], SCALE, tensors, lse.stride(), carry, documents, one_entry=True
        )
        return start is not None

    def tensor(batch=1, length=6, heads=4):
        return torch.zeros(batch, length, heads, 64, dtype=torch.bfloat16)

    q, k = tensor(heads=8), tensor()
    assert addresses(q, k, k, q, False, True) and addresses(q, k, k, q, False, False)
    packed = torch.zeros(1, 6, 3, 4, 64, dtype=torch.bfloat16)
    assert addresses(*packed.unbind(2), packed[:, :, 0], False, True)
    odd = torch.zeros(1, 6, 4, 66, dtype=torch.bfloat16)[..., :64]
    assert not addresses(odd, k, k, q, False, False)
    assert not addresses(q, k, odd, q, False, True)
    several = tensor(2)
    assert not addresses(several, several, several, several, False, True)
    wide = torch.empty(0, dtype=torch.bfloat16).as_strided((2, 0, 4, 64), (1 << 31, 256, 64, 1))
    assert not addresses(q, k, k, wide, False, False)
    # The state is read as float32, and by TMA too.
    assert addresses(q, k, k, q.float(), True, False)
    assert not addresses(q, k, k, q, True, False)
    crooked = torch.zeros(1, 6, 8, 66)[..., :64]
    assert not addresses(q, k, k, crooked, True, False)
