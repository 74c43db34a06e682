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
from .peer_buffers import PeerBuffers, PeerStore, size_of
from .peer_memory import PeerMemory, out_of_reach, place_of
from .plan import RingPlan
from .traffic import Traffic

NAMES = ("ring", "copy-engine")
ENVIRONMENT = "RING_FLASH_ATTN_EXCHANGE"
AUTOMATIC = ("triton",)  # backends whose calls take the copy engine where they can, unless told
KEPT_SHAPES = 64  # of k, whose views a group keeps
# Where a larger k comes, its memory is taken so many times as large as what was there, at least.
GROWTH = 1.25


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
        self.stores: dict[tuple, PeerStore] = {}
        # What CUDA graphs hold addresses of: memory that was outgrown, and views.
        self.kept: list[PeerStore] = []
        self.captured: dict[int, PeerBuffers] = {}
        self.buffers: OrderedDict[tuple, PeerBuffers] = OrderedDict()


_groups: WeakKeyDictionary[dist.ProcessGroup, _Group] = WeakKeyDictionary()


def wanted_exchange(exchange: str | None, backend: str) -> str | None:
    """Return `ring`, `copy-engine`, or None for the automatic choice.

    Args:
        backend: its name.
        exchange: as the caller says; None: as the environment variable RING_FLASH_ATTN_EXCHANGE
            says, if it is set.
    """
    name, value = "exchange", exchange
    if value is None:
        name, value = ENVIRONMENT, os.environ.get(ENVIRONMENT)
    if value is None:
        return None if backend in AUTOMATIC else "ring"
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
    merges: bool = False,
) -> Exchange:
    """Return the exchange of one pass. Collective, and a host sync, where memory is new.

    Args:
        route: None for the ring, all rows.
        k, v: [B, L, Hk, D], this rank's own. state: dtype of dk, dv as they travel.
        backward: whether the pass returns dk, dv.
        merges: whether the backend takes steps over several sources.

    Raises:
        NotImplementedError: the route is required and not possible; the same on every rank.
    """
    # One step exchanges nothing, so there is nothing to choose.
    traffic = None if route is None else route.traffic
    # Without a GPU the automatic choice needs no talk; all ranks compute on one kind of device.
    possible = route is not None and (route.exchange == "copy-engine" or k.is_cuda)
    if route is not None and possible and route.exchange != "ring" and len(plan.steps) > 1:
        member = dist.group.WORLD if group is None else group
        assert member is not None, "check_group has passed"
        ours = _groups.get(member)
        if ours is None:
            ours = _groups[member] = _Group()
        reasons = _reasons(ours, member, k.device)
        if not reasons:
            buffers = _buffers(ours, k, state)
            return CopyEngineExchange(buffers, route.traffic, plan, k, v, state, backward, merges)
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
        found = _told(group, device, out_of_reach(places, rank, device))
        # What looks possible may be forbidden, as to map another process's memory in a container.
        ours.reasons[device] = found or _told(group, device, _open_memory(ours, group, device))
    return ours.reasons[device]


def _told(group: dist.ProcessGroup, device: torch.device, own: list[str]) -> list[str]:
    """Return the reasons of every rank, each with its rank. Collective."""
    told = gather_objects(group, device, own)
    return [f"rank {rank}: {reason}" for rank, reasons in enumerate(told) for reason in reasons]


def _open_memory(ours: _Group, group: dist.ProcessGroup, device: torch.device) -> list[str]:
    """Let the ranks reach each other's memory; return why not. No peer is waited for afterwards."""
    try:
        ours.memories[device] = PeerMemory(group, device)
    except (RuntimeError, OSError) as error:
        return [f"torch's symmetric memory: {' '.join(str(error).split())[:300]}"]
    return []


def _buffers(ours: _Group, k: Tensor, state: torch.dtype) -> PeerBuffers:
    """Return the memory for tensors like k. Every rank makes the same calls, so all agree."""
    memory, key = ours.memories[k.device], (k.device, k.shape, k.dtype)
    buffers = ours.buffers.get(key)  # never of memory that was outgrown, see _store
    if buffers is None:
        buffers = ours.buffers[key] = PeerBuffers(_store(ours, memory, k, state), tuple(k.shape))
        if len(ours.buffers) > KEPT_SHAPES:
            ours.buffers.popitem(last=False)
    ours.buffers.move_to_end(key)
    if memory.capturing():
        buffers.store.kept = True
        ours.captured[id(buffers)] = buffers
    return buffers


def _store(ours: _Group, memory: PeerMemory, k: Tensor, state: torch.dtype) -> PeerStore:
    """Return memory that k and v fit in."""
    key, size = (k.device, k.dtype), size_of(tuple(k.shape), memory.world_size)
    store = ours.stores.get(key)
    if store is not None and store.size.holds(size):
        return store
    if store is not None:
        size = store.size.grown(size, GROWTH)
        memory.settle()  # A peer may still be reading it.
        if store.kept:
            ours.kept.append(store)
        outgrown = [each for each, x in ours.buffers.items() if x.store is store]
        for each in outgrown:
            del ours.buffers[each]
        del ours.stores[key], store
    ours.stores[key] = store = PeerStore(memory, size, k.dtype, state)
    return store
