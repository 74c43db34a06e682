"""Ring attention over a sequence sharded in stripes (every P-th position), on native backends."""

from .core.forms import BatchFunction, backward, forward, func, kvpacked_func, qkvpacked_func
from .core.packed_forms import (
    varlen_backward,
    varlen_forward,
    varlen_func,
    varlen_kvpacked_func,
    varlen_qkvpacked_func,
)

_LAYOUT = "stripe"

stripe_flash_attn_forward = forward("stripe_flash_attn_forward", __name__, _LAYOUT, "native")
stripe_flash_attn_backward = backward("stripe_flash_attn_backward", __name__, _LAYOUT, "native")
stripe_flash_attn_func = func("stripe_flash_attn_func", __name__, _LAYOUT, "native")
stripe_flash_attn_kvpacked_func = kvpacked_func(
    "stripe_flash_attn_kvpacked_func", __name__, _LAYOUT, "native"
)
stripe_flash_attn_qkvpacked_func = qkvpacked_func(
    "stripe_flash_attn_qkvpacked_func", __name__, _LAYOUT, "native"
)

stripe_flash_attn_varlen_forward = varlen_forward(
    "stripe_flash_attn_varlen_forward", __name__, _LAYOUT, "native"
)
stripe_flash_attn_varlen_backward = varlen_backward(
    "stripe_flash_attn_varlen_backward", __name__, _LAYOUT, "native"
)
stripe_flash_attn_varlen_func = varlen_func(
    "stripe_flash_attn_varlen_func", __name__, _LAYOUT, "native"
)
stripe_flash_attn_varlen_kvpacked_func = varlen_kvpacked_func(
    "stripe_flash_attn_varlen_kvpacked_func", __name__, _LAYOUT, "native"
)
stripe_flash_attn_varlen_qkvpacked_func = varlen_qkvpacked_func(
    "stripe_flash_attn_varlen_qkvpacked_func", __name__, _LAYOUT, "native"
)


class StripeFlashAttnFunc(BatchFunction):
    """Upstream's autograd class: `apply(q, k, v, dropout_p, ..., group)`."""

    layout = _LAYOUT
    backend = "native"
