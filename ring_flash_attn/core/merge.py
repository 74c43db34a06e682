"""Several hops of a ring in one launch: their sources' keys as one tensor, each `span` rows on.

A launch costs the host's time, and on the GPU a last wave of programs, and one more reading and
writing of the state. With few rows a rank that is most of a step's time.
"""

from functools import lru_cache
from itertools import pairwise

from .packed import DocumentBlock, PackedPlan, PackedStep, mark_finished_units
from .plan import Block, RingPlan, mark_finished

Rounds = tuple[tuple[int, ...], ...]

SOURCES = 3  # of a launch, at most
# Longer steps hide what a launch costs, and what they fetch is better computed on as it comes.
MERGED_ROWS = 8192


def sources_a_launch(shape: tuple[int, ...]) -> int:
    """Return how many sources may share a launch.

    Args:
        shape: of k, [B, L, Hk, D]. Of several batches no two sources' rows make one tensor.
    """
    batch, length = shape[:2]
    return SOURCES if batch == 1 and length <= MERGED_ROWS else 1


def rounds_of(hops: tuple[int, ...], most: int, first: int | None = None) -> Rounds:
    """Cut hops, in order, into rounds of at most so many.

    Args:
        first: how many the first one has at most; None: as the others.
    """
    head = most if first is None else min(first, most)
    cuts = [0, *range(head, len(hops), most), len(hops)]
    return tuple(hops[a:b] for a, b in pairwise(cuts) if a < b)


def slots_of(rounds: Rounds, most: int, slots: int) -> dict[int, int]:
    """Return the slot of each hop's source, of so many: neighbours in a round.

    Two rounds are here at a time: they share no slot unless all hops have one of their own.
    """
    hops = [hop for each in rounds for hop in each]
    if len(hops) <= slots:
        return {hop: index for index, hop in enumerate(hops)}
    assert slots >= 2 * most, f"{slots} slots for rounds of {most}"
    return {
        hop: (number % 2) * most + index
        for number, each in enumerate(rounds)
        for index, hop in enumerate(each)
    }


def first_round(shape: tuple[int, ...], documents: bool, backward: bool) -> int | None:
    """Return how many sources the first launch after step 0 is over at most; None: any number.

    A forward over short documents may be through with this rank's own keys before three sources'
    have come. With fewer rows another launch takes longer than that.
    """
    return 1 if documents and not backward and shape[1] > MERGED_ROWS // 2 else None


# Kept, so that the passes of a call walk the same steps: tables of documents are known by these.
@lru_cache(maxsize=512)
def merge_plan(plan: RingPlan, rounds: Rounds, span: int) -> RingPlan:
    """Return step 0 and a step for every round, numbered as its first hop.

    Args:
        rounds: of hops from 1 on; the others see nothing.
        span: rows from a source's first key to the next one's.
    """
    steps = [plan.steps[0]]
    for hops in rounds:
        first = plan.steps[hops[0]]
        blocks = [
            _shifted(block, index * span)
            for index, hop in enumerate(hops)
            for block in plan.steps[hop].blocks
        ]
        k_len = (len(hops) - 1) * span + first.k_len
        steps.append(first._replace(blocks=tuple(sorted(blocks)), k_len=k_len, span=span))
    return plan._replace(steps=mark_finished(steps))


@lru_cache(maxsize=512)
def merge_packed(plan: PackedPlan, rounds: Rounds, span: int) -> PackedPlan:
    """As `merge_plan`, for documents of any lengths."""
    steps = [plan.steps[0]]
    for hops in rounds:
        blocks: list[DocumentBlock] = []
        for index, hop in enumerate(hops):
            blocks += [x._replace(further=index * span) for x in plan.steps[hop].blocks]
        first = plan.steps[hops[0]]
        steps.append(PackedStep(first.step, first.source, tuple(blocks), span=span))
    return plan._replace(steps=mark_finished_units(steps, plan.units))


def _shifted(block: Block, rows: int) -> Block:
    """Return the block with its keys so many rows further on."""
    begin, end = block.k_begin + rows, block.k_end + rows
    return block._replace(k_begin=begin, k_end=end, lo=block.lo + rows, hi=block.hi + rows)
