"""Layouts against hand-written positions."""

import random
import re
from itertools import pairwise

import pytest
import torch

import oracle
from ring_flash_attn.core.layout import KINDS, Layout, Run
from ring_flash_attn.core.packed_layout import PACKED_KINDS, PackedLayout

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


def numbered(*shape):
    return torch.arange(torch.Size(shape).numel()).view(shape)


def test_shards_are_the_oracles_and_unshard_gives_the_tensor_back():
    for layout in layouts():
        if layout.world_size > 4:
            continue
        # Strided, as a slice of a packed qkv is.
        x = numbered(2, layout.global_len, 3, 2)[..., 1]
        shards = [layout.shard(x, rank) for rank in range(layout.world_size)]
        for rank, shard in enumerate(shards):
            want = oracle.shard(x, layout.kind, layout.world_size, rank)
            assert torch.equal(shard, want), (layout, rank)
            assert shard.is_contiguous()
        assert torch.equal(layout.unshard(shards), x), layout


def test_shard_cuts_any_dimension_and_copies():
    layout, x = Layout("stripe", 2, 2), numbered(4, 3)
    assert layout.shard(x, 1, dim=0).tolist() == [[3, 4, 5], [9, 10, 11]]
    assert layout.shard(x.T, 1, dim=-1).tolist() == [[3, 9], [4, 10], [5, 11]]
    shard = Layout("contiguous", 4, 1).shard(x, 0, dim=0).zero_()
    assert x.any() and not shard.any()


def test_gradients_go_through_shard_and_unshard():
    layout = Layout("zigzag", 4, 2)
    x = torch.randn(1, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, 8, dtype=torch.float64)
    (layout.unshard([layout.shard(x, rank) for rank in range(2)]) * weight).sum().backward()
    assert torch.equal(x.grad, weight)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda layout: layout.shard(numbered(1, 8), 2), "rank must be in [0, 2), got 2"),
        (lambda layout: layout.shard(numbered(1, 8), -1), "rank must be in [0, 2), got -1"),
        (
            lambda layout: layout.shard(numbered(1, 7), 0),
            "x must have 8 rows along dim 1, got shape [1, 7]",
        ),
        (
            lambda layout: layout.unshard([numbered(1, 4)]),
            "parts must be 2 tensors, one a rank, got 1",
        ),
        (
            lambda layout: layout.unshard([numbered(1, 4), numbered(1, 5)]),
            "parts[1] must have 4 rows along dim 1, got shape [1, 5]",
        ),
    ],
)
def test_shard_and_unshard_refuse_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(Layout("zigzag", 4, 2))


# Lengths in units of the smallest that a kind takes; 0 is a document without rows.
DOCUMENTS = ((), (0,), (1,), (3, 1, 2), (0, 2, 0, 0, 5, 1, 0))


def packed_layouts():
    """Yield layouts with the lengths of their documents."""
    generator = random.Random(0)
    for kind in PACKED_KINDS:
        for world_size in range(1, 5):
            unit = 2 * world_size if kind == "zigzag" else world_size
            cases = [[unit * length for length in lengths] for lengths in DOCUMENTS]
            if kind == "gather":
                drawn = [generator.randrange(7) for _ in range(9)]
                cases.append([*drawn, -sum(drawn) % world_size])
            for lengths in cases:
                starts = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
                yield PackedLayout(kind, tuple(starts), world_size), lengths


def rows_by_hand(layout, lengths, rank):
    """Return (document, position in it) of each local row, written down document by document."""
    everything = [(n, position) for n, length in enumerate(lengths) for position in range(length)]
    size = layout.world_size
    if layout.kind == "gather":
        n = len(everything) // size
        return everything[rank * n : (rank + 1) * n]
    return [
        (n, position)
        for n, length in enumerate(lengths)
        for position in oracle.positions(layout.kind, length // size, size, rank)
    ]


def test_packed_rows_and_positions_are_those_written_by_hand():
    for layout, lengths in packed_layouts():
        for rank in range(layout.world_size):
            want = rows_by_hand(layout, lengths, rank)
            assert layout.positions(rank) == [position for _, position in want], (layout, rank)
            rows = [sum(lengths[:n]) + position for n, position in want]
            assert layout.rows(rank) == rows, (layout, rank)


def test_packed_totals_and_local_boundaries():
    for layout, lengths in packed_layouts():
        assert layout.total == sum(lengths)
        assert layout.local_total * layout.world_size == layout.total
        if layout.kind == "gather":
            continue
        held = [length // layout.world_size for length in lengths]
        assert [stop - start for start, stop in pairwise(layout.local_cu_seqlens)] == held
        assert layout.local_cu_seqlens[0] == 0
        assert layout.max_seqlen == max(held, default=0)
        for rank in range(layout.world_size):
            documents = [n for n, _ in rows_by_hand(layout, lengths, rank)]
            assert documents == [n for n, rows in enumerate(held) for _ in range(rows)]


def test_packed_shards_hold_their_rows_and_unshard_gives_the_tensor_back():
    for layout, _ in packed_layouts():
        x = numbered(layout.total, 3, 2)[..., 0]
        shards = [layout.shard(x, rank) for rank in range(layout.world_size)]
        for rank, shard in enumerate(shards):
            assert shard.is_contiguous()
            assert torch.equal(shard, x[torch.tensor(layout.rows(rank), dtype=torch.long)])
        assert torch.equal(layout.unshard(shards), x), layout
        across = [layout.shard(x.T, rank, dim=1) for rank in range(layout.world_size)]
        assert torch.equal(layout.unshard(across, dim=1), x.T), layout


def test_packed_layout_by_hand():
    layout = PackedLayout("zigzag", (0, 4, 12), 2)
    assert layout.rows(0) == [0, 3, 4, 5, 10, 11]
    assert layout.positions(0) == [0, 3, 0, 1, 6, 7]
    assert layout.rows(1) == [1, 2, 6, 7, 8, 9]
    assert (layout.local_cu_seqlens, layout.max_seqlen) == ((0, 2, 6), 4)
    assert PackedLayout("gather", (0, 3, 8), 2).positions(1) == [1, 2, 3, 4]


def test_packed_layouts_are_values():
    assert len({PackedLayout("stripe", (0, 4), 2), PackedLayout("stripe", (0, 4), 2)}) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("spiral", (0, 4), 2), "kind must be one of contiguous, zigzag, stripe, gather"),
        (("stripe", (0, 4), 0), "world_size must be at least 1, got 0"),
        (("stripe", (), 2), "cu_seqlens must start at 0, got ()"),
        (("stripe", (2, 4), 2), "cu_seqlens must start at 0, got (2, 4)"),
        (("gather", (0, 4, 2), 2), "cu_seqlens must not decrease, got (0, 4, 2)"),
        (
            ("contiguous", (0, 4, 7), 2),
            "cu_seqlens must give every document a multiple of 2 rows in the contiguous layout of "
            "2 ranks, got 3 rows in document 1",
        ),
        (
            ("zigzag", (0, 6, 14), 2),
            "cu_seqlens must give every document a multiple of 4 rows in the zigzag layout of "
            "2 ranks, got 6 rows in document 0",
        ),
        (
            ("gather", (0, 4, 7), 2),
            "cu_seqlens must end with a multiple of 2 (the ranks) in the gather layout, got 7",
        ),
    ],
)
def test_a_packed_layout_refuses_what_it_cannot_place(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PackedLayout(*arguments)


@pytest.mark.parametrize("cu_seqlens", [[0, 4], torch.tensor([0, 4]), (0, 4.0), (0, True)])
def test_a_packed_layout_takes_host_ints_only(cu_seqlens):
    with pytest.raises(TypeError, match="cu_seqlens must be a tuple of ints, got"):
        PackedLayout("stripe", cu_seqlens, 2)


@pytest.mark.parametrize("name", ["local_cu_seqlens", "max_seqlen"])
def test_gather_has_no_boundaries_common_to_all_ranks(name):
    with pytest.raises(ValueError, match="call llama3_flash_attn_prepare_cu_seqlens"):
        getattr(PackedLayout("gather", (0, 3, 8), 2), name)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda layout: layout.rows(2), "rank must be in [0, 2), got 2"),
        (lambda layout: layout.shard(numbered(8), -1), "rank must be in [0, 2), got -1"),
        (
            lambda layout: layout.shard(numbered(7), 0),
            "x must have 8 rows along dim 0, got shape [7]",
        ),
        (
            lambda layout: layout.unshard([numbered(4)] * 3),
            "parts must be 2 tensors, one a rank, got 3",
        ),
        (
            lambda layout: layout.unshard([numbered(5), numbered(4)]),
            "parts[0] must have 4 rows along dim 0, got shape [5]",
        ),
    ],
)
@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_a_packed_layout_refuses_tensors_that_do_not_fit(kind, call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(PackedLayout(kind, (0, 4, 8), 2))
