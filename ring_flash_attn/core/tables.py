"""Blocks as the int tables that a kernel walks: one tile of rows, and the list of what it meets.

Forward and dQ own tiles of query rows and walk key ranges; dKV owns tiles of key rows and walks
query ranges. Tiles are disjoint, so two programs never write one row.
"""

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from .plan import Block, Interval


class Tile(NamedTuple):
    """Rows [begin, end) of one program, which walks entries [first_entry, end_entry).

    `finishes`, 0 or 1: no later step touches these rows.
    """

    begin: int
    end: int
    first_entry: int
    end_entry: int
    finishes: int = 0


class Entry(NamedTuple):
    """Rows [begin, end) of the other side; query i and key j meet iff lo <= j - i <= hi."""

    begin: int
    end: int
    lo: int
    hi: int


class Tables(NamedTuple):
    """Tiles, most work first, and the entries they refer to."""

    tiles: tuple[Tile, ...]
    entries: tuple[Entry, ...]


@lru_cache(maxsize=512)
def query_tables(
    blocks: tuple[Block, ...], tile_rows: int, finished: tuple[Interval, ...] = ()
) -> Tables:
    """Return the tables of forward and dQ: tiles of query rows, entries of key rows.

    `finished`: query rows whose tiles finish them.
    """
    spans = [((b.q_begin, b.q_end), Entry(b.k_begin, b.k_end, b.lo, b.hi)) for b in blocks]
    return _tables(spans, tile_rows, lambda tile, e: (tile[0] + e.lo, tile[1] + e.hi), finished)


@lru_cache(maxsize=512)
def key_tables(blocks: tuple[Block, ...], tile_rows: int) -> Tables:
    """Return the tables of dKV: tiles of key rows, entries of query rows."""
    spans = [((b.k_begin, b.k_end), Entry(b.q_begin, b.q_end, b.lo, b.hi)) for b in blocks]
    return _tables(spans, tile_rows, lambda tile, e: (tile[0] - e.hi, tile[1] - e.lo), ())


def _tables(spans, tile_rows, reach, finished) -> Tables:
    """Cut rows where the set of blocks changes, so every row of a tile walks the same list."""
    edges = sorted({edge for span in [*(s for s, _ in spans), *finished] for edge in span})
    entries: list[Entry] = []
    weighted: list[tuple[int, Tile]] = []
    for begin, end in pairwise(edges):
        met = sorted(entry for span, entry in spans if span[0] <= begin and end <= span[1])
        if not met:
            continue
        finishes = int(any(low <= begin and end <= high for low, high in finished))
        first = len(entries)
        entries += met
        for row in range(begin, end, tile_rows):
            rows = row, min(row + tile_rows, end)
            work = 0
            for entry in met:
                low, high = reach(rows, entry)
                work += max(0, min(entry.end, high) - max(entry.begin, low))
            weighted.append((work, Tile(*rows, first, first + len(met), finishes)))
    # Longest first: the last tiles to finish are short ones.
    weighted.sort(key=lambda item: -item[0])
    return Tables(tuple(tile for _, tile in weighted), tuple(entries))
