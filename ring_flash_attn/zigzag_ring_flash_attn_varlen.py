"""Ring attention over packed documents, each in the zigzag layout, on native backends."""

from itertools import pairwise

import torch
from torch import Tensor

from .core.packed_forms import (
    PackedFunction,
    varlen_func,
    varlen_kvpacked_func,
    varlen_qkvpacked_func,
    zigzag_varlen_backward,
    zigzag_varlen_forward,
)

_LAYOUT = "zigzag"

zigzag_ring_flash_attn_varlen_forward = zigzag_varlen_forward(
    "zigzag_ring_flash_attn_varlen_forward", __name__, _LAYOUT, "native"
)
zigzag_ring_flash_attn_varlen_backward = zigzag_varlen_backward(
    "zigzag_ring_flash_attn_varlen_backward", __name__, _LAYOUT, "native"
)
zigzag_ring_flash_attn_varlen_func = varlen_func(
    "zigzag_ring_flash_attn_varlen_func", __name__, _LAYOUT, "native"
)
zigzag_ring_flash_attn_varlen_kvpacked_func = varlen_kvpacked_func(
    "zigzag_ring_flash_attn_varlen_kvpacked_func", __name__, _LAYOUT, "native"
)
zigzag_ring_flash_attn_varlen_qkvpacked_func = varlen_qkvpacked_func(
    "zigzag_ring_flash_attn_varlen_qkvpacked_func", __name__, _LAYOUT, "native"
)


class ZigZagRingFlashAttnVarlenFunc(PackedFunction):
    """Upstream's autograd class: `apply(q, k, v, cu_seqlens, max_seqlen, ..., group)`."""

    layout = _LAYOUT
    backend = "native"


def get_half_index(cu_seqlens: Tensor, *, front: bool) -> slice | Tensor:
    """Return the index of the first or second half of each document's rows.

    Reads cu_seqlens [N + 1] on the host. This library's own functions do not need it.

    Returns:
        a slice if there is one document, else a mask [T] bool on cu_seqlens' device.
    """
    edges = cu_seqlens.tolist()
    if len(edges) == 2:
        half = edges[-1] // 2
        return slice(None, half) if front else slice(half, None)
    index = torch.zeros(edges[-1], dtype=torch.bool, device=cu_seqlens.device)
    for begin, end in pairwise(edges):
        half = (begin + end) // 2
        index[begin:half] = front
        index[half:end] = not front
    return index


def get_half_lse(lse: Tensor, cu_seqlens: Tensor, *, front: bool) -> Tensor:
    """Return the first or second half of each document's rows of an lse, packed or padded.

    Args:
        lse: [H, T], or [N, H, max_seqlen], padded behind each document.
        cu_seqlens: [N + 1], read on the host.

    Returns:
        [H, T // 2], 0 behind the last document's half, or [N, H, max_seqlen // 2], 0 behind each
        document's half, in lse's dtype.
    """
    if lse.ndim == 2:
        rows = int(cu_seqlens[-1])
        packed = lse.new_zeros(lse.shape[0], lse.shape[1] // 2)
        packed[:, : rows // 2] = lse[:, :rows][:, get_half_index(cu_seqlens, front=front)]
        return packed
    documents, heads, length = lse.shape
    halves = torch.zeros(documents, heads, length // 2, dtype=lse.dtype, device=lse.device)
    for document, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
        half = (end - begin) // 2
        rows = slice(0, half) if front else slice(half, 2 * half)
        halves[document, :, :half] = lse[document, :, rows]
    return halves
