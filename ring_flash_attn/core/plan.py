"""Which rows see which, step by step: runs become bands, bands become blocks.

Between two runs of equal stride s, causal and window masks are a band on row indices: with
d = q.pos - k.pos, key row j is seen by query row i iff ceil((d - left) / s) <= j - i <=
floor((d + right) / s). Everything here is pure: ints in, tuples out.
"""

from functools import lru_cache
from typing import NamedTuple

from .attention import Attention
from .layout import Layout, Run

Interval = tuple[int, int]


class Block(NamedTuple):
    """Query rows [q_begin, q_end) against key rows [k_begin, k_end) under one band.

    Rows are local rows of the two ranks. Query row i sees key row j iff lo <= j - i <= hi. Every
    row and every column of a block takes part, and lo, hi are clamped to the rectangle, so two
    blocks that mean the same are equal.
    """

    q_begin: int
    q_end: int
    k_begin: int
    k_end: int
    lo: int
    hi: int

    @property
    def full(self) -> bool:
        """Whether every query row sees every key row."""
        return self.lo <= self.k_begin - self.q_end + 1 and self.hi >= self.k_end - 1 - self.q_begin

    @property
    def window(self) -> tuple[int, int]:
        """The band as flash-attn's bottom-right aligned (left, right), both >= 0."""
        shift = self.k_end - self.q_end
        return shift - self.lo, self.hi - shift

    def seen_by(self, i: int) -> Interval:
        """Return the key rows [begin, end) that query row i sees; (0, 0) if none."""
        if not self.q_begin <= i < self.q_end:
            return 0, 0
        begin, end = max(self.k_begin, i + self.lo), min(self.k_end, i + self.hi + 1)
        return (begin, end) if begin < end else (0, 0)


class StepPlan(NamedTuple):
    """One step of a ring on one rank: its rows against the K, V of rank `source`.

    Attributes:
        step: hop number; source = (rank - step) % P.
        source: the rank whose K, V this step reads.
        blocks: disjoint blocks that together are the step's mask; empty if it sees nothing.
        q_len, k_len: local rows of this rank and of the source.
        finished: query rows that this step touches and no later one does. Set by plan_ring and
            plan_local, which know all steps.
        span: 0, or the step is several hops in one, see `merge`: rows from a source's first key
            to the next one's. `source` is the first of them.
    """

    step: int
    source: int
    blocks: tuple[Block, ...]
    q_len: int
    k_len: int
    finished: tuple[Interval, ...] = ()
    span: int = 0

    @property
    def first(self) -> bool:
        """Whether the state holds nothing yet: results are stored, not folded in."""
        return self.step == 0

    @property
    def sees(self) -> bool:
        """Whether some query of this rank sees some key of the source."""
        return bool(self.blocks)

    def unseen_q(self) -> tuple[Interval, ...]:
        """Return the query row ranges that no block touches."""
        return _unseen_q(self)

    def q_intervals(self) -> list[Interval]:
        """Return the query row range of each block."""
        return [(b.q_begin, b.q_end) for b in self.blocks]

    def unseen_k(self) -> tuple[Interval, ...]:
        """Return the key row ranges that no block touches."""
        return _unseen_k(self)


class RingPlan(NamedTuple):
    """All steps of one rank. `len(steps)` is equal on every rank, so hops pair up.

    A step that sees nothing on this rank has no blocks; steps that see nothing on any rank are
    not in the list.
    """

    rank: int
    world_size: int
    steps: tuple[StepPlan, ...]

    def unseen_q(self) -> tuple[Interval, ...]:
        """Return the query row ranges that no step touches."""
        return _unseen_by_all(self)


# Asked in every pass, and longer to find than to look up.
@lru_cache(maxsize=4096)
def _unseen_q(step: StepPlan) -> tuple[Interval, ...]:
    return _complement(step.q_intervals(), step.q_len)


@lru_cache(maxsize=4096)
def _unseen_k(step: StepPlan) -> tuple[Interval, ...]:
    return _complement([(b.k_begin, b.k_end) for b in step.blocks], step.k_len)


@lru_cache(maxsize=512)
def _unseen_by_all(plan: RingPlan) -> tuple[Interval, ...]:
    intervals = [interval for step in plan.steps for interval in step.q_intervals()]
    return _complement(intervals, plan.steps[0].q_len)


@lru_cache(maxsize=512)
def plan_ring(attention: Attention, q_layout: Layout, k_layout: Layout, rank: int) -> RingPlan:
    """Plan a whole ring for one rank, ending after the last hop that any rank needs."""
    size = q_layout.world_size
    count = _step_count(attention, q_layout, k_layout)
    steps = [plan_step(attention, q_layout, k_layout, rank, step) for step in range(count)]
    return RingPlan(rank, size, mark_finished(steps))


def mark_finished(steps: list[StepPlan]) -> tuple[StepPlan, ...]:
    """Return the steps with `finished` set, given all of them in order."""
    marked: list[StepPlan] = []
    later: list[Interval] = []
    for step in reversed(steps):
        length, intervals = step.q_len, step.q_intervals()
        untouched_later = _complement(later, length)
        touched_later, untouched = _complement(list(untouched_later), length), step.unseen_q()
        finished = _complement([*touched_later, *untouched], length)
        marked.append(step._replace(finished=finished))
        later += intervals
    return tuple(reversed(marked))


@lru_cache(maxsize=512)
def _step_count(attention: Attention, q_layout: Layout, k_layout: Layout) -> int:
    """Return the steps that at least one rank needs, at least 1. Equal on every rank."""
    size = q_layout.world_size
    for step in reversed(range(1, size)):
        if any(plan_step(attention, q_layout, k_layout, rank, step).blocks for rank in range(size)):
            return step + 1
    return 1


@lru_cache(maxsize=4096)
def plan_step(
    attention: Attention, q_layout: Layout, k_layout: Layout, rank: int, step: int
) -> StepPlan:
    """Plan one step: the blocks between `rank`'s queries and the keys of (rank - step) % P."""
    source = (rank - step) % q_layout.world_size
    blocks = [
        block
        for q_run in q_layout.runs(rank)
        for k_run in k_layout.runs(source)
        if (block := block_between(attention, q_run, k_run)) is not None
    ]
    return StepPlan(step, source, merge(blocks), q_layout.local_len, k_layout.local_len)


def plan_local(attention: Attention, q_len: int, k_len: int) -> StepPlan:
    """Plan one device without a ring; q_len != k_len aligns the last rows, as flash-attn does."""
    block = block_between(attention, Run(0, q_len, k_len - q_len, 1), Run(0, k_len, 0, 1))
    step = StepPlan(0, 0, () if block is None else (block,), q_len, k_len)
    return mark_finished([step])[0]


def block_between(attention: Attention, q: Run, k: Run) -> Block | None:
    """Return the trimmed block of two runs, None if no query of `q` sees a key of `k`."""
    # Without a mask positions do not matter, and the strides may differ (cross attention).
    if attention.masked and q.stride != k.stride:
        raise AssertionError(f"runs of different stride under a mask: {q}, {k}")
    distance, stride = q.pos - k.pos, q.stride
    shift = k.row - q.row
    lo, hi = k.row - (q.row + q.n - 1), k.row + k.n - 1 - q.row
    if attention.left is not None:
        lo = max(lo, -((attention.left - distance) // stride) + shift)
    if attention.right is not None:
        hi = min(hi, (distance + attention.right) // stride + shift)
    return trim(Block(q.row, q.row + q.n, k.row, k.row + k.n, lo, hi))


def trim(block: Block) -> Block | None:
    """Drop the rows and columns that take no part; None if nothing is left."""
    q_begin = max(block.q_begin, block.k_begin - block.hi)
    q_end = min(block.q_end, block.k_end - block.lo)
    k_begin = max(block.k_begin, q_begin + block.lo)
    k_end = min(block.k_end, q_end + block.hi)
    if block.lo > block.hi or q_begin >= q_end or k_begin >= k_end:
        return None
    lo, hi = max(block.lo, k_begin - q_end + 1), min(block.hi, k_end - 1 - q_begin)
    return Block(q_begin, q_end, k_begin, k_end, lo, hi)


def merge(blocks: list[Block]) -> tuple[Block, ...]:
    """Join blocks that one band over their bounding box expresses, until none is left to join."""
    merged = list(blocks)
    progress = True
    while progress:
        progress = False
        for a in range(len(merged)):
            for b in range(a + 1, len(merged)):
                joined = _join(merged[a], merged[b])
                if joined is not None:
                    merged[a] = joined
                    del merged[b]
                    progress = True
                    break
            if progress:
                break
    return tuple(sorted(merged))


def _join(a: Block, b: Block) -> Block | None:
    box = (
        min(a.q_begin, b.q_begin),
        max(a.q_end, b.q_end),
        min(a.k_begin, b.k_begin),
        max(a.k_end, b.k_end),
    )
    open_lo, open_hi = box[2] - box[1] + 1, box[3] - 1 - box[0]
    for lo in {open_lo, a.lo, b.lo}:
        for hi in {open_hi, a.hi, b.hi}:
            candidate = trim(Block(*box, lo, hi))
            if candidate is not None and _same_mask(candidate, a, b):
                return candidate
    return None


def _same_mask(whole: Block, a: Block, b: Block) -> bool:
    """Whether `whole` is exactly the union of the disjoint blocks a and b.

    What a row sees is bounded by lines of slope 0 or 1 that break where a band meets an edge of
    its block, so comparing the rows next to every break compares them all.
    """
    rows: set[int] = set()
    for x in (whole, a, b):
        breaks = (
            x.q_begin,
            x.q_end,
            x.k_begin - x.lo,
            x.k_begin - x.hi,
            x.k_end - x.lo,
            x.k_end - x.hi,
        )
        rows.update(row + near for row in breaks for near in (-2, -1, 0, 1, 2))
    first, last = min(whole.q_begin, a.q_begin, b.q_begin), max(whole.q_end, a.q_end, b.q_end)
    return all(
        whole.seen_by(i) == _union(a.seen_by(i), b.seen_by(i)) for i in rows if first <= i < last
    )


def _union(x: Interval, y: Interval) -> Interval | None:
    """Join two disjoint intervals; None if a gap lies between them."""
    if x == (0, 0):
        return y
    if y == (0, 0):
        return x
    if x[1] == y[0]:
        return x[0], y[1]
    return (y[0], x[1]) if y[1] == x[0] else None


def _complement(covered: list[Interval], length: int) -> tuple[Interval, ...]:
    gaps, reached = [], 0
    for begin, end in sorted(covered):
        if begin > reached:
            gaps.append((reached, begin))
        reached = max(reached, end)
    if reached < length:
        gaps.append((reached, length))
    return tuple(gaps)
