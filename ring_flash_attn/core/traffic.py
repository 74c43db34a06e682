"""Which key rows travel between the ranks of a ring, step by step. Pure: ints in, tuples out.

A rank that fetches K, V from their owner needs only the rows that its step reads, and the owner
sums only the rows that somebody has read. Both sides derive them from the plans of both ranks.
"""

from functools import lru_cache
from typing import NamedTuple

from .attention import Attention
from .layout import Layout
from .packed import DocumentsStep, plan_packed
from .plan import Interval, StepPlan, plan_ring


class Traffic(NamedTuple):
    """What one rank reads of the others' K, V and what they read of its own, by step.

    Rows are one range a step, None if nothing is read. The dk, dv of these rows go back. Entry 0,
    this rank's own keys, is None: they do not travel.

    Attributes:
        pulls: rows of the source (rank - step) % P that this rank reads.
        lends: rows of this rank that rank (rank + step) % P reads at its step.
        units: equal parts that a document has on a rank; 0 where there are no documents.
        returns: of documents on the device, the units [begin, end) of each whose dk, dv that reader
            hands back, by step.
    """

    rank: int
    world_size: int
    pulls: tuple[Interval | None, ...]
    lends: tuple[Interval | None, ...]
    units: int = 0
    returns: tuple[Interval | None, ...] = ()

    @property
    def fetched(self) -> tuple[int, ...]:
        """The steps at which this rank reads something, in order."""
        return tuple(step for step, rows in enumerate(self.pulls) if rows is not None)

    @property
    def readers(self) -> tuple[int, ...]:
        """The ranks that read this rank's K, V, by step."""
        return tuple(self.reader(step) for step, rows in enumerate(self.lends) if rows is not None)

    @property
    def bystanders(self) -> tuple[int, ...]:
        """The other ranks that do not."""
        readers = self.readers
        ranks = (self.reader(step) for step in range(1, self.world_size))
        return tuple(rank for rank in ranks if rank not in readers)

    def source(self, step: int) -> int:
        """Return the rank whose K, V this rank reads at a step."""
        return (self.rank - step) % self.world_size

    def reader(self, step: int) -> int:
        """Return the rank that reads this rank's K, V at its step."""
        return (self.rank + step) % self.world_size


def rows_read(step: StepPlan) -> Interval | None:
    """Return the range of key rows from the first to the last that a step reads.

    One range, although blocks may leave a gap: kernels load whole tiles and mask what they do not
    want, so rows behind a block that are not the end of the tensor must hold numbers.
    """
    if not step.blocks:
        return None
    return min(b.k_begin for b in step.blocks), max(b.k_end for b in step.blocks)


def rows_to_zero(step: StepPlan | DocumentsStep, rows: Interval) -> tuple[Interval, ...]:
    """Return the rows within `rows` that a step's dk, dv are not stored into.

    With documents on the device none: step 0 stores into every row, and of the others' shares the
    owner reads only what they have stored.
    """
    if isinstance(step, DocumentsStep):
        return ()
    cut = [(max(begin, rows[0]), min(end, rows[1])) for begin, end in step.unseen_k()]
    return tuple((begin, end) for begin, end in cut if begin < end)


@lru_cache(maxsize=512)
def ring_traffic(attention: Attention, q_layout: Layout, k_layout: Layout, rank: int) -> Traffic:
    """Return the traffic of `plan_ring`."""
    size = q_layout.world_size
    plans = [plan_ring(attention, q_layout, k_layout, each) for each in range(size)]
    steps = range(1, len(plans[rank].steps))
    pulls = [rows_read(plans[rank].steps[step]) for step in steps]
    lends = [rows_read(plans[(rank + step) % size].steps[step]) for step in steps]
    return Traffic(rank, size, (None, *pulls), (None, *lends))


@lru_cache(maxsize=512)
def packed_traffic(
    attention: Attention, kind: str, world_size: int, rank: int, k_len: int
) -> Traffic:
    """Return the traffic of `plan_packed`: all rows or none, since the lengths are not known."""
    plans = [plan_packed(attention, kind, world_size, each) for each in range(world_size)]
    steps = range(1, len(plans[rank].steps))

    def rows(reader: int, step: int) -> Interval | None:
        return (0, k_len) if plans[reader].steps[step].blocks else None

    def seen(step: int) -> Interval | None:
        blocks = plans[(rank + step) % world_size].steps[step].blocks
        if not blocks:
            return None
        return min(b.k_begin for b in blocks), max(b.k_end for b in blocks)

    pulls = [rows(rank, step) for step in steps]
    lends = [rows((rank + step) % world_size, step) for step in steps]
    returns = [seen(step) for step in steps]
    units = plans[rank].units
    return Traffic(rank, world_size, (None, *pulls), (None, *lends), units, (None, *returns))
