"""Ring attention over a sequence sharded in contiguous blocks, on native backends."""

from .core.forms import BatchFunction, backward, forward, func, kvpacked_func, qkvpacked_func

_LAYOUT = "contiguous"

ring_flash_attn_forward = forward("ring_flash_attn_forward", __name__, _LAYOUT, "native")
ring_flash_attn_backward = backward("ring_flash_attn_backward", __name__, _LAYOUT, "native")
ring_flash_attn_func = func("ring_flash_attn_func", __name__, _LAYOUT, "native")
ring_flash_attn_kvpacked_func = kvpacked_func(
    "ring_flash_attn_kvpacked_func", __name__, _LAYOUT, "native"
)
ring_flash_attn_qkvpacked_func = qkvpacked_func(
    "ring_flash_attn_qkvpacked_func", __name__, _LAYOUT, "native"
)


class RingFlashAttnFunc(BatchFunction):
    """Upstream's autograd class: `apply(q, k, v, dropout_p, ..., group)`."""

    layout = _LAYOUT
    backend = "native"
