"""Packed documents in the comparison: their lengths, where their rows are, and the public calls."""

from collections.abc import Callable
from itertools import accumulate

import torch

import oracle

GATHERED = "llama3"
PACKED_LAYOUTS = (*oracle.LAYOUTS, GATHERED)


def documents_of(global_len: int, world_size: int) -> tuple[int, ...]:
    """Return lengths that add up to global_len: a short, a long, a tiny and a short document.

    All are multiples of 2P, the tiny one is 2P rows. Too small a global_len has fewer documents.
    """
    unit = 2 * world_size
    units = global_len // unit
    first, tiny, last = units // 8, 1, units // 5
    lengths = (first, units - first - tiny - last, tiny, last)
    return tuple(length * unit for length in lengths if length)


def rows_of(
    layout: str, documents: tuple[int, ...], world_size: int, rank: int, device: torch.device
) -> torch.Tensor:
    """Return the global row of each local row of `rank`; a batch is one document."""
    if layout == GATHERED:
        layout, documents = "contiguous", (sum(documents),)
    rows, begin = [], 0
    for length in documents:
        places = oracle.positions(layout, length // world_size, world_size, rank)
        rows += [begin + place for place in places]
        begin += length
    return torch.tensor(rows, device=device)


def each_document(
    attend: Callable, documents: tuple[int, ...], *whole: torch.Tensor
) -> oracle.Result:
    """Return what `attend` gives for the rows of each document by itself, joined again.

    Args:
        attend: takes a document's rows of every tensor of `whole` and returns an oracle.Result.
        whole: [B, rows, ...], each.
    """
    if len(documents) == 1:
        return attend(*whole)
    pieces = zip(*(x.split(documents, 1) for x in whole), strict=True)
    fields = zip(*(attend(*piece) for piece in pieces), strict=True)
    named = zip(oracle.Result._fields, fields, strict=True)
    return oracle.Result(*(torch.cat(x, 2 if name == "lse" else 1) for name, x in named))


def packed_arguments(
    layout: str, documents: tuple[int, ...], key_heads: int, world_size: int, rank: int, device
) -> tuple:
    """Return what a packed function takes between v and its options, as a user makes it."""
    from ring_flash_attn import llama3_flash_attn_prepare_cu_seqlens

    cu_seqlens = torch.tensor([0, *accumulate(documents)], dtype=torch.int32, device=device)
    if layout != GATHERED:
        return cu_seqlens // world_size, max(documents) // world_size
    prepared = llama3_flash_attn_prepare_cu_seqlens(cu_seqlens, True, rank, world_size)
    *lengths, local_k_slice = prepared
    # Two slices where the heads allow it, so that one travels while the other is computed.
    stride = key_heads if key_heads % 2 else key_heads // 2
    return *lengths, stride, local_k_slice
