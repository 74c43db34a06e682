"""`utils.flatten_varlen_lse` and its inverse as Triton kernels, which do not gather by index."""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import utils

__all__ = ["flatten_kernel", "flatten_varlen_lse", "unflatten_kernel", "unflatten_varlen_lse"]

_BLOCK_M = 128


@triton.jit
def flatten_kernel(
    OUT,
    LSE,
    CU_SEQLENS,
    stride_out_nheads,
    stride_out_seqlen,
    stride_lse_batch,
    stride_lse_nheads,
    stride_lse_seqlen,
    BLOCK_M: tl.constexpr,
):
    """OUT[head, CU_SEQLENS[n] + row] = LSE[n, head, row] for the rows of document n.

    Grid: (ceil(max_seqlen / BLOCK_M), N, H), one program BLOCK_M rows of one document and head.
    Writes OUT [H, T]; LSE [N, H, max_seqlen], CU_SEQLENS [N + 1].
    """
    document = tl.program_id(1).to(tl.int64)
    head = tl.program_id(2).to(tl.int64)
    start = tl.load(CU_SEQLENS + document).to(tl.int64)
    length = tl.load(CU_SEQLENS + document + 1) - start
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    source = LSE + document * stride_lse_batch + head * stride_lse_nheads
    target = OUT + head * stride_out_nheads + start * stride_out_seqlen
    lse = tl.load(source + offs_m * stride_lse_seqlen, mask=offs_m < length)
    tl.store(target + offs_m * stride_out_seqlen, lse, mask=offs_m < length)


def flatten_varlen_lse(lse: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Pack an lse that is padded document by document.

    Reads cu_seqlens[-1] on the host. On CPU tensors it is `utils.flatten_varlen_lse`, unless
    Triton interprets.

    Args:
        lse: [N, H, max_seqlen], any float dtype; no document is longer than max_seqlen.
        cu_seqlens: [N + 1] int32, where each of the N documents begins, then T, their rows.

    Returns:
        [H, T], contiguous, of lse's dtype.
    """
    if not _runs_kernels(lse):
        return utils.flatten_varlen_lse(lse, cu_seqlens)
    documents, heads, max_seqlen = lse.shape
    out = lse.new_empty(heads, int(cu_seqlens[-1]))
    with torch.cuda.device(lse.device) if lse.is_cuda else nullcontext():
        flatten_kernel[(triton.cdiv(max_seqlen, _BLOCK_M), documents, heads)](
            out, lse, cu_seqlens.contiguous(), *out.stride(), *lse.stride(), BLOCK_M=_BLOCK_M
        )
    return out


@triton.jit
def unflatten_kernel(
    OUT,
    LSE,
    CU_SEQLENS,
    stride_out_batch,
    stride_out_nheads,
    stride_out_seqlen,
    stride_lse_seqlen,
    stride_lse_nheads,
    BLOCK_M: tl.constexpr,
):
    """OUT[n, head, row] = LSE[CU_SEQLENS[n] + row, head] for the rows of document n.

    Grid: (ceil(max_seqlen / BLOCK_M), N, H), one program BLOCK_M rows of one document and head.
    Writes OUT [N, H, max_seqlen] where documents have rows; LSE [T, H], CU_SEQLENS [N + 1].
    """
    document = tl.program_id(1).to(tl.int64)
    head = tl.program_id(2).to(tl.int64)
    start = tl.load(CU_SEQLENS + document).to(tl.int64)
    length = tl.load(CU_SEQLENS + document + 1) - start
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    source = LSE + start * stride_lse_seqlen + head * stride_lse_nheads
    target = OUT + document * stride_out_batch + head * stride_out_nheads
    lse = tl.load(source + offs_m * stride_lse_seqlen, mask=offs_m < length)
    tl.store(target + offs_m * stride_out_seqlen, lse, mask=offs_m < length)


def unflatten_varlen_lse(lse: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Pad a packed lse document by document: `flatten_varlen_lse` of its result is lse transposed.

    Reads nothing on the host. On CPU tensors it is `utils.unflatten_varlen_lse`, unless Triton
    interprets.

    Args:
        lse: [T, H, 1] or [T, H], any float dtype.
        cu_seqlens: [N + 1] int32, where each of the N documents begins, then T, their rows.
        max_seqlen: rows a document is padded to; at least the longest document's, unchecked.

    Returns:
        [N, H, max_seqlen], contiguous, of lse's dtype; 0 past the end of a document.
    """
    if not _runs_kernels(lse):
        return utils.unflatten_varlen_lse(lse, cu_seqlens, max_seqlen)
    lse = lse.squeeze(2) if lse.ndim == 3 else lse
    documents, heads = len(cu_seqlens) - 1, lse.shape[1]
    out = lse.new_zeros(documents, heads, max_seqlen)
    with torch.cuda.device(lse.device) if lse.is_cuda else nullcontext():
        unflatten_kernel[(triton.cdiv(max_seqlen, _BLOCK_M), documents, heads)](
            out, lse, cu_seqlens.contiguous(), *out.stride(), *lse.stride(), BLOCK_M=_BLOCK_M
        )
    return out


def _runs_kernels(lse: Tensor) -> bool:
    """Whether Triton can take this tensor: on a GPU, or anywhere in its interpreter."""
    return lse.is_cuda or not isinstance(flatten_kernel, triton.JITFunction)
