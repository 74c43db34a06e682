"""Layouts against hand-written positions."""

import pytest

import oracle
from ring_flash_attn.core.layout import KINDS, Layout, Run

SIZES = range(1, 9)
LENGTHS = (0, 1, 2, 3, 4, 5, 6, 7, 10, 13, 14)


def layouts():
    for kind in KINDS:
        for world_size in SIZES:
            for local_len in LENGTHS:
                if kind != "zigzag" or local_len % 2 == 0:
                    yield Layout(kind, local_len, world_size)


def test_the_kinds_are_those_of_the_oracle():
    assert set(KINDS) == set(oracle.LAYOUTS)


def test_positions_are_those_written_by_hand():
    for layout in layouts():
        for rank in range(layout.world_size):
            want = oracle.positions(layout.kind, layout.local_len, layout.world_size, rank)
            assert layout.positions(rank) == want, (layout, rank)


def test_ranks_share_the_sequence_without_overlap():
    for layout in layouts():
        held = [p for rank in range(layout.world_size) for p in layout.positions(rank)]
        assert sorted(held) == list(range(layout.global_len)), layout


def test_local_order_is_monotone_in_position():
    # plan relies on it: the local step is then one causal block.
    for layout in layouts():
        for rank in range(layout.world_size):
            assert layout.positions(rank) == sorted(layout.positions(rank))


def test_runs_cover_the_rows_in_order_with_one_stride():
    for layout in layouts():
        for rank in range(layout.world_size):
            runs = layout.runs(rank)
            rows = [row for run in runs for row in range(run.row, run.row + run.n)]
            assert rows == list(range(layout.local_len))
            assert {run.stride for run in runs} == (
                {layout.world_size} if layout.kind == "stripe" else {1}
            )


def test_runs_by_hand():
    assert Layout("contiguous", 5, 3).runs(1) == (Run(0, 5, 5, 1),)
    assert Layout("stripe", 5, 3).runs(1) == (Run(0, 5, 1, 3),)
    assert Layout("zigzag", 6, 3).runs(1) == (Run(0, 3, 3, 1), Run(3, 3, 12, 1))


def test_layouts_are_values():
    assert Layout("zigzag", 6, 3) == Layout("zigzag", 6, 3)
    assert len({Layout("zigzag", 6, 3), Layout("zigzag", 6, 3), Layout("stripe", 6, 3)}) == 2


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="layout must be one of contiguous, zigzag, stripe"):
        Layout("spiral", 4, 2)


@pytest.mark.parametrize("local_len", [1, 7])
def test_zigzag_refuses_an_odd_local_length(local_len):
    with pytest.raises(ValueError, match=f"zigzag needs an even local length.*got {local_len}"):
        Layout("zigzag", local_len, 2)
