"""Exact attention over a sequence sharded across GPUs, K and V travelling a ring.

ring-flash-attn 0.1.8's functions for batches, with their signatures, and a `triton_` twin of
each; its functions for packed sequences and the Hugging Face adapter are not built yet.
"""

from .core.api import ring_attention
from .ring_flash_attn import (
    ring_flash_attn_func,
    ring_flash_attn_kvpacked_func,
    ring_flash_attn_qkvpacked_func,
)
from .stripe_flash_attn import (
    stripe_flash_attn_func,
    stripe_flash_attn_kvpacked_func,
    stripe_flash_attn_qkvpacked_func,
)
from .triton_ring_flash_attn import (
    TritonRingFlashAttnFunc,
    triton_flash_attn_backward,
    triton_flash_attn_forward,
    triton_ring_flash_attn_backward,
    triton_ring_flash_attn_forward,
    triton_ring_flash_attn_func,
    triton_ring_flash_attn_kvpacked_func,
    triton_ring_flash_attn_qkvpacked_func,
    triton_stripe_flash_attn_backward,
    triton_stripe_flash_attn_forward,
    triton_stripe_flash_attn_func,
    triton_stripe_flash_attn_kvpacked_func,
    triton_stripe_flash_attn_qkvpacked_func,
    triton_zigzag_ring_flash_attn_backward,
    triton_zigzag_ring_flash_attn_forward,
    triton_zigzag_ring_flash_attn_func,
    triton_zigzag_ring_flash_attn_kvpacked_func,
    triton_zigzag_ring_flash_attn_qkvpacked_func,
)
from .utils import AllGatherComm, RingComm
from .zigzag_ring_flash_attn import (
    zigzag_ring_flash_attn_func,
    zigzag_ring_flash_attn_kvpacked_func,
    zigzag_ring_flash_attn_qkvpacked_func,
)

__all__ = [
    "AllGatherComm",
    "RingComm",
    "TritonRingFlashAttnFunc",
    "ring_attention",
    "ring_flash_attn_func",
    "ring_flash_attn_kvpacked_func",
    "ring_flash_attn_qkvpacked_func",
    "stripe_flash_attn_func",
    "stripe_flash_attn_kvpacked_func",
    "stripe_flash_attn_qkvpacked_func",
    "triton_flash_attn_backward",
    "triton_flash_attn_forward",
    "triton_ring_flash_attn_backward",
    "triton_ring_flash_attn_forward",
    "triton_ring_flash_attn_func",
    "triton_ring_flash_attn_kvpacked_func",
    "triton_ring_flash_attn_qkvpacked_func",
    "triton_stripe_flash_attn_backward",
    "triton_stripe_flash_attn_forward",
    "triton_stripe_flash_attn_func",
    "triton_stripe_flash_attn_kvpacked_func",
    "triton_stripe_flash_attn_qkvpacked_func",
    "triton_zigzag_ring_flash_attn_backward",
    "triton_zigzag_ring_flash_attn_forward",
    "triton_zigzag_ring_flash_attn_func",
    "triton_zigzag_ring_flash_attn_kvpacked_func",
    "triton_zigzag_ring_flash_attn_qkvpacked_func",
    "zigzag_ring_flash_attn_func",
    "zigzag_ring_flash_attn_kvpacked_func",
    "zigzag_ring_flash_attn_qkvpacked_func",
]
