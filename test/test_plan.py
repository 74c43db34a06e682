"""Plans by brute force: every step's blocks against masks from hand-written positions."""

import itertools
import random
import time

import numpy as np
import pytest

import oracle
from ring_flash_attn.core.attention import Attention
from ring_flash_attn.core.layout import KINDS, Layout, Run
from ring_flash_attn.core.plan import (
    Block,
    StepPlan,
    _same_mask,
    block_between,
    merge,
    plan_local,
    plan_ring,
    plan_step,
    trim,
)

MASKS = [
    (False, (-1, -1)),
    (True, (-1, -1)),
    (True, (0, 0)),
    (False, (0, 0)),
    (False, (1, 0)),
    (False, (0, 1)),
    (False, (3, 2)),
    (False, (2, 11)),
    (False, (17, 1)),
    (True, (4, -1)),
    (True, (9, 5)),
    (False, (5, -1)),
    (False, (-1, 6)),
    (False, (-1, 0)),
    (True, (25, 0)),
    (False, (1000, 1000)),
    (True, (1000, -1)),
]
# Odd halves of a zigzag (2, 6, 10), a prime, one row, none.
LENGTHS = {"contiguous": (0, 1, 5, 8, 13), "stripe": (0, 1, 5, 8, 13), "zigzag": (0, 2, 6, 8, 10)}


def attention_of(mask):
    causal, window = mask
    return Attention(1.0, causal=causal, window=window)


def mask_id(mask):
    causal, (left, right) = mask
    return f"{'causal' if causal else 'open'}[{left},{right}]"


def wanted(layout, mask, q_len, k_len, size):
    """Return {(rank, source): mask [q_len, k_len]} from hand-written positions."""
    q_rows = [oracle.positions(layout, q_len, size, rank) for rank in range(size)]
    k_rows = [oracle.positions(layout, k_len, size, rank) for rank in range(size)]
    whole = oracle.visible(range(q_len * size), range(k_len * size), *mask).numpy()
    return {
        (rank, source): whole[np.ix_(q_rows[rank], k_rows[source])]
        for rank in range(size)
        for source in range(size)
    }


def painted(blocks, q_len, k_len):
    """Return how many blocks show each (query, key): [q_len, k_len] int."""
    count = np.zeros((q_len, k_len), int)
    for b in blocks:
        assert 0 <= b.q_begin < b.q_end <= q_len and 0 <= b.k_begin < b.k_end <= k_len, b
        distance = np.arange(b.k_begin, b.k_end) - np.arange(b.q_begin, b.q_end)[:, None]
        count[b.q_begin : b.q_end, b.k_begin : b.k_end] += (distance >= b.lo) & (distance <= b.hi)
    return count


def check_block(b):
    """Assert what the docstring of Block promises."""
    q_len, k_len = b.q_end - b.q_begin, b.k_end - b.k_begin
    i, j = np.arange(b.q_begin, b.q_end)[:, None], np.arange(b.k_begin, b.k_end)[None]
    seen = (j - i >= b.lo) & (j - i <= b.hi)
    assert seen.any(1).all() and seen.any(0).all(), f"{b}: a row or column takes no part"
    # lo and hi are the extremes of what is seen, so equal masks have equal blocks.
    distance = np.broadcast_to(j - i, seen.shape)[seen]
    assert (b.lo, b.hi) == (distance.min(), distance.max()), b
    assert b.full == seen.all(), b
    # flash-attn: key j of the block's m sees query i of its n iff -left <= j - i - (m - n) <= right
    left, right = b.window
    assert left >= 0 and right >= 0, b
    offset = np.arange(k_len)[None] - np.arange(q_len)[:, None] - (k_len - q_len)
    assert np.array_equal((offset >= -left) & (offset <= right), seen), b
    for row in range(b.q_begin - 1, b.q_end + 1):
        begin, end = b.seen_by(row)
        in_block = b.q_begin <= row < b.q_end
        want = j[0][seen[row - b.q_begin]].tolist() if in_block else []
        assert list(range(begin, end)) == want, (b, row)


def gaps(touched):
    """Return the maximal intervals where a bool vector is False."""
    edges = np.flatnonzero(np.diff(np.concatenate(([1], touched.astype(int), [1]))))
    return tuple(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def check_step(step, mask):
    q_len, k_len = mask.shape
    assert (step.q_len, step.k_len) == (q_len, k_len)
    assert np.array_equal(painted(step.blocks, q_len, k_len), mask), step
    assert step.unseen_q() == gaps(mask.any(1)), step
    assert step.unseen_k() == gaps(mask.any(0)), step


@pytest.mark.parametrize("mask", MASKS, ids=mask_id)
@pytest.mark.parametrize("layout", KINDS)
def test_every_step_is_the_mask_of_its_positions(layout, mask):
    distinct = set()
    for size, local_len in itertools.product(range(1, 9), LENGTHS[layout]):
        want = wanted(layout, mask, local_len, local_len, size)
        placed = Layout(layout, local_len, size)
        for rank, hop in itertools.product(range(size), range(size)):
            step = plan_step(attention_of(mask), placed, placed, rank, hop)
            assert (step.step, step.source) == (hop, (rank - hop) % size)
            assert step.first == (hop == 0)
            check_step(step, want[rank, step.source])
            distinct.update(step.blocks)
    for block in distinct:
        check_block(block)


@pytest.mark.parametrize("mask", MASKS, ids=mask_id)
@pytest.mark.parametrize("layout", KINDS)
def test_queries_and_keys_of_different_length(layout, mask):
    """Position i of the queries faces position i of the keys, whatever the lengths."""
    for size, q_len, k_len in itertools.product((1, 2, 3), LENGTHS[layout], LENGTHS[layout]):
        want = wanted(layout, mask, q_len, k_len, size)
        q_layout, k_layout = Layout(layout, q_len, size), Layout(layout, k_len, size)
        for rank, hop in itertools.product(range(size), range(size)):
            step = plan_step(attention_of(mask), q_layout, k_layout, rank, hop)
            check_step(step, want[rank, step.source])
            for block in step.blocks:
                check_block(block)


@pytest.mark.parametrize("mask", MASKS, ids=mask_id)
@pytest.mark.parametrize("layout", KINDS)
def test_a_ring_ends_after_the_last_step_that_any_rank_needs(layout, mask):
    for size, local_len in itertools.product(range(1, 9), LENGTHS[layout]):
        want = wanted(layout, mask, local_len, local_len, size)
        needed = [
            hop
            for hop in range(size)
            if any(want[rank, (rank - hop) % size].any() for rank in range(size))
        ]
        placed = Layout(layout, local_len, size)
        for rank in range(size):
            plan = plan_ring(attention_of(mask), placed, placed, rank)
            assert (plan.rank, plan.world_size) == (rank, size)
            assert len(plan.steps) == max(needed, default=0) + 1
            assert [step._replace(finished=()) for step in plan.steps] == [
                plan_step(attention_of(mask), placed, placed, rank, hop)
                for hop in range(len(plan.steps))
            ]
            seen = [want[rank, step.source].any(1) for step in plan.steps]
            for hop, step in enumerate(plan.steps):
                later = np.any(seen[hop + 1 :], axis=0)
                assert step.finished == gaps(~(seen[hop] & ~later)), step
            assert plan.unseen_q() == gaps(np.any(seen, axis=0)), plan


@pytest.mark.parametrize("layout", KINDS)
def test_without_a_mask_a_step_is_one_full_block(layout):
    for size, q_len, k_len in itertools.product((1, 2, 5), (2, 6), (2, 8)):
        for k_kind in KINDS:  # positions do not matter, so neither must the layouts
            steps = plan_ring(
                attention_of(MASKS[0]), Layout(layout, q_len, size), Layout(k_kind, k_len, size), 0
            ).steps
            assert len(steps) == size
            for step in steps:
                assert step.blocks == (Block(0, q_len, 0, k_len, 1 - q_len, k_len - 1),)
                assert step.blocks[0].full


@pytest.mark.parametrize("layout", KINDS)
def test_causal_is_at_most_one_block_a_step(layout):
    for size, local_len in itertools.product(range(1, 9), LENGTHS[layout]):
        placed = Layout(layout, local_len, size)
        for rank, hop in itertools.product(range(size), range(size)):
            blocks = plan_step(Attention(1.0, causal=True), placed, placed, rank, hop).blocks
            assert len(blocks) <= 1, (placed, rank, hop, blocks)


@pytest.mark.parametrize("local_len", [2, 6, 8, 10])
@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_causal_zigzag_has_the_three_known_shapes(size, local_len):
    half, placed = local_len // 2, Layout("zigzag", local_len, size)
    for rank, hop in itertools.product(range(size), range(size)):
        step = plan_step(Attention(1.0, causal=True), placed, placed, rank, hop)
        if step.source == rank:
            want = Block(0, local_len, 0, local_len, 1 - local_len, 0)
        elif step.source < rank:
            want = Block(0, local_len, 0, half, 1 - local_len, half - 1)
        else:
            want = Block(half, local_len, 0, local_len, 1 - local_len, half - 1)
        assert step.blocks == (want,)
        assert want.full == (step.source != rank)


@pytest.mark.parametrize("size", [2, 4, 7])
def test_causal_stripe_and_contiguous_shapes(size):
    for rank, hop in itertools.product(range(size), range(size)):
        source = (rank - hop) % size
        placed = Layout("stripe", 5, size)
        (block,) = plan_step(Attention(1.0, causal=True), placed, placed, rank, hop).blocks
        assert block == (Block(0, 5, 0, 5, -4, 0) if source <= rank else Block(1, 5, 0, 4, -4, -1))
        placed = Layout("contiguous", 5, size)
        blocks = plan_step(Attention(1.0, causal=True), placed, placed, rank, hop).blocks
        assert blocks == (
            (Block(0, 5, 0, 5, -4, 0),)
            if source == rank
            else (Block(0, 5, 0, 5, -4, 4),)
            if source < rank
            else ()
        )


def test_zigzag_with_a_window_can_have_two_blocks_on_one_query_row():
    placed = Layout("zigzag", 8, 2)  # rank 0 holds 0..3 and 12..15, rank 1 holds 4..11
    blocks = plan_step(Attention(1.0, window=(6, 6)), placed, placed, 1, 1).blocks
    assert blocks == (Block(0, 6, 0, 4, -2, 3), Block(2, 8, 4, 8, -3, 2))


@pytest.mark.parametrize("mask", MASKS, ids=mask_id)
def test_one_device_aligns_the_last_rows(mask):
    for q_len, k_len in itertools.product((0, 1, 4, 7, 12), repeat=2):
        step = plan_local(attention_of(mask), q_len, k_len)
        assert (step.step, step.source) == (0, 0)
        want = oracle.visible(range(k_len - q_len, k_len), range(k_len), *mask).numpy()
        check_step(step, want)
        assert len(step.blocks) <= 1
        for block in step.blocks:
            check_block(block)


def test_unseen_ranges_of_blocks_that_share_rows():
    blocks = (Block(1, 9, 0, 2, -8, 0), Block(2, 4, 5, 7, 1, 4), Block(6, 7, 8, 9, 2, 2))
    step = StepPlan(1, 0, blocks, 12, 10)
    assert step.unseen_q() == ((0, 1), (9, 12))
    assert step.unseen_k() == ((2, 5), (7, 8), (9, 10))
    assert StepPlan(0, 0, (), 3, 0).unseen_q() == ((0, 3),)
    assert StepPlan(0, 0, (), 3, 0).unseen_k() == ()


def test_runs_of_different_stride_under_a_mask_are_refused():
    with pytest.raises(AssertionError, match="different stride"):
        block_between(Attention(1.0, causal=True), Run(0, 4, 0, 1), Run(0, 4, 0, 2))
    assert block_between(Attention(1.0), Run(0, 4, 0, 1), Run(0, 4, 0, 2)).full


def test_block_between_any_two_runs():
    draw = random.Random(0)
    for _ in range(4000):
        stride = draw.choice((1, 1, 2, 3, 8))
        q, k = (Run(draw.randrange(6), draw.randrange(8), draw.randrange(60), stride) for _ in "qk")
        mask = draw.random() < 0.3, (draw.randrange(-1, 40), draw.randrange(-1, 40))
        block = block_between(attention_of(mask), q, k)
        rows, columns = ([run.pos + run.stride * i for i in range(run.n)] for run in (q, k))
        want = np.zeros((q.row + q.n, k.row + k.n), bool)
        want[q.row :, k.row :] = oracle.visible(rows, columns, *mask).numpy()
        assert np.array_equal(painted([] if block is None else [block], *want.shape), want)
        if block is not None:
            check_block(block)


def every_block(q_len, k_len):
    """Return {mask as an int of bits: block} of all trimmed blocks of a small grid."""
    blocks = {}
    for q_begin, q_end in itertools.combinations(range(q_len + 1), 2):
        for k_begin, k_end in itertools.combinations(range(k_len + 1), 2):
            for lo, hi in itertools.product(range(-q_len, k_len + 1), repeat=2):
                block = trim(Block(q_begin, q_end, k_begin, k_end, lo, hi))
                if block is not None:
                    blocks[bits(block, k_len)] = block
    return blocks


def bits(block, k_len):
    seen = 0
    for i in range(block.q_begin, block.q_end):
        begin, end = block.seen_by(i)
        seen |= ((1 << end) - (1 << begin)) << (i * k_len)
    return seen


def test_trim_is_canonical():
    """Whatever rectangle and band a mask was written with, trim gives one block."""
    q_len, k_len = 4, 3
    known = {}
    for q_begin, q_end in itertools.combinations(range(q_len + 1), 2):
        for k_begin, k_end in itertools.combinations(range(k_len + 1), 2):
            for lo, hi in itertools.product(range(-q_len - 1, k_len + 2), repeat=2):
                written = Block(q_begin, q_end, k_begin, k_end, lo, hi)
                block = trim(written)
                seen = bits(written, k_len)
                assert (block is None) == (seen == 0), written
                if block is not None:
                    assert bits(block, k_len) == seen
                    assert known.setdefault(seen, block) == block
                    assert trim(block) == block
    for block in known.values():
        check_block(block)


@pytest.mark.parametrize("grid", [(3, 3), (2, 5), (5, 2)], ids=str)
def test_merge_joins_two_blocks_exactly_when_one_band_can(grid):
    blocks = every_block(*grid)
    joined = 0
    for (a_bits, a), (b_bits, b) in itertools.combinations(blocks.items(), 2):
        if a_bits & b_bits:
            continue
        merged = merge([a, b])
        one = blocks.get(a_bits | b_bits)
        assert merged == ((one,) if one else tuple(sorted((a, b)))), (a, b)
        joined += one is not None
    assert joined > 100


def test_same_mask_exhaustively_on_a_small_grid():
    blocks = every_block(3, 3)
    pairs = [
        (a | b, x, y) for (a, x), (b, y) in itertools.combinations(blocks.items(), 2) if not a & b
    ]
    draw = random.Random(0)
    for whole_bits, whole in blocks.items():
        for union, a, b in draw.sample(pairs, 150):
            assert _same_mask(whole, a, b) == (union == whole_bits), (whole, a, b)


def disjoint_blocks(draw, length, tries):
    blocks, taken = [], np.zeros((length, length), int)
    for _ in range(tries):
        q_begin, q_end = sorted((draw.randrange(length + 1), draw.randrange(length + 1)))
        k_begin, k_end = sorted((draw.randrange(length + 1), draw.randrange(length + 1)))
        lo, hi = sorted((draw.randrange(-length, length), draw.randrange(-length, length)))
        block = trim(Block(q_begin, q_end, k_begin, k_end, lo, hi))
        if block is None or (taken + painted([block], length, length)).max() > 1:
            continue
        blocks.append(block)
        taken += painted([block], length, length)
    return blocks, taken


def cut_up(draw, whole, pieces):
    """Cut a block into disjoint blocks along rows, columns and diagonals."""
    parts = [whole]
    for _ in range(pieces):
        b = parts.pop(draw.randrange(len(parts)))
        row, column = draw.randint(b.q_begin, b.q_end), draw.randint(b.k_begin, b.k_end)
        diagonal = draw.randint(b.lo, b.hi)
        halves = draw.choice(
            (
                (b._replace(q_end=row), b._replace(q_begin=row)),
                (b._replace(k_end=column), b._replace(k_begin=column)),
                (b._replace(hi=diagonal), b._replace(lo=diagonal + 1)),
            )
        )
        parts += [part for half in halves if (part := trim(half)) is not None]
    return parts


def check_merge(blocks, taken):
    merged = merge(blocks)
    assert np.array_equal(painted(merged, *taken.shape), taken), blocks
    assert len(merged) <= len(blocks)
    assert merge(list(merged)) == merged == tuple(sorted(merged))
    for block in merged:
        check_block(block)
    return merged


@pytest.mark.parametrize("length", [5, 12, 40])
def test_merge_of_random_disjoint_blocks_keeps_the_mask(length):
    draw = random.Random(length)
    shrunk = 0
    for _ in range(150):
        blocks, taken = disjoint_blocks(draw, length, 8)
        shrunk += len(check_merge(blocks, taken)) < len(blocks)
    assert shrunk or length > 5


@pytest.mark.parametrize("length", [5, 12, 40])
def test_merge_of_a_block_cut_in_pieces_keeps_the_mask(length):
    draw = random.Random(length)
    for _ in range(150):
        (whole, *_), _ = disjoint_blocks(draw, length, 20)
        taken = painted([whole], length, length)
        parts = cut_up(draw, whole, draw.randint(1, 6))
        draw.shuffle(parts)
        check_merge(parts, taken)
        if len(cut := cut_up(draw, whole, 1)) == 2:
            assert merge(cut) == (whole,)
        # One piece missing: the whole must not come back.
        if len(parts) > 1:
            gone = parts.pop(draw.randrange(len(parts)))
            assert whole not in check_merge(parts, taken - painted([gone], length, length))


def test_merge_sees_a_difference_in_one_cell_far_from_every_corner():
    """The union misses, or doubles, a few cells in the middle of long rows."""
    for size in (30, 101):
        full = Block(0, size, 0, size, 1 - size, size - 1)
        for cut, gap in itertools.product((0, 1, size // 2, size - 4), (0, 1, 2)):
            upper, lower = trim(full._replace(hi=cut - 1)), trim(full._replace(lo=cut + gap))
            merged = merge([upper, lower])
            assert merged == ((full,) if gap == 0 else tuple(sorted((upper, lower))))
            assert _same_mask(full, upper, lower) == (gap == 0)
    # Two triangles that fill a square but for the diagonal, and with it.
    below, above = Block(1, 50, 0, 49, -49, -1), Block(0, 49, 1, 50, 1, 49)
    assert len(merge([below, above])) == 2
    assert merge([below, above._replace(q_end=50, k_begin=0, lo=0)]) == (
        Block(0, 50, 0, 50, -49, 49),
    )
    # A band beside a rectangle of the same rows that a box would wrongly fill.
    band, rectangle = Block(0, 40, 0, 40, 0, 0), Block(0, 40, 40, 80, 1, 79)
    assert len(merge([band, rectangle])) == 2


@pytest.mark.parametrize("mask", MASKS, ids=mask_id)
@pytest.mark.parametrize("layout", KINDS)
def test_a_million_tokens_plan_in_milliseconds(layout, mask):
    placed = Layout(layout, 2**20 // 8, 8)
    plan_ring.cache_clear()
    plan_step.cache_clear()
    begin = time.perf_counter()
    plans = [plan_ring(attention_of(mask), placed, placed, rank) for rank in range(8)]
    seconds = time.perf_counter() - begin
    assert seconds < 1  # about 5 ms; a plan that grew with the length would take minutes
    # The blocks show as many cells as the mask has.
    left, right = attention_of(mask).left, attention_of(mask).right
    far = placed.global_len - 1
    lo, hi = -far if left is None else -left, far if right is None else right
    want = cells(Block(0, placed.global_len, 0, placed.global_len, lo, hi))
    assert sum(cells(b) for plan in plans for step in plan.steps for b in step.blocks) == want


def cells(b):
    rows = np.arange(b.q_begin, b.q_end)
    ends, begins = np.minimum(b.k_end, rows + b.hi + 1), np.maximum(b.k_begin, rows + b.lo)
    return int((ends - begins).sum())
