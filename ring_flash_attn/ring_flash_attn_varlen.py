"""Ring attention over packed documents, each in contiguous parts, on native backends."""

from .core.packed_forms import (
    PackedFunction,
    varlen_backward,
    varlen_forward,
    varlen_func,
    varlen_kvpacked_func,
    varlen_qkvpacked_func,
)

_LAYOUT = "contiguous"

ring_flash_attn_varlen_forward = varlen_forward(
    "ring_flash_attn_varlen_forward", __name__, _LAYOUT, "native"
)
ring_flash_attn_varlen_backward = varlen_backward(
    "ring_flash_attn_varlen_backward", __name__, _LAYOUT, "native"
)
ring_flash_attn_varlen_func = varlen_func(
    "ring_flash_attn_varlen_func", __name__, _LAYOUT, "native"
)
ring_flash_attn_varlen_kvpacked_func = varlen_kvpacked_func(
    "ring_flash_attn_varlen_kvpacked_func", __name__, _LAYOUT, "native"
)
ring_flash_attn_varlen_qkvpacked_func = varlen_qkvpacked_func(
    "ring_flash_attn_varlen_qkvpacked_func", __name__, _LAYOUT, "native"
)


class RingFlashAttnVarlenFunc(PackedFunction):
    """Upstream's autograd class: `apply(q, k, v, cu_seqlens, max_seqlen, ..., group)`."""

    layout = _LAYOUT
    backend = "native"
