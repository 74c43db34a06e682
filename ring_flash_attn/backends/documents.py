"""The tables of a packed call, filled on the device: no length of a document reaches the host."""

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.packed import Documents, DocumentsStep, PackedPlan, PackedStep
from ..kernels.fill import ENTRY, FIRST_PART, PART, _fill_kernel, _order_tiles_kernel
from .launch import ADDRESS, NUMBER, Launch, on

_BLOCK = 64
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
        recipe = _recipe(plan, sides, documents.cu_q.device)
        lengths = documents.q_len, documents.k_len, len(documents)
        counts = [most.tiles(*lengths) for most in recipe.most]
        tiles, entries = _fill(recipe, plan.units, documents, counts)
        # All at once: each view by itself would cost the host several microseconds.
        each = zip(tiles.unbind(), entries.unbind(), counts, strict=True)
        in_order = [Table(*x) for x in each]
        n = len(plan.steps)
        self.tables = {side: in_order[i * n : (i + 1) * n] for i, side in enumerate(sides)}


class _Form(NamedTuple):
    """How many parts a table's specification has, and entries for each."""

    parts: int
    entries: int


class _Most(NamedTuple):
    """What bounds a table's tiles: `share` of the rows of its side, in `parts` of each document."""

    side: Side
    share: float
    parts: int

    def tiles(self, q_len: int, k_len: int, n_docs: int) -> int:
        """Return how many tiles the table has at most, whatever the documents' lengths."""
        length = k_len if self.side.keys else q_len
        return int(length * self.share) // self.side.tile_rows + self.parts * n_docs + 2


class _Recipe(NamedTuple):
    """How to fill the tables of calls with one plan.

    Attributes:
        specification: [tables, .] int32, as the kernels read it.
        most: by table.
    """

    specification: Tensor
    form: _Form
    most: list[_Most]
    launches: tuple[Launch, Launch]


def _fill(
    recipe: _Recipe, units: int, documents: Documents, counts: list[int]
) -> tuple[Tensor, Tensor]:
    """Return tiles [tables, n_slots, 5] and entries [tables, ., 4], filled on the device.

    Args:
        counts: how many tiles each table has at most.
    """
    cu_q, n_docs, form = documents.cu_q, len(documents), recipe.form
    tables, n_slots = len(counts), max(n_docs, *counts)
    sizes = tables * n_docs * form.parts * form.entries * 4, tables * n_slots * 5
    buffer = torch.empty(sum(sizes) + tables * n_slots * 6, dtype=torch.int32, device=cu_q.device)
    entries, tiles, found = buffer.split([*sizes, tables * n_slots * 6])
    given = {
        "spec_ptr": recipe.specification,
        "cu_q_ptr": cu_q,
        "cu_k_ptr": documents.cu_k,
        "entries_ptr": entries,
        "found_ptr": found,
        "tiles_ptr": tiles,
        "n_docs": n_docs,
        "q_len": documents.q_len,
        "k_len": documents.k_len,
        "units": units,
        "n_slots": n_slots,
    }
    with on(cu_q.device):
        for start in recipe.launches:
            start(-(-n_slots // _BLOCK), given, rows=tables)
    return tiles.view(tables, n_slots, 5), entries.view(tables, -1, 4)


@lru_cache(maxsize=512)
def _recipe(plan: PackedPlan, sides: tuple[Side, ...], device: torch.device) -> _Recipe:
    """Return the recipe, uploaded once a plan."""
    form = _form(plan)
    tables = [(step, side) for side in sides for step in plan.steps]

    def most(step: PackedStep, side: Side) -> _Most:
        parts = _parts(step, side.keys)
        # At step 0 the rows of no document have tiles too.
        share = 1 if step.step == 0 else sum(part.end - part.begin for part in parts) / plan.units
        return _Most(side, share, len(parts))

    lines = [_line(*table, form) for table in tables]
    specification = torch.tensor(lines, dtype=torch.int32).to(device)
    return _Recipe(
        specification, form, [most(*table) for table in tables], (_fill_launch(form), _ORDER)
    )


def _form(plan: PackedPlan) -> _Form:
    """Return what the tables of a plan have at most, as powers of two, which the kernel wants."""
    sides = [(step, keys) for step in plan.steps for keys in (False, True)]
    parts = max(len(_parts(*side)) for side in sides)
    entries = max(most_entries(*side) for side in sides)
    return _Form(*(max(2, 1 << (most - 1).bit_length()) for most in (parts, entries)))


@lru_cache(maxsize=64)
def _fill_launch(form: _Form) -> Launch:
    addresses = "spec_ptr", "cu_q_ptr", "cu_k_ptr", "entries_ptr", "found_ptr"
    numbers = "n_docs", "q_len", "k_len", "units", "n_slots"
    arguments = dict.fromkeys(addresses, ADDRESS) | dict.fromkeys(numbers, NUMBER)
    constants = {"PARTS": form.parts, "ENTRIES": form.entries, "BLOCK": _BLOCK}
    return Launch(_fill_kernel, arguments | constants)


@lru_cache(maxsize=4096)
def most_entries(step: PackedStep, keys: bool) -> int:
    """Return how many entries a tile of queries, or of keys, has at most."""
    return max((len(_met(step, part, keys)) for part in _parts(step, keys)), default=0)


class _Part(NamedTuple):
    """Units [begin, end) of the tiles' side, which lie `further` rows further on."""

    begin: int
    end: int
    further: int


def _line(step: PackedStep, side: Side, form: _Form) -> list[int]:
    heads, entries = [], []
    parts = _parts(step, side.keys)
    for part in [*parts, *[_Part(0, 0, 0)] * (form.parts - len(parts))]:
        met, [begin, end, further] = _met(step, part, side.keys), part
        done = not side.keys and any(low <= begin and end <= high for low, high in step.finished)
        heads += [begin, end, len(met), int(done), further]
        for entry in [*met, *[[0] * ENTRY.value] * (form.entries - len(met))]:
            entries += entry
    line = [int(side.keys), side.tile_rows, int(step.step == 0), *heads, *entries]
    wanted = FIRST_PART.value + form.parts * (PART.value + form.entries * ENTRY.value)
    assert len(line) == wanted, f"{form} does not hold {step}"
    return line


def _met(step: PackedStep, part: _Part, keys: bool) -> list[list[int]]:
    """Return the entries of a part: units of the other side, the lines of the band, further rows.

    The band is that of rows as they lie in q and k.
    """
    met = []
    for block in step.blocks:
        own, other = (block.q_begin, block.q_end), (block.k_begin, block.k_end)
        if keys:
            own, other = other, own
        if own[0] > part.begin or part.end > own[1] or part.begin == part.end:
            continue
        if keys and block.further != part.further:
            continue
        lo, hi = ((line.per_unit, line.rows + block.further) for line in (block.lo, block.hi))
        met.append([*other, *lo, *hi, 0 if keys else block.further])
    return met


@lru_cache(maxsize=4096)
def _parts(step: PackedStep, keys: bool) -> list[_Part]:
    """Return the unit ranges of the tiles' side that every block covers whole or not at all."""
    parts = []
    for further in sorted({block.further for block in step.blocks}) if keys else [0]:
        blocks = [x for x in step.blocks if not keys or x.further == further]
        ranges = [(b.k_begin, b.k_end) if keys else (b.q_begin, b.q_end) for b in blocks]
        finished = [] if keys else list(step.finished)
        edges = sorted({edge for each in ranges + finished for edge in each})
        parts += [
            _Part(a, b, further)
            for a, b in pairwise(edges)
            if any(low <= a and b <= high for low, high in ranges)
        ]
    return parts
