"""The forms of call that gather K, V by slices of heads (llama3), as packed_forms.py for rings."""

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from .agree import agreement
from .forms import COMPUTED, Result, name_form
from .function import RingAttention, run_backward, run_forward
from .packed_api import as_batch, gathered_call
from .packed_forms import check_packed_backward, unpack_kv, unpack_qkv
from .validate import check_bool

_FUNC_DOC = """Attend exactly within packed documents whose total is cut into P equal shards.

    Rank r holds rows [r T, (r + 1) T) of the packed total, wherever documents begin. K and V of all
    ranks are gathered, `heads_k_stride` key heads at a time, while the slice before is computed;
    dk and dv are summed over the ranks in float32. Computed by {computed}.

    Args:
        {tensors}
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, local_k_slice: what
            `llama3_flash_attn_prepare_cu_seqlens` returns for this rank.
        heads_k_stride: key heads gathered at a time; divides Hk. Memory grows with it.
        dropout_p: must be 0.
        softmax_scale: factor on q k^T, > 0; 1 / sqrt(D) if None.
        causal: a query sees no key of a later position in its document.
        window_size: (left, right) in tokens of position in the document, -1 for open.
        alibi_slopes: must be None.
        deterministic: gradients must be bitwise repeatable.
        return_attn_probs: also return lse.
        group: the ranks that hold the documents; None for the default group.

    Returns:
        out [T, H, D] in q's dtype, of this rank's rows; with `return_attn_probs` the tuple
        (out, lse, None), lse [H, T] natural log, float32, differentiable.

    Raises:
        TypeError, ValueError: a bad argument. NotImplementedError: no backend runs it; the message
        lists every reason. All are raised before anything is sent. What cu_seqlens_q and
        cu_seqlens_k hold is checked as cu_seqlens of `ring_flash_attn_varlen_func`.

    Example:
        >>> prepared = llama3_flash_attn_prepare_cu_seqlens(cu_seqlens, True, rank, world_size)
        >>> *documents, local_k_slice = prepared
        >>> out = {name}(
        ...     {example}, *documents, heads_k_stride=1, local_k_slice=local_k_slice, causal=True
        ... )
    """
_QKV = """q: [T, H, D], float16, bfloat16 or float32, this rank's rows.
        k, v: [T, Hk, D], Hk divides H."""
_KV_PACKED = """q: [T, H, D], float16, bfloat16 or float32, this rank's rows.
        kv: [T, 2, Hk, D], k then v, Hk divides H."""
_QKV_PACKED = "qkv: [T, 3, H, D], float16, bfloat16 or float32: q, k, v of this rank's rows."
_FORWARD_DOC = """Run the forward pass alone, outside autograd.

    Computed by {computed}. Arguments as in `{func}`, with the group first.

    Returns:
        out [T, H, D] in q's dtype, lse [H, T] natural log, float32.
    """
_BACKWARD_DOC = """Run the backward pass alone, outside autograd.

    Computed by {computed}. Arguments as in `{func}`, with the group first.

    Args:
        dout: [T, H, D], gradient of out. out, softmax_lse: what the forward returned.

    Returns:
        dq [T, H, D], dk, dv [T, Hk, D] in the dtypes of q, k, v.
    """


def gathered_func(name: str, module: str, backend: str):
    """Return the form (q, k, v, ...) under a public name."""

    def form(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        heads_k_stride: int,
        local_k_slice: slice,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> Result:
        return _run(
            q,
            lambda: (q, k, v),
            (
                cu_seqlens_q,
                cu_seqlens_k,
                max_seqlen_q,
                max_seqlen_k,
                heads_k_stride,
                local_k_slice,
            ),
            backend,
            return_attn_probs,
            group,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            dropout_p=dropout_p,
            alibi_slopes=alibi_slopes,
            deterministic=deterministic,
        )

    return _named(form, name, module, backend, _FUNC_DOC, tensors=_QKV, example="q, k, v")


def gathered_kvpacked_func(name: str, module: str, backend: str):
    """Return the form (q, kv, ...) under a public name."""

    def form(
        q: Tensor,
        kv: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        heads_k_stride: int,
        local_k_slice: slice,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> Result:
        return _run(
            q,
            lambda: unpack_kv(q, kv),
            (
                cu_seqlens_q,
                cu_seqlens_k,
                max_seqlen_q,
                max_seqlen_k,
                heads_k_stride,
                local_k_slice,
            ),
            backend,
            return_attn_probs,
            group,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            dropout_p=dropout_p,
            alibi_slopes=alibi_slopes,
            deterministic=deterministic,
        )

    return _named(form, name, module, backend, _FUNC_DOC, tensors=_KV_PACKED, example="q, kv")


def gathered_qkvpacked_func(name: str, module: str, backend: str):
    """Return the form (qkv, ...) under a public name."""

    def form(
        qkv: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        heads_k_stride: int,
        local_k_slice: slice,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> Result:
        return _run(
            qkv,
            lambda: unpack_qkv(qkv),
            (
                cu_seqlens_q,
                cu_seqlens_k,
                max_seqlen_q,
                max_seqlen_k,
                heads_k_stride,
                local_k_slice,
            ),
            backend,
            return_attn_probs,
            group,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            dropout_p=dropout_p,
            alibi_slopes=alibi_slopes,
            deterministic=deterministic,
        )

    return _named(form, name, module, backend, _FUNC_DOC, tensors=_QKV_PACKED, example="qkv")


def gathered_forward_form(name: str, module: str, backend: str):
    """Return the bare forward under a public name."""

    def form(
        process_group: dist.ProcessGroup | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        heads_k_stride: int,
        local_k_slice: slice,
        softmax_scale: float | None,
        dropout_p: float = 0,
        causal: bool = True,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> tuple[Tensor, Tensor]:
        with agreement(process_group, q) as same:
            q, k, v = as_batch(q, k, v)
            call = gathered_call(
                q,
                k,
                v,
                cu_seqlens_q,
                cu_seqlens_k,
                max_seqlen_q,
                max_seqlen_k,
                heads_k_stride,
                local_k_slice,
                backend,
                process_group,
                same,
                softmax_scale=softmax_scale,
                causal=causal,
                window_size=window_size,
                dropout_p=dropout_p,
                alibi_slopes=alibi_slopes,
                deterministic=deterministic,
            )
        out, lse = run_forward(call, q, k, v)
        return out.squeeze(0), lse.squeeze(0)

    return _named(form, name, module, backend, _FORWARD_DOC)


def gathered_backward_form(name: str, module: str, backend: str):
    """Return the bare backward under a public name."""

    def form(
        process_group: dist.ProcessGroup | None,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        heads_k_stride: int,
        local_k_slice: slice,
        softmax_scale: float | None,
        dropout_p: float = 0,
        causal: bool = True,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with agreement(process_group, q) as same:
            q, k, v = as_batch(q, k, v)
            call = gathered_call(
                q,
                k,
                v,
                cu_seqlens_q,
                cu_seqlens_k,
                max_seqlen_q,
                max_seqlen_k,
                heads_k_stride,
                local_k_slice,
                backend,
                process_group,
                same,
                softmax_scale=softmax_scale,
                causal=causal,
                window_size=window_size,
                dropout_p=dropout_p,
                alibi_slopes=alibi_slopes,
                deterministic=deterministic,
            )
            check_packed_backward(dout, q, out, softmax_lse)
        dq, dk, dv = run_backward(call, dout[None], q, k, v, out[None], softmax_lse[None])
        return dq[0], dk[0], dv[0]

    return _named(form, name, module, backend, _BACKWARD_DOC)


class GatheredFunction(RingAttention):
    """The autograd entry under upstream's class name, with upstream's order of arguments."""

    backend = "native"

    @classmethod
    def apply(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        heads_k_stride: int,
        local_k_slice: slice,
        dropout_p: float,
        softmax_scale: float | None,
        causal: bool,
        window_size: tuple[int, int],
        alibi_slopes: Tensor | None,
        deterministic: bool,
        return_softmax: bool,
        group: dist.ProcessGroup | None,
    ) -> Result:
        """Run the forward; (out, lse, None) with `return_softmax`, else out."""
        return _run(
            q,
            lambda: (q, k, v),
            (
                cu_seqlens_q,
                cu_seqlens_k,
                max_seqlen_q,
                max_seqlen_k,
                heads_k_stride,
                local_k_slice,
            ),
            cls.backend,
            return_softmax,
            group,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            dropout_p=dropout_p,
            alibi_slopes=alibi_slopes,
            deterministic=deterministic,
        )


def _run(
    own: Tensor,
    unpack: Callable[[], tuple[Tensor, Tensor, Tensor]],
    prepared: tuple[Tensor, Tensor, int, int, int, slice],
    backend: str,
    return_attn_probs: bool,
    group: dist.ProcessGroup | None,
    **options,
) -> Result:
    """Check, let the ranks agree, and run: what every form does once it has its arguments."""
    with agreement(group, own) as same:
        check_bool("return_attn_probs", return_attn_probs)
        packed = unpack()
        call = gathered_call(*as_batch(*packed), *prepared, backend, group, same, **options)
    out, lse = RingAttention.apply(*packed, call)
    return (out, lse, None) if return_attn_probs else out


def _named(form: Callable, name: str, module: str, backend: str, doc: str, **words: str):
    return name_form(form, name, module, doc, computed=COMPUTED[backend], **words)
