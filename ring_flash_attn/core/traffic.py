"""Which key rows travel between the ranks of a ring, step by step. Pure: ints in, tuples out.

A rank needs only the rows that its step reads, and the owner sums only the rows that somebody has
read. Both ends of a message derive its rows from the plans of all ranks.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import NamedTuple

from .attention import Attention
from .layout import Layout
from .packed import DocumentsStep, plan_packed
from .plan import Interval, StepPlan, plan_ring


class Relay(NamedTuple):
    """What of K, V and of sums of dK, dV a rank passes on where they travel hop by hop.

    Rows are one range a step, of that step's source; None if nothing travels.

    Attributes:
        kv: rows of K, V that are here at a step, from 1 on: what this rank and those behind read.
        kv_on: those that go on to the next rank.
        arriving: rows of dk, dv that the readers before this one have added to, from step 2 on.
        leaving: those and this rank's.
        home: rows of this rank's own dk, dv that come home after the last step.
    """

    kv: tuple[Interval | None, ...]
    kv_on: tuple[Interval | None, ...]
    arriving: tuple[Interval | None, ...]
    leaving: tuple[Interval | None, ...]
    home: Interval | None


class Traffic(NamedTuple):
    """What one rank reads of the others' K, V and what they read of its own, by step.

    Rows are one range a step, None if nothing is read. The dk, dv of these rows go back. Entry 0,
    this rank's own keys, is None: they do not travel.

    Attributes:
        pulls: rows of the source (rank - step) % P that this rank reads.
        lends: rows of this rank that rank (rank + step) % P reads at its step.
        relay: what passes through this rank where K, V go from rank to rank.
        units: equal parts that a document has on a rank; 0 where there are no documents.
        returns: of documents on the device, the units [begin, end) of each whose dk, dv that reader
            hands back, by step.
        fetched: the steps at which this rank reads something, in order.
        readers: the ranks that read this rank's K, V, by step. bystanders: the other ranks.
    """

    rank: int
    world_size: int
    pulls: tuple[Interval | None, ...]
    lends: tuple[Interval | None, ...]
    relay: Relay
    fetched: tuple[int, ...]
    readers: tuple[int, ...]
    bystanders: tuple[int, ...]
    units: int = 0
    returns: tuple[Interval | None, ...] = ()

    def source(self, step: int) -> int:
        """Return the rank whose K, V this rank reads at a step."""
        return (self.rank - step) % self.world_size


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


def hull(ranges: Iterable[Interval | None]) -> Interval | None:
    """Return the smallest range that holds all of these."""
    found = [x for x in ranges if x is not None]
    if not found:
        return None
    return min(begin for begin, _ in found), max(end for _, end in found)


@lru_cache(maxsize=512)
def ring_traffic(attention: Attention, q_layout: Layout, k_layout: Layout, rank: int) -> Traffic:
    """Return the traffic of `plan_ring`."""
    size = q_layout.world_size
    plans = [plan_ring(attention, q_layout, k_layout, each) for each in range(size)]
    steps = len(plans[rank].steps)

    def rows(reader: int, step: int) -> Interval | None:
        return rows_read(plans[reader].steps[step])

    return _traffic(rank, size, steps, k_layout.local_len, rows)


@lru_cache(maxsize=512)
def packed_traffic(
    attention: Attention, kind: str, world_size: int, rank: int, k_len: int
) -> Traffic:
    """Return the traffic of `plan_packed`: all rows or none, since the lengths are not known."""
    plans = [plan_packed(attention, kind, world_size, each) for each in range(world_size)]
    steps = len(plans[rank].steps)

    def seen(reader: int, step: int) -> Interval | None:
        return hull((b.k_begin, b.k_end) for b in plans[reader].steps[step].blocks)

    def rows(reader: int, step: int) -> Interval | None:
        return None if seen(reader, step) is None else (0, k_len)

    returns = [seen((rank + step) % world_size, step) for step in range(1, steps)]
    traffic = _traffic(rank, world_size, steps, k_len, rows)
    return traffic._replace(units=plans[rank].units, returns=(None, *returns))


@lru_cache(maxsize=512)
def whole_traffic(rank: int, world_size: int, steps: int, k_len: int) -> Traffic:
    """Return the traffic of ranks that read all of everyone's keys."""
    return _traffic(rank, world_size, steps, k_len, lambda reader, step: (0, k_len))


def _traffic(
    rank: int, size: int, steps: int, k_len: int, read: Callable[[int, int], Interval | None]
) -> Traffic:
    """Return the traffic of a ring of so many steps.

    Args:
        read: given a rank and a step, the rows of the step's source that it reads.
    """

    def of_source(source: int, hops: Iterable[int]) -> Interval | None:
        rows = hull(read((source + hop) % size, hop) for hop in hops)
        # Nearly all rows go as all: one message, where a part is one for each batch of k and of v.
        return (0, k_len) if rows and 8 * (rows[1] - rows[0]) >= 7 * k_len else rows

    source = [(rank - step) % size for step in range(steps)]
    relay = Relay(
        (None, *(of_source(source[x], range(x, steps)) for x in range(1, steps))),
        tuple(of_source(source[x], range(x + 1, steps)) for x in range(steps)),
        tuple(of_source(source[x], range(1, x)) for x in range(steps)),
        tuple(of_source(source[x], range(1, x + 1)) for x in range(steps)),
        of_source(rank, range(1, steps)),
    )
    pulls = None, *(read(rank, step) for step in range(1, steps))
    lends = None, *(read((rank + step) % size, step) for step in range(1, steps))
    fetched = tuple(step for step, rows in enumerate(pulls) if rows is not None)
    readers = tuple((rank + step) % size for step, rows in enumerate(lends) if rows is not None)
    peers = ((rank + step) % size for step in range(1, size))
    bystanders = tuple(peer for peer in peers if peer not in readers)
    return Traffic(rank, size, pulls, lends, relay, fetched, readers, bystanders)
