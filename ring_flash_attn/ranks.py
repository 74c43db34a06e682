"""What never changes about a process group, asked once: torch.distributed answers slowly."""

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch.distributed as dist


class Ranks(NamedTuple):
    """A group as this rank sees it.

    Attributes:
        rank: this one's place in the group, -1 if it has none.
        size: number of ranks.
        globally: the global rank of each.
        backends: what carries tensors of which device, as "cpu:gloo,cuda:nccl".
    """

    rank: int
    size: int
    globally: tuple[int, ...]
    backends: str

    @property
    def send_cuda(self) -> bool:
        """Whether the group sends CUDA tensors from GPU to GPU."""
        return "nccl" in self.backends.partition("cuda:")[2]


_known: WeakKeyDictionary[dist.ProcessGroup, Ranks] = WeakKeyDictionary()


def ranks_of(group: dist.ProcessGroup | None) -> Ranks:
    """Return the ranks of a group; None: of the default group, which must be initialised."""
    member = dist.group.WORLD if group is None else group
    assert member is not None, "the default group is not initialised"
    known = _known.get(member)
    if known is None:
        known = _known[member] = Ranks(
            dist.get_rank(group),
            dist.get_world_size(group),
            tuple(dist.get_process_group_ranks(member)),
            dist.get_backend_config(group),
        )
    return known
