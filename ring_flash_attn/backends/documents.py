"""The tables of a packed call, filled on the device: no length of a document reaches the host."""

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.packed import Documents, DocumentsStep, PackedPlan, PackedStep
from ..core.plan import Interval
from ..kernels.fill import ENTRIES, PARTS, SPEC, _fill_kernel, _order_tiles_kernel
from .launch import ADDRESS, NUMBER, Launch, on

_BLOCK = 64
_FILL = Launch(
    _fill_kernel,
    {
        "spec_ptr": ADDRESS,
        "cu_q_ptr": ADDRESS,
        "cu_k_ptr": ADDRESS,
        "entries_ptr": ADDRESS,
        "found_ptr": ADDRESS,
        "n_docs": NUMBER,
        "q_len": NUMBER,
        "k_len": NUMBER,
        "units": NUMBER,
        "n_slots": NUMBER,
        "BLOCK": _BLOCK,
    },
)
_ORDER = Launch(
    _order_tiles_kernel,
    {"found_ptr": ADDRESS, "tiles_ptr": ADDRESS, "n_slots": NUMBER, "BLOCK": _BLOCK},
)


class Side(NamedTuple):
    """One way to cut a step into tiles: rows of queries, or of keys, so many a tile."""

    keys: bool
    tile_rows: int


class Table(NamedTuple):
    """Tiles [at least n, 5] and entries [m, 4] of a step, int32 on the device; n."""

    tiles: Tensor
    entries: Tensor
    n_tiles: int


def document_tables(step: DocumentsStep, side: Side, sides: tuple[Side, ...]) -> Table:
    """Return the table of a step.

    The first step that asks fills those of every step of the call and of all its sides, forward and
    backward, in two launches. Tiles are padded to what a step has at most, with tiles of no rows.

    Args:
        side: the one wanted. sides: all that the call will want.
    """
    documents, plan = step.documents, step.plan
    # By identity: this is asked several times a step, and plans are long to hash.
    filled = documents.tables.get((id(plan), sides))
    if filled is None:
        filled = documents.tables[id(plan), sides] = _Filled(plan, documents, sides)
    return filled.tables[side][step.index]


class _Filled:
    """The tables of a call for some sides, filled on the device when this is made.

    Args:
        plan: kept, so that no other gets its identity.

    Attributes:
        tables: those of each side, by step.
    """

    def __init__(self, plan: PackedPlan, documents: Documents, sides: tuple[Side, ...]) -> None:
        self._plan = plan
        tiles, entries = _fill(plan, documents, sides)
        counts = _tile_counts(plan, sides, documents.q_len, documents.k_len, len(documents))
        # All at once: each view by itself would cost the host several microseconds.
        each = zip(tiles.unbind(), entries.unbind(), counts, strict=True)
        in_order = [Table(*x) for x in each]
        n = len(plan.steps)
        self.tables = {side: in_order[i * n : (i + 1) * n] for i, side in enumerate(sides)}


def _fill(plan: PackedPlan, documents: Documents, sides: tuple[Side, ...]) -> tuple[Tensor, Tensor]:
    cu_q, cu_k, n_docs = documents.cu_q, documents.cu_k, len(documents)
    tables = len(sides) * len(plan.steps)
    longest = max(documents.q_len, documents.k_len)
    n_slots = longest // min(side.tile_rows for side in sides) + PARTS.value * n_docs + 2
    sizes = tables * n_docs * PARTS.value * ENTRIES.value * 4, tables * n_slots * 5
    buffer = torch.empty(sum(sizes) + tables * n_slots * 6, dtype=torch.int32, device=cu_q.device)
    entries, tiles, found = buffer.split([*sizes, tables * n_slots * 6])
    given = {
        "spec_ptr": _specification(plan, sides, cu_q.device),
        "cu_q_ptr": cu_q,
        "cu_k_ptr": cu_k,
        "entries_ptr": entries,
        "found_ptr": found,
        "tiles_ptr": tiles,
        "n_docs": n_docs,
        "q_len": documents.q_len,
        "k_len": documents.k_len,
        "units": plan.units,
        "n_slots": n_slots,
    }
    with on(cu_q.device):
        for start in (_FILL, _ORDER):
            start(-(-n_slots // _BLOCK), given, rows=tables)
    return tiles.view(tables, n_slots, 5), entries.view(tables, -1, 4)


@lru_cache(maxsize=512)
def _tile_counts(
    plan: PackedPlan, sides: tuple[Side, ...], q_len: int, k_len: int, n_docs: int
) -> list[int]:
    """Return how many tiles each table has at most, whatever the lengths."""

    def most(side: Side, step: PackedStep) -> int:
        parts, length = _parts(step, side.keys), k_len if side.keys else q_len
        # At step 0 the rows of no document have tiles too.
        share = 1 if step.step == 0 else sum(end - begin for begin, end in parts) / plan.units
        return int(length * share) // side.tile_rows + len(parts) * n_docs + 2

    return [most(side, step) for side in sides for step in plan.steps]


@lru_cache(maxsize=4096)
def most_entries(step: PackedStep, keys: bool) -> int:
    """Return how many entries a tile of queries, or of keys, has at most."""
    return max((len(_met(step, part, keys)) for part in _parts(step, keys)), default=0)


@lru_cache(maxsize=512)
def _specification(plan: PackedPlan, sides: tuple[Side, ...], device: torch.device) -> Tensor:
    """Return the tables as the kernels read them, [tables, SPEC] int32, uploaded once a plan."""
    lines = [_line(step, side) for side in sides for step in plan.steps]
    return torch.tensor(lines, dtype=torch.int32).to(device)


def _line(step: PackedStep, side: Side) -> list[int]:
    heads, entries = [], []
    parts = _parts(step, side.keys)
    for begin, end in [*parts, *[(0, 0)] * (PARTS.value - len(parts))]:
        met = _met(step, (begin, end), side.keys)
        assert len(met) <= ENTRIES.value, f"{len(met)} blocks on one part: {step}"
        done = not side.keys and any(low <= begin and end <= high for low, high in step.finished)
        heads += [begin, end, len(met), int(done)]
        for entry in [*met, *[[0] * 6] * (ENTRIES.value - len(met))]:
            entries += entry
    line = [int(side.keys), side.tile_rows, int(step.step == 0), *heads, *entries]
    assert len(line) == SPEC.value
    return line


def _met(step: PackedStep, part: Interval, keys: bool) -> list[list[int]]:
    """Return the entries of a part: units of the other side, and the lines of the band."""
    begin, end = part
    met = []
    for block in step.blocks:
        own, other = (block.q_begin, block.q_end), (block.k_begin, block.k_end)
        if keys:
            own, other = other, own
        if own[0] <= begin and end <= own[1] and begin < end:
            met.append([*other, *block.lo, *block.hi])
    return met


@lru_cache(maxsize=4096)
def _parts(step: PackedStep, keys: bool) -> list[tuple[int, int]]:
    """Return the unit ranges of the tiles' side that every block covers whole or not at all."""
    ranges = [(b.k_begin, b.k_end) if keys else (b.q_begin, b.q_end) for b in step.blocks]
    finished = [] if keys else list(step.finished)
    edges = sorted({edge for each in ranges + finished for edge in each})
    parts = [
        (a, b) for a, b in pairwise(edges) if any(low <= a and b <= high for low, high in ranges)
    ]
    assert len(parts) <= PARTS.value, f"{len(parts)} parts in one step: {step}"
    return parts
