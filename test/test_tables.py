"""Tables by brute force: what their tiles and entries show is what the blocks show."""

import random
import time
from itertools import pairwise

import numpy as np
import pytest

from ring_flash_attn.core.attention import Attention
from ring_flash_attn.core.layout import KINDS, Layout
from ring_flash_attn.core.plan import Block, plan_step, trim
from ring_flash_attn.core.tables import Tables, key_tables, query_tables

AXES = {"query": query_tables, "key": key_tables}
WINDOWS = [(-1, -1), (0, 0), (3, 2), (11, -1), (-1, 4), (9, 30), (100, 100)]


def shown(blocks, length):
    """Return how many blocks show each (query, key)."""
    i, j = np.arange(length)[:, None], np.arange(length)[None]
    count = np.zeros((length, length), int)
    for b in blocks:
        inside = (i >= b.q_begin) & (i < b.q_end) & (j >= b.k_begin) & (j < b.k_end)
        count += inside & (j - i >= b.lo) & (j - i <= b.hi)
    return count


def shown_by_entry(tile, entry, axis, length):
    """Return the cells [query, key] of one tile and one of its entries."""
    i, j = np.arange(length)[:, None], np.arange(length)[None]
    rows, others = (i, j) if axis == "query" else (j, i)
    inside = (rows >= tile.begin) & (rows < tile.end)
    inside = inside & (others >= entry.begin) & (others < entry.end)
    return inside & (j - i >= entry.lo) & (j - i <= entry.hi)


def check(blocks, axis, tile_rows, length=40):
    tables = AXES[axis](tuple(blocks), tile_rows)
    count, works = np.zeros((length, length), int), []
    owners, used = np.zeros(length, int), set()
    for tile in tables.tiles:
        assert 0 < tile.end - tile.begin <= tile_rows, tile
        assert tile.first_entry < tile.end_entry <= len(tables.entries), tile
        owners[tile.begin : tile.end] += 1
        walked = range(tile.first_entry, tile.end_entry)
        used.update(walked)
        work = 0
        for entry in (tables.entries[e] for e in walked):
            cells = shown_by_entry(tile, entry, axis, length)
            assert cells.any(), f"{tile} walks {entry} for nothing"
            count += cells
            work += cells.any(0 if axis == "query" else 1).sum()
        works.append(work)
    want = shown(blocks, length)
    assert np.array_equal(count, want)
    touched = want.any(1 if axis == "query" else 0)
    assert np.array_equal(owners, touched.astype(int)), "a row has no owner, or two"
    assert used == set(range(len(tables.entries)))
    assert all(longer >= shorter for longer, shorter in pairwise(works)), works
    assert len(tables.tiles) <= touched.sum() // tile_rows + 2 * len(blocks)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("causal", [False, True], ids=["open", "causal"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("layout", KINDS)
def test_tables_of_every_step_show_its_mask(layout, window, causal, axis):
    steps = set()
    for size, local_len in ((1, 40), (2, 26), (3, 14), (5, 8)):
        placed = Layout(layout, local_len, size)
        for rank in range(size):
            for hop in range(size):
                attention = Attention(1.0, causal, window)
                steps.add(plan_step(attention, placed, placed, rank, hop).blocks)
    for blocks in steps:
        for tile_rows in (1, 4, 7, 64):
            check(blocks, axis, tile_rows)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("tile_rows", [1, 3, 8, 16, 128])
def test_tables_of_random_disjoint_blocks(axis, tile_rows):
    """Many blocks share rows here: a tile walks a list, and lists change along the rows."""
    draw = random.Random(0)
    longest = 0
    for _ in range(40):
        blocks, taken = [], np.zeros((40, 40), int)
        for _ in range(12):
            q_begin, q_end = sorted(draw.sample(range(41), 2))
            k_begin, k_end = sorted(draw.sample(range(41), 2))
            lo, hi = sorted(draw.sample(range(-40, 41), 2))
            block = trim(Block(q_begin, q_end, k_begin, k_end, lo, hi))
            if block is not None and (taken + shown([block], 40)).max() <= 1:
                blocks.append(block)
                taken += shown([block], 40)
        check(blocks, axis, tile_rows)
        tables = AXES[axis](tuple(blocks), tile_rows)
        longest = max(longest, *(t.end_entry - t.first_entry for t in tables.tiles))
    assert longest > 2


@pytest.mark.parametrize("axis", AXES)
def test_no_blocks_give_no_tiles(axis):
    assert AXES[axis]((), 16) == Tables((), ())


def test_a_tile_by_hand():
    blocks = (Block(0, 4, 0, 4, -3, 0), Block(2, 4, 4, 6, 1, 3))
    tables = query_tables(blocks, 128)
    assert [(t.begin, t.end) for t in tables.tiles] == [(2, 4), (0, 2)]
    assert [tuple(tables.entries[t.first_entry : t.end_entry]) for t in tables.tiles] == [
        ((0, 4, -3, 0), (4, 6, 1, 3)),
        ((0, 4, -3, 0),),
    ]


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("window", [(-1, -1), (4096, 0), (100_000, 7)], ids=str)
@pytest.mark.parametrize("layout", KINDS)
def test_a_million_tokens_tabulate_in_milliseconds(layout, window, axis):
    placed = Layout(layout, 2**20, 2)
    blocks = plan_step(Attention(1.0, True, window), placed, placed, 0, 0).blocks
    begin = time.perf_counter()
    tables = AXES[axis](blocks, 128)
    assert time.perf_counter() - begin < 2  # about 30 ms, for 8192 tiles
    assert 2**13 <= len(tables.tiles) <= 2**13 + 4
    assert len(tables.entries) <= 6
