"""The forms of call over packed documents, each written once, as forms.py for batches.

A public module binds a form to a layout and a backend, one line a name. The signatures are
ring-flash-attn 0.1.8's.
"""

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from .agree import agreement
from .forms import COMPUTED, Result, name_form
from .function import RingAttention, run_backward, run_forward
from .packed_api import as_batch, packed_call
from .validate import check_bool, check_packed, check_same, check_tensor

_ROWS = {
    "contiguous": "of each document, rank r holds the r-th of P equal parts",
    "zigzag": (
        "of 2 P equal blocks of each document, rank r holds block r and block 2 P - 1 - r, which "
        "balances causal work; every local length is even"
    ),
    "stripe": "of each document, rank r holds positions r, r + P, r + 2 P, ...",
}
_FUNC_DOC = """Attend exactly within each of N packed documents, sharded across a group's ranks.

    Layout: {rows}. Computed by {computed}.

    Args:
        {tensors}
        cu_seqlens: [N + 1] int32, on q's device, equal on every rank: where each document's local
            rows begin, from 0, and where the last ones end. Rows past that are of no document.
        max_seqlen: at least the longest document's local rows.
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
        (out, lse, None), lse [H, T] natural log, float32, differentiable. Rows of no document have
        out 0, lse -inf and gradients 0.

    Raises:
        TypeError, ValueError: a bad argument. NotImplementedError: no backend runs it; the message
        lists every reason. All are raised before anything is sent. What cu_seqlens holds is
        checked on a group's first calls, with RING_FLASH_ATTN_CHECK=1, and on CPU tensors: reading
        it on a GPU would stall the host. Triton kernels never do; a native backend is called once
        a document, whose rows it learns by reading cu_seqlens on the host, once a call.

    Example:
        >>> cu_seqlens = torch.tensor([0, 48, 64], dtype=torch.int32, device=q.device)
        >>> out = {name}({example}, cu_seqlens, 48, causal=True)
    """
_QKV = """q: [T, H, D], float16, bfloat16 or float32, this rank's rows of all documents.
        k, v: [T, Hk, D], Hk divides H."""
_KV_PACKED = """q: [T, H, D], float16, bfloat16 or float32, this rank's rows of all documents.
        kv: [T, 2, Hk, D], k then v, Hk divides H."""
_QKV_PACKED = "qkv: [T, 3, H, D], float16, bfloat16 or float32: q, k, v of all documents."
_FORWARD_DOC = """Run the forward pass alone, outside autograd.

    Layout: {rows}. Computed by {computed}. Arguments as in `{func}`, with the group first.{halves}

    Returns:
        out [T, H, D] in q's dtype, lse [H, T] natural log, float32.
    """
_BACKWARD_DOC = """Run the backward pass alone, outside autograd.

    Layout: {rows}. Computed by {computed}. Arguments as in `{func}`, with the group first.{halves}

    Args:
        dout: [T, H, D], gradient of out. out, softmax_lse: what the forward returned.

    Returns:
        dq [T, H, D], dk, dv [T, Hk, D] in the dtypes of q, k, v.
    """
_HALVES = """

    half_index0 and half_index1 follow from cu_seqlens and are not read."""


def varlen_func(name: str, module: str, layout: str, backend: str):
    """Return the form (q, k, v, cu_seqlens, ...) under a public name."""

    def form(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
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
            cu_seqlens,
            max_seqlen,
            layout,
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

    return _named(form, name, module, layout, backend, _FUNC_DOC, tensors=_QKV, example="q, k, v")


def varlen_kvpacked_func(name: str, module: str, layout: str, backend: str):
    """Return the form (q, kv, cu_seqlens, ...) under a public name."""

    def form(
        q: Tensor,
        kv: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
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
            cu_seqlens,
            max_seqlen,
            layout,
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

    return _named(
        form, name, module, layout, backend, _FUNC_DOC, tensors=_KV_PACKED, example="q, kv"
    )


def varlen_qkvpacked_func(name: str, module: str, layout: str, backend: str):
    """Return the form (qkv, cu_seqlens, ...) under a public name."""

    def form(
        qkv: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
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
            cu_seqlens,
            max_seqlen,
            layout,
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

    return _named(
        form, name, module, layout, backend, _FUNC_DOC, tensors=_QKV_PACKED, example="qkv"
    )


def varlen_forward(name: str, module: str, layout: str, backend: str):
    """Return the bare forward under a public name."""

    def form(
        process_group: dist.ProcessGroup | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        softmax_scale: float | None,
        dropout_p: float = 0,
        causal: bool = True,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> tuple[Tensor, Tensor]:
        return _forward(
            process_group,
            q,
            k,
            v,
            cu_seqlens,
            max_seqlen,
            layout,
            backend,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            dropout_p=dropout_p,
            alibi_slopes=alibi_slopes,
            deterministic=deterministic,
        )

    return _named(form, name, module, layout, backend, _FORWARD_DOC, halves="")


def varlen_backward(name: str, module: str, layout: str, backend: str):
    """Return the bare backward under a public name."""

    def form(
        process_group: dist.ProcessGroup | None,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        softmax_scale: float | None,
        dropout_p: float = 0,
        causal: bool = True,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _backward(
            process_group,
            dout,
            q,
            k,
            v,
            out,
            softmax_lse,
            cu_seqlens,
            max_seqlen,
            layout,
            backend,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            dropout_p=dropout_p,
            alibi_slopes=alibi_slopes,
            deterministic=deterministic,
        )

    return _named(form, name, module, layout, backend, _BACKWARD_DOC, halves="")


def zigzag_varlen_forward(name: str, module: str, layout: str, backend: str):
    """Return the bare forward under a public name."""

    def form(
        process_group: dist.ProcessGroup | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        half_index0: Tensor | slice,
        half_index1: Tensor | slice,
        softmax_scale: float | None,
        dropout_p: float = 0,
        causal: bool = True,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> tuple[Tensor, Tensor]:
        return _forward(
            process_group,
            q,
            k,
            v,
            cu_seqlens,
            max_seqlen,
            layout,
            backend,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            dropout_p=dropout_p,
            alibi_slopes=alibi_slopes,
            deterministic=deterministic,
        )

    return _named(form, name, module, layout, backend, _FORWARD_DOC, halves=_HALVES)


def zigzag_varlen_backward(name: str, module: str, layout: str, backend: str):
    """Return the bare backward under a public name."""

    def form(
        process_group: dist.ProcessGroup | None,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        half_index0: Tensor | slice,
        half_index1: Tensor | slice,
        softmax_scale: float | None,
        dropout_p: float = 0,
        causal: bool = True,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _backward(
            process_group,
            dout,
            q,
            k,
            v,
            out,
            softmax_lse,
            cu_seqlens,
            max_seqlen,
            layout,
            backend,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            dropout_p=dropout_p,
            alibi_slopes=alibi_slopes,
            deterministic=deterministic,
        )

    return _named(form, name, module, layout, backend, _BACKWARD_DOC, halves=_HALVES)


class PackedFunction(RingAttention):
    """The autograd entry under upstream's class names, with upstream's order of arguments."""

    layout = "contiguous"
    backend = "native"

    @classmethod
    def apply(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
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
            cu_seqlens,
            max_seqlen,
            cls.layout,
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
    cu_seqlens: Tensor,
    max_seqlen: int,
    layout: str,
    backend: str,
    return_attn_probs: bool,
    group: dist.ProcessGroup | None,
    **options,
) -> Result:
    """Check, let the ranks agree, and run: what every form does once it has its arguments."""
    with agreement(group, own) as same:
        check_bool("return_attn_probs", return_attn_probs)
        packed = unpack()
        given = *as_batch(*packed), cu_seqlens, max_seqlen
        call = packed_call(*given, layout, backend, group, same, **options)
    out, lse = RingAttention.apply(*packed, call)
    return (out, lse, None) if return_attn_probs else out


def _forward(group, q, k, v, cu_seqlens, max_seqlen, layout, backend, **options):
    with agreement(group, q) as same:
        q, k, v = as_batch(q, k, v)
        call = packed_call(q, k, v, cu_seqlens, max_seqlen, layout, backend, group, same, **options)
    out, lse = run_forward(call, q, k, v)
    return out.squeeze(0), lse.squeeze(0)


def _backward(
    group, dout, q, k, v, out, softmax_lse, cu_seqlens, max_seqlen, layout, backend, **options
):
    with agreement(group, q) as same:
        q, k, v = as_batch(q, k, v)
        call = packed_call(q, k, v, cu_seqlens, max_seqlen, layout, backend, group, same, **options)
        check_packed_backward(dout, q, out, softmax_lse)
    dq, dk, dv = run_backward(call, dout[None], q, k, v, out[None], softmax_lse[None])
    return dq[0], dk[0], dv[0]


def check_packed_backward(dout: Tensor, q: Tensor, out: Tensor, softmax_lse: Tensor) -> None:
    """Raise unless dout, out fit q [1, T, H, D] without its batch, and softmax_lse is [H, T]."""
    check_same("dout", dout, q[0], "q")
    check_same("out", out, q[0], "q")
    check_same("softmax_lse", softmax_lse, q[0, ..., 0].T, "q as [H, T]")


def unpack_kv(q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_tensor("q", q, ("T", "H", "D"))
    check_packed("kv", kv, ("T", "2", "Hk", "D"), 2)
    k, v = kv.unbind(1)
    return q, k, v


def unpack_qkv(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_packed("qkv", qkv, ("T", "3", "H", "D"), 3)
    q, k, v = qkv.unbind(1)
    return q, k, v


def _named(
    form: Callable, name: str, module: str, layout: str, backend: str, doc: str, **words: str
):
    return name_form(
        form, name, module, doc, rows=_ROWS[layout], computed=COMPUTED[backend], **words
    )
