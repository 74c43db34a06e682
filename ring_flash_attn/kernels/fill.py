"""Kernels that fill the tables of a packed call from cu_seqlens, all that it needs at once.

A table's specification, int32 numbers, says what every document has in it: whether the tiles' side
is the keys; the rows of a tile; whether the rows of no document get tiles; PARTS parts, disjoint
unit ranges of the tiles' side, each (begin, end, entries, finishes, further); and for each part
ENTRIES entries, unit ranges of the other side under a band, each (begin, end, lo per unit, lo, hi
per unit, hi, further). `further` is how many rows further on they lie: keys of a later source.
"""

import triton
import triton.language as tl

FIRST_PART = tl.constexpr(3)
PART = tl.constexpr(5)  # numbers of a part
ENTRY = tl.constexpr(7)  # and of an entry
_FOUND = tl.constexpr(6)  # numbers of a tile that is not in order yet: its line and its work


@triton.jit
def _document(cu_ptr, doc, n_docs, length):
    """Return the rows [begin, end) of documents, inside [0, length); empty past the last one."""
    inside = doc < n_docs
    begin = tl.minimum(tl.maximum(tl.load(cu_ptr + doc, mask=inside, other=0), 0), length)
    end = tl.minimum(tl.load(cu_ptr + doc + 1, mask=inside, other=0), length)
    return begin, tl.maximum(begin, end)


@triton.jit
def _sides(cu_q_ptr, cu_k_ptr, keys, doc, n_docs, q_len, k_len, units):
    """Return documents' rows on the tiles' side and on the other, and a unit of each and of q."""
    q, q_end = _document(cu_q_ptr, doc, n_docs, q_len)
    k, k_end = _document(cu_k_ptr, doc, n_docs, k_len)
    own, own_end = tl.where(keys, k, q), tl.where(keys, k_end, q_end)
    other, other_end = tl.where(keys, q, k), tl.where(keys, q_end, k_end)
    return own, other, (own_end - own) // units, (other_end - other) // units, (q_end - q) // units


@triton.jit
def _entry(entry_ptr, other, other_unit, q_unit):
    """Return (begin, end, lo, hi) of entries in documents."""
    other += tl.load(entry_ptr + 6)
    begin = other + tl.load(entry_ptr) * other_unit
    end = other + tl.load(entry_ptr + 1) * other_unit
    lo = tl.load(entry_ptr + 2) * q_unit + tl.load(entry_ptr + 3)
    hi = tl.load(entry_ptr + 4) * q_unit + tl.load(entry_ptr + 5)
    return begin, end, lo, hi


@triton.jit(do_not_specialize=["n_docs", "q_len", "k_len", "units", "n_slots"])
def _fill_kernel(
    spec_ptr,
    cu_q_ptr,
    cu_k_ptr,
    entries_ptr,
    found_ptr,
    n_docs,
    q_len,
    k_len,
    units,
    n_slots,
    PARTS: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """entries[table, doc, part, e] = (begin, end, lo, hi) in rows of the other side, and
    found[table, slot] = (row, row_end, first_entry, end_entry, finishes, work) of a tile.

    Grid: ceil(n_slots / BLOCK), tables; n_slots >= N. Slots are dealt to the tiles of part 0
    document by document, then part 1, then the rows of no document; what is left gets no rows and
    work -1. Work is the number of rows of the other side that a tile meets.
    Writes entries and found.
    """
    table = tl.program_id(1)
    spec_ptr += table * (FIRST_PART + PARTS * PART + PARTS * ENTRIES * ENTRY)
    keys = tl.load(spec_ptr) != 0
    tile_rows = tl.load(spec_ptr + 1)
    length = tl.where(keys, k_len, q_len)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)

    # This program's share of the documents: their entries.
    own, other, own_unit, other_unit, q_unit = _sides(
        cu_q_ptr, cu_k_ptr, keys, slot, n_docs, q_len, k_len, units
    )
    # All at once: a load waits for the stores before it, which may be to where it reads.
    lines = tl.arange(0, PARTS * ENTRIES)
    entries = spec_ptr + FIRST_PART + PARTS * PART
    met_begin, met_end, met_lo, met_hi = _entry(
        (entries + lines * ENTRY)[None, :], other[:, None], other_unit[:, None], q_unit[:, None]
    )
    line = (table * n_docs + slot)[:, None] * (PARTS * ENTRIES) + lines[None, :]
    line_ptr, exists = entries_ptr + line * 4, (slot < n_docs)[:, None]
    tl.store(line_ptr, met_begin, mask=exists)
    tl.store(line_ptr + 1, met_end, mask=exists)
    tl.store(line_ptr + 2, met_lo, mask=exists)
    tl.store(line_ptr + 3, met_hi, mask=exists)

    # Its share of the slots: the tile of each.
    row = tl.zeros([BLOCK], tl.int32)
    row_end = tl.zeros([BLOCK], tl.int32)
    doc = tl.zeros([BLOCK], tl.int32)
    part = tl.full([BLOCK], -1, tl.int32)
    dealt = 0
    for p in tl.static_range(PARTS):
        part_ptr = spec_ptr + FIRST_PART + p * PART
        part_begin, part_end = tl.load(part_ptr), tl.load(part_ptr + 1)
        further = tl.load(part_ptr + 4)
        for first_doc in range(0, n_docs, BLOCK):
            docs = first_doc + tl.arange(0, BLOCK)
            own, other, own_unit, other_unit, q_unit = _sides(
                cu_q_ptr, cu_k_ptr, keys, docs, n_docs, q_len, k_len, units
            )
            own += further
            begin, end = own + part_begin * own_unit, own + part_end * own_unit
            count = (end - begin + tile_rows - 1) // tile_rows
            before = dealt + tl.cumsum(count, 0) - count
            dealt += tl.sum(count, 0)
            index = slot[:, None] - before[None, :]
            hit = (index >= 0) & (index < count[None, :])
            tile = begin[None, :] + index * tile_rows
            tile_end = tl.minimum(tile + tile_rows, end[None, :])
            row += tl.sum(tl.where(hit, tile, 0), 1)
            row_end += tl.sum(tl.where(hit, tile_end, 0), 1)
            doc += tl.sum(tl.where(hit, docs[None, :], 0), 1)
            part += tl.sum(tl.where(hit, p + 1, 0), 1)
    met = part >= 0
    part = tl.maximum(part, 0)
    # Rows of no document, if this table is to have them.
    past = tl.where(keys, tl.load(cu_k_ptr + n_docs), tl.load(cu_q_ptr + n_docs))
    tile = tl.minimum(tl.maximum(past, 0), length) + (slot - dealt) * tile_rows
    spare = (slot >= dealt) & (tile < length) & (tl.load(spec_ptr + 2) != 0)
    row = tl.where(spare, tile, row)
    row_end = tl.where(spare, tl.minimum(tile + tile_rows, length), row_end)
    work = tl.where(met | spare, 0, -1)
    part_ptr = spec_ptr + FIRST_PART + part * PART
    n_entries = tl.where(met, tl.load(part_ptr + 2), 0)
    finishes = tl.where(met, tl.load(part_ptr + 3), 1)
    own, other, own_unit, other_unit, q_unit = _sides(
        cu_q_ptr, cu_k_ptr, keys, doc, n_docs, q_len, k_len, units
    )
    e = tl.arange(0, ENTRIES)[None, :]
    met_begin, met_end, met_lo, met_hi = _entry(
        entries + (part[:, None] * ENTRIES + e) * ENTRY,
        other[:, None],
        other_unit[:, None],
        q_unit[:, None],
    )
    low = row[:, None] + tl.where(keys, -met_hi, met_lo)
    high = row_end[:, None] + tl.where(keys, -met_lo, met_hi)
    seen = tl.maximum(tl.minimum(met_end, high) - tl.maximum(met_begin, low), 0)
    work += tl.sum(tl.where(e < n_entries[:, None], seen, 0), 1)
    first_entry = (doc * PARTS + part) * ENTRIES
    found_ptr += (table * n_slots + slot) * _FOUND
    inside = slot < n_slots
    tl.store(found_ptr, row, mask=inside)
    tl.store(found_ptr + 1, row_end, mask=inside)
    tl.store(found_ptr + 2, first_entry, mask=inside)
    tl.store(found_ptr + 3, first_entry + n_entries, mask=inside)
    tl.store(found_ptr + 4, finishes, mask=inside)
    tl.store(found_ptr + 5, work, mask=inside)


@triton.jit(do_not_specialize=["n_slots"])
def _order_tiles_kernel(found_ptr, tiles_ptr, n_slots, BLOCK: tl.constexpr):
    """tiles[table] = the tiles found for a table, most work first, equal work in their order.

    Grid: ceil(n_slots / BLOCK), tables. Writes tiles [tables, n_slots, 5].
    """
    table = tl.program_id(1)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < n_slots
    found_ptr += table * n_slots * _FOUND
    work = tl.load(found_ptr + slot * _FOUND + 5, mask=inside, other=-2)
    place = tl.zeros([BLOCK], tl.int32)
    for first_slot in range(0, n_slots, BLOCK):
        others = first_slot + tl.arange(0, BLOCK)
        other_ptrs = found_ptr + others * _FOUND + 5
        other_work = tl.load(other_ptrs, mask=others < n_slots, other=-2)
        earlier = (other_work[None, :] == work[:, None]) & (others[None, :] < slot[:, None])
        earlier = earlier | (other_work[None, :] > work[:, None])
        place += tl.sum(earlier.to(tl.int32), 1)
    tiles_ptr += (table * n_slots + place) * 5
    for i in tl.static_range(5):
        number = tl.load(found_ptr + slot * _FOUND + i, mask=inside, other=0)
        tl.store(tiles_ptr + i, number, mask=inside)
