"""Put a block's results into the state."""

from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..kernels.configs import block_d

_ROWS = 32


def fold(
    out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor, result: Tensor | None = None
) -> None:
    """Merge a block's result into the state: the online softmax across blocks.

    A row that saw nothing on either side stays (0, -inf): its weights are 0, never NaN.

    Args:
        out: [B, n, H, D], read. lse: [B, H, n], read and written. The state.
        block_out: [B, n, H, D], any dtype, unread where the block saw nothing. block_lse:
            [B, H, n], -inf where it saw nothing.
        result: [B, n, H, D], any dtype, the merged out; `out` itself if None.
    """
    result = out if result is None else result
    if out.is_cuda and out.dtype == torch.float32 and has_triton():
        fold_in_one_pass(out, lse, block_out, block_lse, result)
        return
    unseen = (block_lse == -torch.inf).transpose(1, 2).unsqueeze(-1)
    block_out = block_out.masked_fill(unseen, 0.0)
    total = torch.logaddexp(lse, block_lse.to(lse.dtype))
    finite = torch.where(total == -torch.inf, 0.0, total)
    kept = torch.exp(lse - finite).transpose(1, 2).unsqueeze(-1)
    new = torch.exp(block_lse - finite).transpose(1, 2).unsqueeze(-1)
    result.copy_((out * kept).addcmul_(block_out, new))
    lse.copy_(total)


def put(state: Tensor | None, share: Tensor, result: Tensor, rows: Tensor | None = None) -> None:
    """Write state + share to `result`, or share alone if state is None.

    Args:
        state, share, result: [B, n, H, D], any dtype, the sum in the wider one's. `result` may be
            `state`.
        rows: [n] bool, where share is read; 0 elsewhere. None: everywhere.
    """
    wide = result if state is None else state
    if wide.is_cuda and wide.dtype != torch.float64 and has_triton():
        put_in_one_pass(state, share, result, rows)
        return
    if rows is not None:
        share = share.masked_fill(~rows[:, None, None], 0.0)
    if state is None:
        result.copy_(share)
    else:
        torch.add(state, share, out=result)


def fold_in_one_pass(
    out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor, result: Tensor
) -> None:
    """As `fold`, for a float32 state, in one kernel instead of a dozen passes over memory."""
    from ..kernels.fold import _fold_kernel  # needs Triton, which the other backends do not

    arguments = {
        "out_ptr": out,
        "lse_ptr": lse,
        "block_out_ptr": block_out,
        "block_lse_ptr": block_lse,
        "result_ptr": result,
        "out_strides": _strides(out),
        "lse_strides": lse.stride(),
        "block_out_strides": _strides(block_out),
        "block_lse_strides": block_lse.stride(),
        "result_strides": _strides(result),
    }
    _launch(_fold_kernel, out, arguments)


def put_in_one_pass(
    state: Tensor | None, share: Tensor, result: Tensor, rows: Tensor | None = None
) -> None:
    """As `put`, in float32, in one kernel whatever the dtypes."""
    from ..kernels.fold import _put_kernel

    add = state is not None
    state = result if state is None else state
    share = share if share.stride(-1) == 1 else share.contiguous()
    arguments = {
        "state_ptr": state,
        "share_ptr": share,
        "result_ptr": result,
        "rows_ptr": None if rows is None else rows.view(torch.uint8),
        "state_strides": _strides(state),
        "share_strides": _strides(share),
        "result_strides": _strides(result),
        "ADD": add,
    }
    _launch(_put_kernel, result, arguments)


def _launch(kernel: Any, like: Tensor, arguments: dict[str, Any]) -> None:
    """Launch `kernel` over rows and heads of `like` [B, n, H, D]."""
    from .launch import launch

    batch, length, heads, head_dim = like.shape
    arguments |= {"length": length, "heads": heads, "HEAD_DIM": head_dim}
    arguments |= {"BLOCK_M": _ROWS, "BLOCK_D": block_d(head_dim)}
    with torch.cuda.device(like.device) if like.is_cuda else nullcontext():
        launch(kernel, (-(-length // _ROWS) * batch * heads, 1, 1), arguments)


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Return the strides of x [B, n, H, D] in the kernel's order: batch, head, row."""
    assert x.stride(3) == 1, f"rows must be contiguous, got strides {x.stride()}"
    return x.stride(0), x.stride(2), x.stride(1)


@cache
def has_triton() -> bool:
    """Return whether the package triton is installed."""
    return find_spec("triton") is not None
