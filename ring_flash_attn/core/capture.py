"""What keeps a CUDA graph from capturing the messages of a group, told before the first one.

NCCL's messages can be captured: they are kernels on a stream of the group's, which joins the
capture by events, and torch's watchdog leaves captured messages alone. A replay sends them anew, so
every rank must capture and replay the same calls in the same order.
"""

import os
from weakref import WeakSet

import torch
import torch.distributed as dist

from ..ranks import ranks_of

_BLOCKING = "TORCH_NCCL_BLOCKING_WAIT", "NCCL_BLOCKING_WAIT"  # read by torch with each group
_TRUE = ("1", "y", "yes", "t", "true")
_met: WeakSet[dist.ProcessGroup] = WeakSet()  # groups that have had a pass outside of captures


def check_messages(group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Check a pass that sends messages: raise if a CUDA graph captures it and cannot hold them.

    Args:
        group: the ranks; None for the default group.
        device: where the tensors are.

    Raises:
        RuntimeError: the same on every rank, if all capture.
    """
    if device.type != "cuda":
        return
    member = dist.group.WORLD if group is None else group
    assert member is not None, "check_group has passed"
    if not torch.cuda.is_current_stream_capturing():
        if member not in _met:
            _met.add(member)
        return
    reason = _obstacle(member)
    if reason:
        raise RuntimeError(f"messages between ranks, which a CUDA graph cannot capture: {reason}")


def _obstacle(group: dist.ProcessGroup) -> str:
    """Return what keeps the group's messages from being captured, and what to do; "" if nothing."""
    ranks = ranks_of(group)
    if not ranks.send_cuda:
        return (
            f"the group of backends {ranks.backends} moves them through host memory; "
            "use an nccl group, or exchange='copy-engine' on one host"
        )
    if any(os.environ.get(name, "").lower() in _TRUE for name in _BLOCKING):
        return (
            f"{_BLOCKING[0]} makes the host wait for each; start without it, or use "
            "exchange='copy-engine' on one host"
        )
    if group not in _met:
        return "the group connects its ranks with its first call; run one call before"
    return ""
