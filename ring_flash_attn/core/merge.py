"""Several hops of a ring in one launch: their sources' keys as one tensor, each `span` rows on.

A launch costs the host as much as ten signals, and on the GPU a last wave of programs, and one
more reading and writing of the state. With few rows a rank that is most of a step's time.
"""

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


def rounds_of(hops: tuple[int, ...], most: int) -> Rounds:
    """Cut hops, in order, into rounds of at most so many."""
    return tuple(hops[i : i + most] for i in range(0, len(hops), most))


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
