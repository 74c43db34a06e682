"""Attention over packed documents that gathers K, V by slices of heads, on native backends."""

from .core.gather_forms import (
    GatheredFunction,
    gathered_backward_form,
    gathered_forward_form,
    gathered_func,
    gathered_kvpacked_func,
    gathered_qkvpacked_func,
)
from .core.gather_layout import llama3_flash_attn_prepare_cu_seqlens

__all__ = [
    "Llama3FlashAttnVarlenFunc",
    "llama3_flash_attn_prepare_cu_seqlens",
    "llama3_flash_attn_varlen_backward",
    "llama3_flash_attn_varlen_forward",
    "llama3_flash_attn_varlen_func",
    "llama3_flash_attn_varlen_kvpacked_func",
    "llama3_flash_attn_varlen_qkvpacked_func",
]

llama3_flash_attn_varlen_forward = gathered_forward_form(
    "llama3_flash_attn_varlen_forward", __name__, "native"
)
llama3_flash_attn_varlen_backward = gathered_backward_form(
    "llama3_flash_attn_varlen_backward", __name__, "native"
)
llama3_flash_attn_varlen_func = gathered_func("llama3_flash_attn_varlen_func", __name__, "native")
llama3_flash_attn_varlen_kvpacked_func = gathered_kvpacked_func(
    "llama3_flash_attn_varlen_kvpacked_func", __name__, "native"
)
llama3_flash_attn_varlen_qkvpacked_func = gathered_qkvpacked_func(
    "llama3_flash_attn_varlen_qkvpacked_func", __name__, "native"
)


class Llama3FlashAttnVarlenFunc(GatheredFunction):
    """Upstream's autograd class: `apply(q, k, v, cu_seqlens_q, ..., dropout_p, ..., group)`."""

    backend = "native"
