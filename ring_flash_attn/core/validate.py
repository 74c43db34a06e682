"""Check a call before anything is sent: a rank that raises later leaves the others waiting.

Every error names the argument, what came and what was expected.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..ranks import ranks_of
from .attention import Attention
from .layout import Layout

# Dtypes, devices and shapes that have passed, which every layer of a model brings again.
_passed: set[tuple] = set()
_KEPT = 1024


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise unless q is [B, L, H, D] and k, v are [B, Lk, Hk, D] of one float dtype and device."""
    alike = None
    if isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor):
        alike = tuple((x.dtype, x.device, x.shape) for x in (q, k, v))
    if alike in _passed:
        return
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x, ("B", "L", "H" if name == "q" else "Hk", "D"))
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{name} must have q's batch size {q.shape[0]}, got {_shape(x)}")
        if x.shape[3] != q.shape[3]:
            raise ValueError(f"{name} must have q's head dim {q.shape[3]}, got {_shape(x)}")
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {_shape(k)}, got {_shape(v)}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q's heads must be a multiple of k's heads, got q {_shape(q)} and k {_shape(k)}"
        )
    if len(_passed) >= _KEPT:
        _passed.clear()
    if alike is not None:
        _passed.add(alike)


def check_tensor(name: str, x: Tensor, axes: tuple[str, ...]) -> None:
    """Raise unless x is a float tensor with these axes, none of them empty."""
    expected = f"[{', '.join(axes)}]"
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor {expected}, got {type(x).__name__}")
    if x.ndim != len(axes):
        raise ValueError(f"{name} must be {expected}, got shape {_shape(x)}")
    if x.numel() == 0:
        raise ValueError(f"{name} must be {expected} with no empty axis, got shape {_shape(x)}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must have a float dtype, got {x.dtype}")


def check_packed(name: str, x: Tensor, axes: tuple[str, ...], parts: int) -> None:
    """Raise unless x packs `parts` tensors in its third-to-last axis."""
    check_tensor(name, x, axes)
    if x.shape[-3] != parts:
        raise ValueError(
            f"{name} must be [{', '.join(axes)}] with {parts} on axis {x.ndim - 3}, "
            f"got shape {_shape(x)}"
        )


def check_attention(
    head_dim: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    dropout_p: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
) -> Attention:
    """Return the `Attention` that these arguments of flash-attn mean."""
    check_bool("causal", causal)
    check_bool("deterministic", deterministic)
    if alibi_slopes is not None:
        raise NotImplementedError("alibi_slopes: no backend of this library has alibi, pass None")
    _check_dropout(dropout_p)
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"softmax_scale must be a number or None, got {type(scale).__name__}")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"softmax_scale must be finite and > 0, got {scale}")
    return Attention(float(scale), causal, _window(window_size), deterministic)


def check_bool(name: str, value: bool) -> None:
    """Raise unless value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def _check_dropout(dropout_p: float) -> None:
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p must be a number, got {type(dropout_p).__name__}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_p > 0:
        raise NotImplementedError(
            f"dropout_p: no backend of this library has dropout, pass 0, got {dropout_p}"
        )


def _window(window_size: Sequence[int]) -> tuple[int, int]:
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(f"window_size must be a pair (left, right), got {window_size!r}")
    for side in window_size:
        if isinstance(side, bool) or not isinstance(side, int):
            raise TypeError(f"window_size must hold two ints, got {window_size!r}")
        if side < -1:
            raise ValueError(f"window_size must hold ints >= -1 (-1: open), got {window_size!r}")
    return window_size[0], window_size[1]


def check_group(group: dist.ProcessGroup | None) -> int:
    """Return the number of ranks of a group that holds this rank."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "group: torch.distributed has no process group yet, "
            "call torch.distributed.init_process_group first (one rank is enough)"
        )
    if group is not None and not isinstance(group, dist.ProcessGroup):
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group must hold this rank, got a group of other ranks")
        raise TypeError(f"group must be a ProcessGroup or None, got {type(group).__name__}")
    ranks = ranks_of(group)
    if ranks.rank < 0:
        raise ValueError(
            f"group must hold this rank, got ranks {list(ranks.globally)} on rank {dist.get_rank()}"
        )
    return ranks.size


def check_transport(group: dist.ProcessGroup | None, q: Tensor) -> None:
    """Raise unless the group can move tensors of q's device: nccl alone moves no CPU tensors."""
    if q.device.type != "cpu":
        return
    ranks = ranks_of(group)
    if "cpu:" not in ranks.backends and ranks.size > 1:
        raise ValueError(
            f"group must be able to send q's device cpu, got a group of backends {ranks.backends}: "
            "move the tensors to the GPU, or use a gloo group"
        )


def check_layouts(
    kind: str, attention: Attention, q: Tensor, k: Tensor, world_size: int
) -> tuple[Layout, Layout]:
    """Return the layouts of q and of k, v."""
    for name, x in (("q", q), ("k", k)):
        if kind == "zigzag" and x.shape[1] % 2:
            raise ValueError(
                f"{name} must have an even local length in the zigzag layout (two blocks a "
                f"rank), got {x.shape[1]} of shape {_shape(x)}"
            )
    if attention.masked and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"k must have q's local length {q.shape[1]} when causal or windowed, since both are "
            f"placed by position, got {k.shape[1]}"
        )
    return Layout(kind, q.shape[1], world_size), Layout(kind, k.shape[1], world_size)


def check_cu_seqlens(name: str, cu_seqlens: Tensor, q: Tensor) -> None:
    """Raise unless cu_seqlens is [N + 1] int32 on q's device. Its numbers stay unread."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{name} must be a tensor [N + 1], got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"{name} must be [N + 1], N >= 1 documents, got {_shape(cu_seqlens)}")
    if cu_seqlens.device != q.device:
        raise ValueError(f"{name} must be on q's device {q.device}, got {cu_seqlens.device}")
    if not cu_seqlens.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got stride {cu_seqlens.stride(0)}")


def check_positive(name: str, value: int) -> None:
    """Raise unless value is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_slice(name: str, rows: slice, length: int) -> None:
    """Raise unless rows is slice(start, stop) of at least one row within `length`."""
    if not isinstance(rows, slice):
        raise TypeError(f"{name} must be a slice, got {type(rows).__name__}")
    ends = rows.start, rows.stop
    whole = all(isinstance(x, int) and not isinstance(x, bool) for x in ends)
    if rows.step not in (None, 1) or not whole:
        raise TypeError(f"{name} must be slice(start, stop) of two ints, got {rows}")
    if not 0 <= rows.start < rows.stop <= length:
        raise ValueError(f"{name} must lie within the {length} gathered rows, got {rows}")


def check_backward(dout: Tensor, q: Tensor, out: Tensor, softmax_lse: Tensor) -> None:
    """Raise unless dout, out fit q [B, L, H, D] and softmax_lse is [B, H, L]."""
    check_same("dout", dout, q, "q")
    check_same("out", out, q, "q")
    check_same("softmax_lse", softmax_lse, q[..., 0].transpose(1, 2), "q as [B, H, L]")


def check_same(name: str, x: Tensor, like: Tensor, of: str) -> None:
    """Raise unless x is a tensor with the shape and device of another."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor like {of}, got {type(x).__name__}")
    if x.shape != like.shape:
        raise ValueError(f"{name} must have {of}'s shape {_shape(like)}, got {_shape(x)}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on {of}'s device {like.device}, got {x.device}")


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)
