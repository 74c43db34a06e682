"""Plans of packed sequences: which rows see which inside every document.

The lengths of the documents lie on the device, in cu_seqlens, and reading them there would stall
the host. But all documents are placed alike, so a step has the same blocks in each of them, with
edges and bands that are linear in the document's length. That much is known without it.
"""

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from .attention import Attention
from .layout import Layout
from .plan import Block, Interval, RingPlan, StepPlan, mark_finished, trim

FAR = 1 << 29  # an open side of a band: no row lies further away


class Line(NamedTuple):
    """per_unit * unit + rows, where a document has `units` units of rows on each rank."""

    per_unit: int
    rows: int

    def at(self, unit: int) -> int:
        return self.per_unit * unit + self.rows


class DocumentBlock(NamedTuple):
    """Query units [q_begin, q_end) of a document against its key units [k_begin, k_end).

    Query row i sees key row j of the block iff lo <= j - i <= hi. Rows count from the first row of
    all documents, which is the same on every rank.

    Attributes:
        further: rows that the source's keys lie further on in k, where it holds several sources'.
    """

    q_begin: int
    q_end: int
    k_begin: int
    k_end: int
    lo: Line = Line(0, -FAR)
    hi: Line = Line(0, FAR)
    further: int = 0

    def at(self, units: int, q: Interval, k: Interval) -> Block | None:
        """Return the block of a document with query rows q and key rows k, None if it is empty."""
        q_unit, k_unit = (q[1] - q[0]) // units, (k[1] - k[0]) // units
        return trim(
            Block(
                q[0] + self.q_begin * q_unit,
                q[0] + self.q_end * q_unit,
                k[0] + self.k_begin * k_unit,
                k[0] + self.k_end * k_unit,
                self.lo.at(q_unit),
                self.hi.at(q_unit),
            )
        )

    @property
    def empty(self) -> bool:
        """Whether no query sees a key in a document of any length."""
        # The differences j - i of the block's corners, as lines.
        least = Line(self.k_begin - self.q_end, 1)
        most = Line(self.k_end - self.q_begin, -1)
        return _above(least, self.hi) or _above(self.lo, most) or _above(self.lo, self.hi)


class PackedStep(NamedTuple):
    """One step of a ring on one rank, for documents of any lengths.

    Attributes:
        step, source: as in StepPlan.
        blocks: disjoint blocks that together are the step's mask in each document.
        finished: query units that this step touches and no later one does.
        span: as in StepPlan.
    """

    step: int
    source: int
    blocks: tuple[DocumentBlock, ...]
    finished: tuple[Interval, ...] = ()
    span: int = 0


class PackedPlan(NamedTuple):
    """All steps of one rank. `len(steps)` is equal on every rank.

    Attributes:
        units: equal parts that a document has on a rank: 2 in zigzag, else 1.
        distance: what a row is numbered in k, minus its number in q; 0 but for gathered keys.
    """

    rank: int
    world_size: int
    units: int
    steps: tuple[PackedStep, ...]
    distance: int = 0


class Documents:
    """The documents of one call, on the device: cu_seqlens of queries and of keys.

    Attributes:
        cu_q, cu_k: [N + 1] int32. Rows from the last of cu_q on belong to no document.
        q_len, k_len: local rows of q, and of k, v.
        max_q, max_k: rows of the longest document as the caller says, if it does; else all rows.
        tables: what a backend has filled on the device from them, by what it needs to know.
    """

    def __init__(self, cu_q: Tensor, cu_k: Tensor, q_len: int, k_len: int, *longest: int) -> None:
        self.cu_q, self.cu_k, self.q_len, self.k_len = cu_q, cu_k, q_len, k_len
        self.max_q, self.max_k = longest or (q_len, k_len)
        self.tables: dict = {}
        self._edges: tuple[list[int], list[int]] | None = None

    @property
    def edges(self) -> tuple[list[int], list[int]]:
        """The numbers in cu_q and in cu_k, read once: a host sync on a GPU."""
        if self._edges is None:
            q = self.cu_q.tolist()
            self._edges = q, q if self.cu_k is self.cu_q else self.cu_k.tolist()
        return self._edges

    def __len__(self) -> int:
        return self.cu_q.shape[0] - 1


class DocumentsStep(NamedTuple):
    """A step over documents on the device. Every row is touched: by its own document at step 0,
    or, if it belongs to none, by a tile that meets nothing."""

    plan: PackedPlan
    index: int
    documents: Documents

    @property
    def step(self) -> int:
        return self.plan.steps[self.index].step

    @property
    def source(self) -> int:
        return self.plan.steps[self.index].source

    @property
    def first(self) -> bool:
        return self.step == 0

    @property
    def last(self) -> bool:
        return not any(step.blocks for step in self.plan.steps[self.index + 1 :])

    @property
    def sees(self) -> bool:
        return bool(self.plan.steps[self.index].blocks)

    @property
    def span(self) -> int:
        return self.plan.steps[self.index].span

    @property
    def meets_all_keys(self) -> bool:
        """Whether every unit of a document's keys is in some block."""
        met = {
            unit
            for block in self.plan.steps[self.index].blocks
            for unit in range(block.k_begin, block.k_end)
        }
        return len(met) == self.plan.units

    def unseen_q(self) -> tuple[Interval, ...]:
        return ()

    def unseen_k(self) -> tuple[Interval, ...]:
        return ()


class DocumentsPlan(NamedTuple):
    """A packed plan with the documents of one call; what a ring walks, as RingPlan."""

    rank: int
    world_size: int
    steps: tuple[DocumentsStep, ...]

    @property
    def may_miss_rows(self) -> bool:
        """Whether a length that nobody has checked, an odd one in zigzag, leaves a row out."""
        return self.steps[0].plan.units > 1

    def unseen_q(self) -> tuple[Interval, ...]:
        return ()


def on_device(plan: PackedPlan, documents: Documents) -> DocumentsPlan:
    """Return the plan of a call for a backend that fills its tables on the device."""
    steps = tuple(DocumentsStep(plan, index, documents) for index in range(len(plan.steps)))
    return DocumentsPlan(plan.rank, plan.world_size, steps)


def on_host(plan: PackedPlan, documents: Documents) -> RingPlan:
    """Return the plan of a call as blocks of rows. Reads the documents' edges."""
    q_rows, k_rows = (list(pairwise(edges)) for edges in documents.edges)
    steps = []
    for step in plan.steps:
        blocks = [
            block
            for q, k in zip(q_rows, k_rows, strict=True)
            for each in step.blocks
            if (block := each.at(plan.units, q, k)) is not None
        ]
        q_len, k_len = documents.q_len, documents.k_len
        steps.append(StepPlan(step.step, step.source, tuple(sorted(blocks)), q_len, k_len))
    return RingPlan(plan.rank, plan.world_size, mark_finished(steps))


@lru_cache(maxsize=512)
def plan_packed(attention: Attention, kind: str, world_size: int, rank: int) -> PackedPlan:
    """Plan a ring over packed documents, each placed by `Layout(kind, length, world_size)`."""
    count = max(
        step + 1
        for step in range(world_size)
        for each in range(world_size)
        if step == 0 or _blocks(attention, kind, world_size, each, (each - step) % world_size)
    )
    steps = []
    for step in range(count):
        source = (rank - step) % world_size
        steps.append(PackedStep(step, source, _blocks(attention, kind, world_size, rank, source)))
    units = 2 if kind == "zigzag" else 1
    return PackedPlan(rank, world_size, units, mark_finished_units(steps, units))


@lru_cache(maxsize=512)
def plan_gathered(attention: Attention, distance: int) -> PackedPlan:
    """Plan one step over documents whose keys have been gathered.

    Args:
        distance: global row of query row 0, minus that of key row 0.
    """
    lo = Line(0, -FAR if attention.left is None else distance - attention.left)
    hi = Line(0, FAR if attention.right is None else distance + attention.right)
    step = PackedStep(0, 0, (DocumentBlock(0, 1, 0, 1, lo, hi),), ((0, 1),))
    return PackedPlan(0, 1, 1, (step,), distance)


def _blocks(
    attention: Attention, kind: str, world_size: int, rank: int, source: int
) -> tuple[DocumentBlock, ...]:
    """Return the blocks between the queries of `rank` and the keys of `source`."""
    open_left = attention.left is None
    if kind == "zigzag" and open_left and attention.right is None:
        return (DocumentBlock(0, 2, 0, 2),)
    if kind == "zigzag" and open_left and attention.right == 0:
        # Row order is the order of positions in it, so one band joins the four pairs of halves.
        if source == rank:
            return (DocumentBlock(0, 2, 0, 2, hi=Line(0, 0)),)
        return (DocumentBlock(0, 2, 0, 1) if source < rank else DocumentBlock(1, 2, 0, 2),)
    pairs = [
        _between(attention, q_unit, q_run, k_unit, k_run)
        for q_unit, q_run in enumerate(_unit_runs(kind, world_size, rank))
        for k_unit, k_run in enumerate(_unit_runs(kind, world_size, source))
    ]
    return tuple(block for block in pairs if not block.empty)


def _unit_runs(kind: str, world_size: int, rank: int) -> list[tuple[Line, int]]:
    """Return, for each unit of a document, the position of its first row and the stride."""
    if kind == "stripe":
        return [(Line(0, rank), world_size)]
    # Rows of a layout with one row a unit are units, and so are its positions.
    units = 2 if kind == "zigzag" else 1
    runs = Layout(kind, units, world_size).runs(rank)
    return [(Line(run.pos, 0), 1) for run in runs]


def _between(
    attention: Attention, q_unit: int, q_run: tuple[Line, int], k_unit: int, k_run: tuple[Line, int]
) -> DocumentBlock:
    """Return the block of two units, as plan.block_between for two runs."""
    (q_pos, stride), (k_pos, _) = q_run, k_run
    per_unit, rows = q_pos.per_unit - k_pos.per_unit, q_pos.rows - k_pos.rows
    assert stride == 1 or per_unit == 0, "positions of a stripe do not depend on the length"
    per_unit += k_unit - q_unit
    block = DocumentBlock(q_unit, q_unit + 1, k_unit, k_unit + 1)
    if attention.left is not None:
        block = block._replace(lo=Line(per_unit, -((attention.left - rows) // stride)))
    if attention.right is not None:
        block = block._replace(hi=Line(per_unit, (rows + attention.right) // stride))
    return block


def _above(a: Line, b: Line) -> bool:
    """Whether a > b for every unit of at least one row."""
    if abs(a.rows) == FAR or abs(b.rows) == FAR:
        return False
    return a.per_unit >= b.per_unit and a.at(1) > b.at(1)


def mark_finished_units(steps: list[PackedStep], units: int) -> tuple[PackedStep, ...]:
    """Return the steps with `finished` set, by the rule for steps of known rows."""
    as_rows = [
        StepPlan(
            step.step,
            step.source,
            tuple(
                Block(x.q_begin, x.q_end, x.k_begin, x.k_end, -units, units) for x in step.blocks
            ),
            units,
            units,
        )
        for step in steps
    ]
    marked = mark_finished(as_rows)
    return tuple(
        step._replace(finished=rows.finished) for step, rows in zip(steps, marked, strict=True)
    )
