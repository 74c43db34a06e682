"""Which exchange a call runs on, decided once a group by all its ranks, and its memory.

`ring` runs everywhere. `copy-engine` needs one host whose GPUs reach each other's memory.
"""

import os
from collections import OrderedDict
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from .agree import gather_objects
from .copy_engine import CopyEngineExchange
from .exchange import Exchange, RingExchange
from .packed import DocumentsPlan
from .peer_buffers import PeerBuffers
from .peer_memory import PeerMemory, out_of_reach, place_of
from .plan import RingPlan
from .traffic import Traffic

NAMES = ("ring", "copy-engine")
ENVIRONMENT = "RING_FLASH_ATTN_EXCHANGE"
# Whether a call that does not say takes the copy engine where it can. Off: it has run on 2 GPUs
# only, and its waits have no timeout.
AUTOMATIC = False
# Shapes of k whose memory a group keeps; beyond, the one that was used least recently goes.
KEPT_SHAPES = 8


class Route(NamedTuple):
    """How a call's K, V are to travel.

    Attributes:
        traffic: which rows go where.
        exchange: one of NAMES; None: the copy engine where it is possible.
    """

    traffic: Traffic
    exchange: str | None


class _Group:
    """What one group has decided and allocated."""

    def __init__(self) -> None:
        self.reasons: dict[torch.device, list[str]] = {}
        self.memories: dict[torch.device, PeerMemory] = {}
        self.buffers: OrderedDict[tuple, PeerBuffers] = OrderedDict()


_groups: WeakKeyDictionary[dist.ProcessGroup, _Group] = WeakKeyDictionary()


def wanted_exchange(exchange: str | None) -> str | None:
    """Return `ring`, `copy-engine`, or None for the automatic choice.

    Args:
        exchange: as the caller says; None: as the environment variable RING_FLASH_ATTN_EXCHANGE
            says, if it is set.
    """
    name, value = "exchange", exchange
    if value is None:
        name, value = ENVIRONMENT, os.environ.get(ENVIRONMENT)
    if value is None:
        return None if AUTOMATIC else "ring"
    if value not in NAMES:
        raise ValueError(f"{name} must be one of {', '.join(NAMES)} or unset, got {value!r}")
    return value


def open_exchange(
    group: dist.ProcessGroup | None,
    plan: RingPlan | DocumentsPlan,
    route: Route | None,
    k: Tensor,
    v: Tensor,
    state: torch.dtype,
    backward: bool,
) -> Exchange:
    """Return the exchange of one pass. Collective, and a host sync, where memory is new.

    Args:
        route: None for the ring, all rows.
        k, v: [B, L, Hk, D], this rank's own. state: dtype of dk, dv as they travel.
        backward: whether the pass returns dk, dv.

    Raises:
        NotImplementedError: the route is required and not possible; the same on every rank.
    """
    # One step exchanges nothing, so there is nothing to choose.
    traffic = None if route is None else route.traffic
    if route is not None and route.exchange != "ring" and len(plan.steps) > 1:
        member = dist.group.WORLD if group is None else group
        assert member is not None, "check_group has passed"
        ours = _groups.setdefault(member, _Group())
        reasons = _reasons(ours, member, k.device)
        if not reasons:
            buffers = _buffers(ours, member, k, state)
            return CopyEngineExchange(buffers, route.traffic, plan, k, v, state, backward)
        if route.exchange == "copy-engine":
            raise NotImplementedError(
                "the copy-engine exchange cannot run on this group, use exchange='ring': "
                + "; ".join(reasons)
            )
    return RingExchange(group, plan, k, v, state, traffic)


def _reasons(ours: _Group, group: dist.ProcessGroup, device: torch.device) -> list[str]:
    """Return what keeps the group from the copy engine, in one list that all ranks share."""
    if device not in ours.reasons:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the ranks choose an exchange with their first call, which a CUDA graph cannot "
                "capture: run one call before, or pass exchange='ring'"
            )
        rank = dist.get_rank(group)
        places = gather_objects(group, device, place_of(device))
        told = gather_objects(group, device, out_of_reach(places, rank, device))
        ours.reasons[device] = [
            f"rank {rank}: {reason}" for rank, reasons in enumerate(told) for reason in reasons
        ]
    return ours.reasons[device]


def _buffers(ours: _Group, group: dist.ProcessGroup, k: Tensor, state: torch.dtype) -> PeerBuffers:
    """Return the memory for tensors like k. Every rank makes the same calls, so all agree."""
    if k.device not in ours.memories:
        ours.memories[k.device] = PeerMemory(group, k.device)
    memory, key = ours.memories[k.device], (k.device, k.shape, k.dtype)
    if key not in ours.buffers:
        _make_room(ours, memory)
        ours.buffers[key] = PeerBuffers(memory, tuple(k.shape), k.dtype, state)
    ours.buffers.move_to_end(key)
    buffers = ours.buffers[key]
    buffers.kept |= memory.capturing()
    return buffers


def _make_room(ours: _Group, memory: PeerMemory) -> None:
    loose = [key for key, buffers in ours.buffers.items() if not buffers.kept]
    if len(loose) >= KEPT_SHAPES:
        memory.settle()  # A peer may still be reading it.
        del ours.buffers[loose[0]]
