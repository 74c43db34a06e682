"""Plans of packed documents, as blocks of rows and as tables filled on the device.

The truth are masks of documents and hand-written positions, cell by cell.
"""

import random

import numpy as np
import pytest
import torch

import oracle
from ring_flash_attn.backends.documents import Side, document_tables
from ring_flash_attn.core.layout import KINDS
from ring_flash_attn.core.packed import Documents, on_device, on_host, plan_gathered, plan_packed
from simulated_ring import attention_of, mask_id

MASKS = [
    (False, (-1, -1)),
    (True, (-1, -1)),
    (True, (5, 0)),
    (False, (3, 2)),
    (False, (0, -1)),
    (False, (-1, 4)),
    (True, (0, 0)),
    (False, (100, 100)),
]
# Local lengths of documents: one, several, tiny, empty ones in between.
PACKINGS = [(12,), (4, 10, 2), (2, 2, 2, 2), (0, 6, 0, 0, 8, 0), (30, 2)]


def cu_of(lengths):
    return [0, *np.cumsum(lengths, dtype=int).tolist()]


def wanted(kind, mask, lengths, size):
    """Return {(rank, source): mask [rows, rows]} of packed documents."""
    rows = sum(lengths)
    masks = {(a, b): np.zeros((rows, rows), bool) for a in range(size) for b in range(size)}
    for begin, length in zip(cu_of(lengths), lengths, strict=False):
        whole = oracle.visible(range(length * size), range(length * size), *mask).numpy()
        places = [oracle.positions(kind, length, size, rank) for rank in range(size)]
        for (rank, source), each in masks.items():
            cells = whole[np.ix_(places[rank], places[source])]
            each[begin : begin + length, begin : begin + length] = cells
    return masks


def painted(blocks, q_len, k_len):
    """Return how many blocks (begin, end, begin, end, lo, hi) show each cell."""
    count = np.zeros((q_len, k_len), int)
    for q_begin, q_end, k_begin, k_end, lo, hi in blocks:
        distance = np.arange(k_begin, k_end) - np.arange(q_begin, q_end)[:, None]
        count[q_begin:q_end, k_begin:k_end] += (distance >= lo) & (distance <= hi)
    return count


def lengths_of(kind, lengths):
    """Odd lengths where the layout allows them."""
    return lengths if kind == "zigzag" else tuple(n + (n > 2) for n in lengths)


@pytest.mark.parametrize("mask", MASKS, ids=mask_id)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_a_packed_ring_are_the_mask(kind, mask):
    for size in range(1, 6):
        for packing in PACKINGS:
            lengths = lengths_of(kind, packing)
            rows, cu = sum(lengths), torch.tensor(cu_of(lengths), dtype=torch.int32)
            want = wanted(kind, mask, lengths, size)
            plans = [plan_packed(attention_of(mask), kind, size, rank) for rank in range(size)]
            assert len({len(plan.steps) for plan in plans}) == 1, "hops pair up"
            for rank, plan in enumerate(plans):
                # Three rows belong to no document.
                steps = on_host(plan, Documents(cu, cu, rows + 3, rows + 3)).steps
                for hop in range(size):
                    seen = want[rank, (rank - hop) % size]
                    if hop >= len(steps):
                        assert not seen.any(), "the ring ended too early"
                        continue
                    assert steps[hop].source == (rank - hop) % size
                    assert np.array_equal(painted(steps[hop].blocks, rows, rows), seen)
                    assert steps[hop].q_len == steps[hop].k_len == rows + 3


def test_one_block_a_document_where_one_band_says_it():
    for kind in KINDS:
        for mask in MASKS[:2]:
            for rank in range(4):
                for step in plan_packed(attention_of(mask), kind, 4, rank).steps:
                    assert len(step.blocks) <= 1


def random_packings(count, seed):
    generator = random.Random(seed)
    for _ in range(count):
        yield tuple(2 * generator.randrange(0, 30) for _ in range(80))


@pytest.mark.kernel
# Triton's interpreter: a loop whose bound is an argument.
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
@pytest.mark.parametrize("mask", [MASKS[1], MASKS[2], MASKS[3]], ids=mask_id)
@pytest.mark.parametrize("kind", KINDS)
def test_tables_filled_on_the_device(kind, mask, device):
    cases = [(2, 16, 3, PACKINGS[1]), (2, 16, 0, PACKINGS[3])]
    if kind == "zigzag" and mask in MASKS[1:3]:
        # More documents and more tiles than one program of the kernels looks at in one go.
        cases += [(2, 32, 3, packing) for packing in random_packings(1, seed=0)]
    for size, tile_rows, spare, packing in cases:
        lengths = lengths_of(kind, packing)
        if not sum(lengths):
            continue
        want = wanted(kind, mask, lengths, size)
        for rank in range(size):
            check_tables(kind, mask, lengths, size, rank, tile_rows, spare, want, device)


def check_tables(kind, mask, lengths, size, rank, tile_rows, spare, want, device):
    rows = sum(lengths)
    cu = torch.tensor(cu_of(lengths), dtype=torch.int32, device=device)
    documents = Documents(cu, cu, rows + spare, rows + spare)
    plan = plan_packed(attention_of(mask), kind, size, rank)
    finished = np.zeros(rows + spare, int)
    touched = [np.zeros(rows + spare, bool) for _ in plan.steps]
    sides = Side(False, tile_rows), Side(True, tile_rows), Side(False, 2 * tile_rows)
    for keys in (False, True):
        for index, step in enumerate(on_device(plan, documents).steps):
            table = document_tables(step, Side(keys, tile_rows), sides)
            tiles, entries = table.tiles[: table.n_tiles].tolist(), table.entries.tolist()
            blocks, covered, works = [], np.zeros(rows + spare, int), []
            for begin, end, first, last, finishes in tiles:
                assert 0 <= begin <= end <= rows + spare and end - begin <= tile_rows
                covered[begin:end] += 1
                work = 0
                for low, high, lo, hi in entries[first:last]:
                    own, other = (begin, end), (low, high)
                    reach = (begin - hi, end - lo) if keys else (begin + lo, end + hi)
                    work += max(0, min(high, reach[1]) - max(low, reach[0]))
                    blocks.append((*other, *own, lo, hi) if keys else (*own, *other, lo, hi))
                works.append(work if end > begin else -1)
                if not keys:
                    finished[begin:end] += finishes
            assert covered.max() <= 1, "tiles are disjoint"
            if step.first:
                assert covered.min() == 1, "step 0 writes every row"
            if not keys:
                touched[index] = covered > 0
            assert works == sorted(works, reverse=True), "most work first"
            seen = want[rank, step.source]
            count = painted(blocks, rows + spare, rows + spare)
            assert np.array_equal(count[:rows, :rows], seen) and count.sum() == seen.sum()
    # A row is finished once, and never touched again.
    assert (finished == 1).all()
    assert np.array_equal(sum(touched[1:], start=touched[0]), np.ones(rows + spare, bool))


@pytest.mark.parametrize("mask", MASKS, ids=mask_id)
def test_gathered_keys_are_placed_by_their_distance(mask):
    """Rows 7 to 17 of 30 against gathered keys 5 to 22, in documents that the cuts go through."""
    edges, mine, keys = (0, 5, 12, 13, 22, 30), range(7, 18), range(5, 22)
    document = np.searchsorted(edges, np.arange(30), side="right")
    whole = oracle.visible(range(30), range(30), *mask).numpy()
    whole &= document[:, None] == document[None, :]
    want = whole[np.ix_(mine, keys)]
    cu_q = torch.tensor([0, 5, 6, 11], dtype=torch.int32)
    cu_k = torch.tensor([0, 7, 8, 17], dtype=torch.int32)
    plan = on_host(plan_gathered(attention_of(mask), 7 - 5), Documents(cu_q, cu_k, 11, 17))
    assert len(plan.steps) == 1
    assert np.array_equal(painted(plan.steps[0].blocks, 11, 17), want)
