"""Ring attention on this library's Triton kernels: every public `triton_` name, and the kernels.

`triton_<name>` has the signature of the native `<name>`. The state (out, lse, dq, dk, dv) stays
float32 through the whole ring and is rounded to the input's dtype once, at the end.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from .core.api import local_backward, local_forward
from .core.forms import (
    BatchFunction,
    backward,
    forward,
    func,
    kvpacked_func,
    qkvpacked_func,
)
from .core.gather_forms import (
    gathered_backward_form,
    gathered_forward_form,
    gathered_func,
    gathered_kvpacked_func,
    gathered_qkvpacked_func,
)
from .core.packed_forms import (
    varlen_backward,
    varlen_forward,
    varlen_func,
    varlen_kvpacked_func,
    varlen_qkvpacked_func,
    zigzag_varlen_backward,
    zigzag_varlen_forward,
)

if TYPE_CHECKING:
    from .kernels.dkv import _bwd_kernel_dkv
    from .kernels.dq import _bwd_kernel_dq
    from .kernels.forward import _fwd_kernel

__all__ = [
    "TritonRingFlashAttnFunc",
    "_bwd_kernel_dkv",
    "_bwd_kernel_dq",
    "_fwd_kernel",
    "triton_flash_attn_backward",
    "triton_flash_attn_forward",
    "triton_llama3_flash_attn_varlen_backward",
    "triton_llama3_flash_attn_varlen_forward",
    "triton_llama3_flash_attn_varlen_func",
    "triton_llama3_flash_attn_varlen_kvpacked_func",
    "triton_llama3_flash_attn_varlen_qkvpacked_func",
    "triton_ring_flash_attn_backward",
    "triton_ring_flash_attn_forward",
    "triton_ring_flash_attn_func",
    "triton_ring_flash_attn_kvpacked_func",
    "triton_ring_flash_attn_qkvpacked_func",
    "triton_ring_flash_attn_varlen_backward",
    "triton_ring_flash_attn_varlen_forward",
    "triton_ring_flash_attn_varlen_func",
    "triton_ring_flash_attn_varlen_kvpacked_func",
    "triton_ring_flash_attn_varlen_qkvpacked_func",
    "triton_stripe_flash_attn_backward",
    "triton_stripe_flash_attn_forward",
    "triton_stripe_flash_attn_func",
    "triton_stripe_flash_attn_kvpacked_func",
    "triton_stripe_flash_attn_qkvpacked_func",
    "triton_stripe_flash_attn_varlen_backward",
    "triton_stripe_flash_attn_varlen_forward",
    "triton_stripe_flash_attn_varlen_func",
    "triton_stripe_flash_attn_varlen_kvpacked_func",
    "triton_stripe_flash_attn_varlen_qkvpacked_func",
    "triton_zigzag_ring_flash_attn_backward",
    "triton_zigzag_ring_flash_attn_forward",
    "triton_zigzag_ring_flash_attn_func",
    "triton_zigzag_ring_flash_attn_kvpacked_func",
    "triton_zigzag_ring_flash_attn_qkvpacked_func",
    "triton_zigzag_ring_flash_attn_varlen_backward",
    "triton_zigzag_ring_flash_attn_varlen_forward",
    "triton_zigzag_ring_flash_attn_varlen_func",
    "triton_zigzag_ring_flash_attn_varlen_kvpacked_func",
    "triton_zigzag_ring_flash_attn_varlen_qkvpacked_func",
]

_KERNELS = {"_fwd_kernel": "forward", "_bwd_kernel_dq": "dq", "_bwd_kernel_dkv": "dkv"}


def __getattr__(name: str):
    """Import a kernel on use: everything else here works where Triton is not installed."""
    if name not in _KERNELS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".kernels.{_KERNELS[name]}", __package__), name)


triton_ring_flash_attn_forward = forward(
    "triton_ring_flash_attn_forward", __name__, "contiguous", "triton"
)
triton_ring_flash_attn_backward = backward(
    "triton_ring_flash_attn_backward", __name__, "contiguous", "triton"
)
triton_ring_flash_attn_func = func("triton_ring_flash_attn_func", __name__, "contiguous", "triton")
triton_ring_flash_attn_kvpacked_func = kvpacked_func(
    "triton_ring_flash_attn_kvpacked_func", __name__, "contiguous", "triton"
)
triton_ring_flash_attn_qkvpacked_func = qkvpacked_func(
    "triton_ring_flash_attn_qkvpacked_func", __name__, "contiguous", "triton"
)

triton_zigzag_ring_flash_attn_forward = forward(
    "triton_zigzag_ring_flash_attn_forward", __name__, "zigzag", "triton"
)
triton_zigzag_ring_flash_attn_backward = backward(
    "triton_zigzag_ring_flash_attn_backward", __name__, "zigzag", "triton"
)
triton_zigzag_ring_flash_attn_func = func(
    "triton_zigzag_ring_flash_attn_func", __name__, "zigzag", "triton"
)
triton_zigzag_ring_flash_attn_kvpacked_func = kvpacked_func(
    "triton_zigzag_ring_flash_attn_kvpacked_func", __name__, "zigzag", "triton"
)
triton_zigzag_ring_flash_attn_qkvpacked_func = qkvpacked_func(
    "triton_zigzag_ring_flash_attn_qkvpacked_func", __name__, "zigzag", "triton"
)

triton_stripe_flash_attn_forward = forward(
    "triton_stripe_flash_attn_forward", __name__, "stripe", "triton"
)
triton_stripe_flash_attn_backward = backward(
    "triton_stripe_flash_attn_backward", __name__, "stripe", "triton"
)
triton_stripe_flash_attn_func = func("triton_stripe_flash_attn_func", __name__, "stripe", "triton")
triton_stripe_flash_attn_kvpacked_func = kvpacked_func(
    "triton_stripe_flash_attn_kvpacked_func", __name__, "stripe", "triton"
)
triton_stripe_flash_attn_qkvpacked_func = qkvpacked_func(
    "triton_stripe_flash_attn_qkvpacked_func", __name__, "stripe", "triton"
)

triton_ring_flash_attn_varlen_forward = varlen_forward(
    "triton_ring_flash_attn_varlen_forward", __name__, "contiguous", "triton"
)
triton_ring_flash_attn_varlen_backward = varlen_backward(
    "triton_ring_flash_attn_varlen_backward", __name__, "contiguous", "triton"
)
triton_ring_flash_attn_varlen_func = varlen_func(
    "triton_ring_flash_attn_varlen_func", __name__, "contiguous", "triton"
)
triton_ring_flash_attn_varlen_kvpacked_func = varlen_kvpacked_func(
    "triton_ring_flash_attn_varlen_kvpacked_func", __name__, "contiguous", "triton"
)
triton_ring_flash_attn_varlen_qkvpacked_func = varlen_qkvpacked_func(
    "triton_ring_flash_attn_varlen_qkvpacked_func", __name__, "contiguous", "triton"
)

triton_zigzag_ring_flash_attn_varlen_forward = zigzag_varlen_forward(
    "triton_zigzag_ring_flash_attn_varlen_forward", __name__, "zigzag", "triton"
)
triton_zigzag_ring_flash_attn_varlen_backward = zigzag_varlen_backward(
    "triton_zigzag_ring_flash_attn_varlen_backward", __name__, "zigzag", "triton"
)
triton_zigzag_ring_flash_attn_varlen_func = varlen_func(
    "triton_zigzag_ring_flash_attn_varlen_func", __name__, "zigzag", "triton"
)
triton_zigzag_ring_flash_attn_varlen_kvpacked_func = varlen_kvpacked_func(
    "triton_zigzag_ring_flash_attn_varlen_kvpacked_func", __name__, "zigzag", "triton"
)
triton_zigzag_ring_flash_attn_varlen_qkvpacked_func = varlen_qkvpacked_func(
    "triton_zigzag_ring_flash_attn_varlen_qkvpacked_func", __name__, "zigzag", "triton"
)

triton_stripe_flash_attn_varlen_forward = varlen_forward(
    "triton_stripe_flash_attn_varlen_forward", __name__, "stripe", "triton"
)
triton_stripe_flash_attn_varlen_backward = varlen_backward(
    "triton_stripe_flash_attn_varlen_backward", __name__, "stripe", "triton"
)
triton_stripe_flash_attn_varlen_func = varlen_func(
    "triton_stripe_flash_attn_varlen_func", __name__, "stripe", "triton"
)
triton_stripe_flash_attn_varlen_kvpacked_func = varlen_kvpacked_func(
    "triton_stripe_flash_attn_varlen_kvpacked_func", __name__, "stripe", "triton"
)
triton_stripe_flash_attn_varlen_qkvpacked_func = varlen_qkvpacked_func(
    "triton_stripe_flash_attn_varlen_qkvpacked_func", __name__, "stripe", "triton"
)

triton_llama3_flash_attn_varlen_forward = gathered_forward_form(
    "triton_llama3_flash_attn_varlen_forward", __name__, "triton"
)
triton_llama3_flash_attn_varlen_backward = gathered_backward_form(
    "triton_llama3_flash_attn_varlen_backward", __name__, "triton"
)
triton_llama3_flash_attn_varlen_func = gathered_func(
    "triton_llama3_flash_attn_varlen_func", __name__, "triton"
)
triton_llama3_flash_attn_varlen_kvpacked_func = gathered_kvpacked_func(
    "triton_llama3_flash_attn_varlen_kvpacked_func", __name__, "triton"
)
triton_llama3_flash_attn_varlen_qkvpacked_func = gathered_qkvpacked_func(
    "triton_llama3_flash_attn_varlen_qkvpacked_func", __name__, "triton"
)


class TritonRingFlashAttnFunc(BatchFunction):
    """The autograd function of the Triton ring: `apply(q, k, v, dropout_p, ..., group)`."""

    layout = "contiguous"
    backend = "triton"


def triton_flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> tuple[Tensor, Tensor]:
    """Attend on one device, without a process group and outside autograd.

    Args:
        q: [B, L, H, D], float16, bfloat16 or float32.
        k, v: [B, Lk, Hk, D], Hk divides H. Where Lk differs from L a mask aligns the last rows,
            as flash-attn does.
        softmax_scale: factor on q k^T, > 0; 1 / sqrt(D) if None.
        causal: a query sees no later key.
        window_size: (left, right) in tokens, -1 for open.

    Returns:
        out [B, L, H, D] in q's dtype, lse [B, H, L] float32, natural log. A row that sees no key
        has out 0 and lse -inf.
    """
    return local_forward(
        q, k, v, "triton", softmax_scale=softmax_scale, causal=causal, window_size=window_size
    )


def triton_flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `triton_flash_attn_forward`.

    Args:
        dout: [B, L, H, D], gradient of out. out, softmax_lse: what the forward returned.
        q, k, v, softmax_scale, causal, window_size: what the forward was given.

    Returns:
        dq [B, L, H, D], dk, dv [B, Lk, Hk, D] in the dtypes of q, k, v.
    """
    return local_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        "triton",
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
    )
