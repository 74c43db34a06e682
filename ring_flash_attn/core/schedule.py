"""What every pass over one plan and one memory does alike: which rows come together, and where.

Found once, since finding it costs the host as much as doing it: rounds of sources that share a
launch, views of the memory, the parts of a share that nobody stores into.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.base import GradTarget
from .merge import first_round, merge_packed, merge_plan, rounds_of, slots_of
from .packed import DocumentsPlan, PackedPlan, on_device
from .peer_buffers import PeerBuffers
from .plan import Interval, RingPlan
from .traffic import Traffic, rows_to_zero

_KEPT = 256  # schedules of one memory


class Round(NamedTuple):
    """The sources of one launch.

    Attributes:
        hops: their steps. owners: their ranks.
        copies: (target, source) of what is fetched from them.
        keys: k and v of all of them, as the launch reads them.
    """

    hops: tuple[int, ...]
    owners: tuple[int, ...]
    copies: tuple[tuple[Tensor, Tensor], ...]
    keys: tuple[Tensor, Tensor]


class Share(NamedTuple):
    """Where the dk, dv of a launch go.

    Attributes:
        target: as the launch gets it. zeros: the parts of it that the launch does not store into.
        owners: tensors [2, B, L, Hk, D] in the memory of each owner, by source.
    """

    target: GradTarget
    zeros: tuple[Tensor, ...]
    owners: tuple[Tensor, ...]


def schedule_of(
    buffers: PeerBuffers,
    traffic: Traffic,
    plan: RingPlan | DocumentsPlan,
    backward: bool,
    merges: bool,
) -> "Schedule":
    """Return the schedule of a pass, kept with the buffers. Arguments as of `Schedule`."""
    key = id(traffic), id(lasting(plan)), backward, merges
    found = buffers.schedules.get(key)
    if found is None:
        if len(buffers.schedules) >= _KEPT:
            buffers.schedules.clear()
        found = buffers.schedules[key] = Schedule(buffers, traffic, plan, backward, merges)
    return found


def lasting(plan: RingPlan | DocumentsPlan) -> RingPlan | PackedPlan:
    """Return what a plan has in common with those of other calls: of documents, all but they."""
    return plan.steps[0].plan if isinstance(plan, DocumentsPlan) else plan


class Schedule:
    """The rounds of a plan whose sources' k, v come from and into `buffers`, which keep it.

    Args:
        traffic: which rows travel. plan: this rank's steps.
        backward: whether the pass returns dk, dv. merges: whether launches may be over several
            sources.

    Attributes:
        rounds: in the order of their launches. at: the round of a step, if one begins there.
        own_zeros: rows of this rank's own dk, dv that step 0 does not store into.
    """

    def __init__(
        self,
        buffers: PeerBuffers,
        traffic: Traffic,
        plan: RingPlan | DocumentsPlan,
        backward: bool,
        merges: bool,
    ) -> None:
        documents = isinstance(plan, DocumentsPlan)
        most = buffers.sources if merges else 1
        cuts = rounds_of(traffic.fetched, most, first_round(buffers.shape, documents, backward))
        slots = slots_of(cuts, most, len(buffers.slots))
        # Both are known by their identity, so they have to live as long as this.
        self._alive = traffic, lasting(plan)
        self._merged: RingPlan | PackedPlan | None = None
        if any(len(hops) > 1 for hops in cuts):
            self._merged = (
                merge_packed(plan.steps[0].plan, cuts, buffers.span)
                if isinstance(plan, DocumentsPlan)
                else merge_plan(plan, cuts, buffers.span)
            )
        # Not of documents, which are one call's: of theirs nobody has to zero anything.
        self._hops = () if isinstance(plan, DocumentsPlan) else plan.steps
        self._traffic = traffic
        self.rounds = tuple(self._round(buffers, hops, slots) for hops in cuts)
        self.at = {each.hops[0]: index for index, each in enumerate(self.rounds)}
        self.own_zeros = rows_to_zero(plan.steps[0], (0, buffers.shape[1]))
        self._shares: dict[int, Share] = {}

    def steps_of(self, plan: RingPlan | DocumentsPlan) -> RingPlan | DocumentsPlan:
        """Return a call's plan, with a step for each round where one has several hops."""
        if self._merged is None:
            return plan
        if isinstance(self._merged, PackedPlan):
            assert isinstance(plan, DocumentsPlan), "its schedule is of documents"
            return on_device(self._merged, plan.steps[0].documents)
        return self._merged

    def share(self, buffers: PeerBuffers, index: int) -> Share:
        """Return where the dk, dv of a round go. The memory for them must be there."""
        found = self._shares.get(index)
        if found is None:
            found = self._shares[index] = self._share(buffers, self.rounds[index])
        return found

    def _round(self, buffers: PeerBuffers, hops: tuple[int, ...], slots: dict[int, int]) -> Round:
        owners = tuple(self._traffic.source(hop) for hop in hops)
        pieces = [
            piece
            for hop, owner in zip(hops, owners, strict=True)
            for piece in buffers.pieces(slots[hop], owner, self._rows(hop))
        ]
        # Rows behind the last that was fetched hold nothing: the tensors end there.
        keys = buffers.fetched(slots[hops[0]], self._rows(hops[-1])[1], len(hops))
        return Round(hops, owners, tuple(pieces), keys)

    def _share(self, buffers: PeerBuffers, of: Round) -> Share:
        places = tuple(zip(of.owners, of.hops, strict=True))
        pairs = [buffers.share(owner, hop, self._rows(hop)[1]) for owner, hop in places]
        zeros = [
            x[:, begin:end]
            for hop, pair in zip(of.hops, pairs, strict=True)
            if self._hops
            for begin, end in rows_to_zero(self._hops[hop], self._rows(hop))
            for x in pair
        ]
        offsets = None
        if len(pairs) > 1 and buffers.store.state == torch.float32:
            offsets = buffers.offsets(places)
        target = GradTarget(*pairs[0], add=False, others=tuple(pairs[1:]), offsets=offsets)
        owners = tuple(buffers.landing[owner][hop - 1] for owner, hop in places)
        return Share(target, tuple(zeros), owners)

    def _rows(self, hop: int) -> Interval:
        rows = self._traffic.pulls[hop]
        assert rows is not None, "a round is of hops that fetch something"
        return rows
