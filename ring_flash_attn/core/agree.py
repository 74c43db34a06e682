"""Ranks compare what they are about to do, so that a mismatch raises everywhere instead of hanging.

A ring whose ranks disagree on a shape, a dtype or a mask hangs or computes garbage, and a rank
that raises alone leaves the others waiting. So the first calls of each group end their checks
with one exchange: of what each rank was asked to do, or of the error that it is about to raise.
Later calls cost one dictionary lookup. RING_FLASH_ATTN_CHECK=1 exchanges on every call.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from ..utils import lost
from .validate import check_group

T = TypeVar("T")
EXCHANGED_CALLS = 2
_ERROR = "error"
# Calls that each group has made so far. Every rank of a group makes the same calls.
_calls: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()


@contextmanager
def agreement(group: dist.ProcessGroup | None, own: object) -> Iterator[dict[str, str] | None]:
    """Yield a dict to fill with what this rank does, and compare it on leaving; None if not due.

    An error inside is exchanged too, and raised here as it is and on the other ranks as a
    ValueError that names this rank.

    Args:
        group: the ranks that compare; None for the default group.
        own: a tensor of the call, on whose device nccl exchanges; anything else if it is not one.

    Raises:
        ValueError: ranks differ; names each field and what every rank has.
    """
    world_size = check_group(group)
    if not _due(group, world_size):
        yield None
        return
    device = own.device if isinstance(own, torch.Tensor) else None
    mine: dict[str, str] = {}
    try:
        yield mine
    except Exception as error:
        gather_objects(group, device, {_ERROR: f"{type(error).__name__}: {error}"})
        raise
    _compare(gather_objects(group, device, mine))


def _due(group: dist.ProcessGroup | None, world_size: int) -> bool:
    if world_size == 1:
        return False
    member = dist.group.WORLD if group is None else group
    assert member is not None, "check_group has passed"
    count = _calls.get(member, 0)
    if count >= EXCHANGED_CALLS and os.environ.get("RING_FLASH_ATTN_CHECK") != "1":
        return False
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return False
    _calls[member] = min(count + 1, EXCHANGED_CALLS)
    return True


def gather_objects(
    group: dist.ProcessGroup | None, device: torch.device | None, mine: T
) -> list[T]:
    """Return what every rank has brought, by rank. Collective, and a host sync.

    Args:
        device: where the ranks' tensors are, if known.
    """
    everyone = [mine] * dist.get_world_size(group)
    # nccl gathers objects on the current device, which a caller may never have set.
    on_gpu = device is not None and device.type == "cuda"
    with torch.cuda.device(device) if on_gpu else nullcontext():
        try:
            dist.all_gather_object(everyone, mine, group=group)
        except RuntimeError as error:
            raise lost(error, group, "comparing the calls of all ranks") from error
    return everyone


def _compare(everyone: list[dict[str, str]]) -> None:
    failed = {rank: other[_ERROR] for rank, other in enumerate(everyone) if _ERROR in other}
    if failed:
        told = "; ".join(f"rank {rank} of the group raised {text}" for rank, text in failed.items())
        raise ValueError(f"{told}. No rank goes on, since the ring needs all of them")
    differing = [
        f"{field}: " + ", ".join(f"rank {rank} has {x[field]}" for rank, x in enumerate(everyone))
        for field in everyone[0]
        if len({other[field] for other in everyone}) > 1
    ]
    if differing:
        raise ValueError("the ranks of the group must agree on " + "; ".join(differing))
