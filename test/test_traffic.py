"""Which key rows travel: from plans, against masks from hand-written positions."""

import pytest

import oracle
from copy_engine_ranks import CAUSAL, FULL, Layer, Member
from ring_flash_attn.core.attention import Attention
from ring_flash_attn.core.layout import Layout
from ring_flash_attn.core.packed import Documents, on_device, plan_packed
from ring_flash_attn.core.plan import Block, StepPlan
from ring_flash_attn.core.traffic import packed_traffic, ring_traffic, rows_read, rows_to_zero
from stream_emulator import World

MASKS = [FULL, CAUSAL, (True, (5, 0)), (False, (3, 2)), (False, (-1, 4)), (True, (0, 0))]
SIZES = [1, 2, 3, 4, 7]


def traffic_of(layout, mask, size, rank, local_len=8):
    shards = Layout(layout, local_len, size)
    return ring_traffic(Attention(1.0, *mask), shards, shards, rank)


def rows_seen(layout, mask, size, rank, source, local_len=8):
    """Return the range of the source's rows that a rank's queries see, cell by cell."""
    seen = oracle.visible(
        oracle.positions(layout, local_len, size, rank),
        oracle.positions(layout, local_len, size, source),
        *mask,
    )
    rows = seen.any(0).nonzero().flatten().tolist()
    return (rows[0], rows[-1] + 1) if rows else None


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=lambda n: f"P{n}")
def test_rows_are_those_that_the_mask_shows(size, layout, mask):
    for rank in range(size):
        traffic = traffic_of(layout, mask, size, rank)
        assert traffic.pulls[0] is None and traffic.lends[0] is None
        for step in range(1, size):
            source, reader = (rank - step) % size, (rank + step) % size
            pulled = rows_seen(layout, mask, size, rank, source)
            lent = rows_seen(layout, mask, size, reader, rank)
            if step < len(traffic.pulls):
                assert traffic.source(step) == source
                assert (traffic.pulls[step], traffic.lends[step]) == (pulled, lent)
            else:
                assert pulled is None and lent is None


@pytest.mark.parametrize("layout", oracle.LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=lambda n: f"P{n}")
def test_what_one_pulls_the_other_lends(size, layout):
    for mask in MASKS:
        attention = Attention(1.0, *mask)
        for of in (
            [traffic_of(layout, mask, size, rank) for rank in range(size)],
            [packed_traffic(attention, layout, size, rank, 40) for rank in range(size)],
        ):
            for rank, traffic in enumerate(of):
                for step in range(1, len(traffic.pulls)):
                    assert traffic.pulls[step] == of[(rank - step) % size].lends[step]


def test_zigzag_pulls_half_of_what_came_before():
    for rank in range(4):
        traffic = traffic_of("zigzag", CAUSAL, 4, rank)
        for step in range(1, 4):
            assert traffic.pulls[step] == ((0, 4) if traffic.source(step) < rank else (0, 8))


def test_contiguous_pulls_nothing_of_what_comes_after():
    assert traffic_of("contiguous", CAUSAL, 3, 0).pulls == (None, None, None)
    assert traffic_of("contiguous", CAUSAL, 3, 2).pulls == (None, (0, 8), (0, 8))
    assert traffic_of("contiguous", (True, (3, 0)), 3, 1).pulls == (None, (5, 8))


def test_documents_pull_all_rows_or_none():
    attention = Attention(1.0, True)
    assert packed_traffic(attention, "zigzag", 2, 1, 40).pulls == (None, (0, 40))
    assert packed_traffic(attention, "contiguous", 2, 0, 40).pulls == (None, None)
    assert packed_traffic(attention, "contiguous", 2, 0, 40).lends == (None, (0, 40))


def test_a_gap_between_blocks_is_read_and_zeroed():
    blocks = Block(0, 4, 1, 3, -3, 2), Block(4, 8, 6, 8, -1, 3)
    step = StepPlan(1, 0, blocks, 8, 10)
    assert rows_read(step) == (1, 8)
    assert rows_to_zero(step, (1, 8)) == ((3, 6),)
    assert rows_to_zero(step, (0, 10)) == ((0, 1), (3, 6), (8, 10))
    assert rows_read(StepPlan(1, 0, (), 8, 10)) is None


def test_documents_store_every_row_at_step_0_alone():
    plan = plan_packed(Attention(1.0, True), "zigzag", 2, 1)
    first, second = on_device(plan, Documents(None, None, 8, 8)).steps
    assert rows_to_zero(first, (0, 8)) == ()
    assert rows_to_zero(second, (0, 8)) == ()


@pytest.mark.parametrize("mask", MASKS[:3], ids=str)
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_the_owner_adds_the_units_that_a_reader_stores(layout, mask):
    """The rows of whole units of a document: 8 local rows, or twice 4."""
    size, attention = 3, Attention(1.0, *mask)
    for rank in range(size):
        traffic = packed_traffic(attention, layout, size, rank, 8)
        assert traffic.units == (2 if layout == "zigzag" else 1)
        rows = 8 // traffic.units
        for step in range(1, len(traffic.lends)):
            seen = rows_seen(layout, mask, size, (rank + step) % size, rank)
            units = traffic.returns[step]
            if seen is None:
                assert units is None or layout == "contiguous", "a longer document may show some"
                continue
            assert units is not None
            assert units[0] * rows <= seen[0] and seen[1] <= units[1] * rows


@pytest.mark.parametrize("mask", MASKS[:3], ids=str)
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_no_byte_moves_that_the_plan_does_not_need(layout, mask):
    size, layer = 3, Layer(layout, mask)
    world = World(size)
    row = 2 * 4 * 8  # k and v of one head of 4, float64
    needed = []
    for rank in range(size):
        rows = [x for x in traffic_of(layout, mask, size, rank).pulls if x is not None]
        needed.append(row * sum(end - begin for begin, end in rows))
    members = [Member(world, rank) for rank in range(size)]
    kept = [member.forward(layer) for member in members]
    world.run(0)
    assert world.copied == needed
    for member, held in zip(members, kept, strict=True):
        member.backward(held)
    world.run(1)
    # K and V again; dk and dv are stored where they belong.
    assert world.copied == [2 * x for x in needed]
