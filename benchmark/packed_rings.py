"""Attention over packed documents as plain calls, this library's and ring-flash-attn 0.1.8's."""

from collections.abc import Callable
from itertools import pairwise

import timing  # makes the library and the oracle importable
import torch
from kernels import Inputs, truth
from packing import Packing
from rings import BACKENDS, STEMS, Ring, check_backend, upstream
from torch import Tensor

import oracle
from comparison import Place
from ring_flash_attn import (
    PackedLayout,
    gathered_attention,
    llama3_flash_attn_prepare_cu_seqlens,
    packed_attention,
)

LLAMA3 = "llama3"
PACKED_LAYOUTS = (*STEMS, LLAMA3)


def packed_inputs(inputs: Inputs) -> Inputs:
    """Return the rows of a batch of one: q, dout [T, H, D], k, v [T, Hk, D], leaves of their own.

    They share the batch's storage.
    """
    return Inputs._make([*(x.detach()[0] for x in inputs[:4]), inputs.attention])


def packed_ring(
    impl: str,
    layout: str,
    packing: Packing,
    inputs: Inputs,
    place: Place,
    heads_k_stride: int = 1,
    exchange: str = "ring",
) -> Ring:
    """Return q, k, v -> out of an implementation, on this rank's rows of the documents.

    Args:
        inputs: q, dout [T, H, D], k, v [T, Hk, D]. heads_k_stride: of layout llama3.

    Raises:
        NotImplementedError: it cannot run here or not on these inputs; the message says why.
    """
    attention = inputs.attention
    masked = {"causal": attention.causal, "window_size": attention.window}
    cu_seqlens = torch.tensor(packing.cu_seqlens, dtype=torch.int32, device=inputs.q.device)
    of_rank = cu_seqlens, attention.causal, place.rank, place.world_size
    local = cu_seqlens // place.world_size, max(packing.lengths) // place.world_size
    if impl == "triton" and not inputs.q.is_cuda and not timing.WANTS_INTERPRETER:
        raise NotImplementedError("its interpreter takes minutes; set TRITON_INTERPRET=1 to wait")
    if impl in BACKENDS:
        check_backend(impl, attention, *(x[None] for x in inputs[:3]))
        options = {"backend": BACKENDS[impl], **masked}
        if layout == LLAMA3:
            cu_q, cu_k, max_q, max_k, keys = llama3_flash_attn_prepare_cu_seqlens(*of_rank)
            cut = cu_q, cu_k, max_q, max_k, heads_k_stride, keys
            return lambda q, k, v: gathered_attention(q, k, v, *cut, **options)[0]
        options |= {"layout": layout, "exchange": exchange}
        return lambda q, k, v: packed_attention(q, k, v, *local, **options)[0]
    if layout == "stripe":
        raise NotImplementedError("ring-flash-attn 0.1.8 has no packed stripe")
    module = upstream(impl, layout, inputs)
    if layout == LLAMA3:
        *cut, keys = module.llama3_flash_attn_prepare_cu_seqlens(*of_rank)
        given, name = (*cut, heads_k_stride, keys), "llama3_flash_attn_varlen_func"
    else:
        given, name = local, f"{STEMS[layout]}_flash_attn_varlen_func"
    func = getattr(module, name)
    return lambda q, k, v: func(q, k, v, *given, causal=attention.causal)


def packed_shard(layout: str, packing: Packing, place: Place) -> Callable[[Tensor], Tensor]:
    """Return [1, S, ...] -> [T, ...]: this rank's rows of the global documents."""
    kind = "gather" if layout == LLAMA3 else layout
    placed = PackedLayout(kind, packing.cu_seqlens, place.world_size)
    return lambda x: placed.shard(x[0], place.rank)


def packed_truth(inputs: Inputs, packing: Packing) -> oracle.Result:
    """Return attention within each document in float64, of global inputs [B, S, ...]."""
    documents = [
        truth(Inputs._make([*(x[:, begin:end] for x in inputs[:4]), inputs.attention]))
        for begin, end in pairwise(packing.cu_seqlens)
    ]
    parts = zip(oracle.Result._fields, zip(*documents, strict=True), strict=True)
    return oracle.Result._make(torch.cat(x, 2 if name == "lse" else 1) for name, x in parts)
