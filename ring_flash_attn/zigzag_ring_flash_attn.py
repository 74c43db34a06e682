"""Ring attention in the zigzag layout, which balances causal work, on native backends."""

from .core.forms import BatchFunction, backward, forward, func, kvpacked_func, qkvpacked_func

_LAYOUT = "zigzag"

zigzag_ring_flash_attn_forward = forward(
    "zigzag_ring_flash_attn_forward", __name__, _LAYOUT, "native"
)
zigzag_ring_flash_attn_backward = backward(
    "zigzag_ring_flash_attn_backward", __name__, _LAYOUT, "native"
)
zigzag_ring_flash_attn_func = func("zigzag_ring_flash_attn_func", __name__, _LAYOUT, "native")
zigzag_ring_flash_attn_kvpacked_func = kvpacked_func(
    "zigzag_ring_flash_attn_kvpacked_func", __name__, _LAYOUT, "native"
)
zigzag_ring_flash_attn_qkvpacked_func = qkvpacked_func(
    "zigzag_ring_flash_attn_qkvpacked_func", __name__, _LAYOUT, "native"
)


class ZigZagRingFlashAttnFunc(BatchFunction):
    """Upstream's autograd class: `apply(q, k, v, dropout_p, ..., group)`."""

    layout = _LAYOUT
    backend = "native"
