"""The forms of call, each written once: signature and docstring of every public name.

A public module binds a form to a layout and a backend, one line a name:

    ring_flash_attn_func = func("ring_flash_attn_func", __name__, "contiguous", "native")

The signatures are ring-flash-attn 0.1.8's.
"""

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from .agree import agreement
from .api import ring_call
from .function import RingAttention, run_backward, run_forward
from .validate import check_backward, check_bool, check_packed, check_tensor

Result = Tensor | tuple[Tensor, Tensor, None]

_ROWS = {
    "contiguous": "rank r holds rows [r L, (r + 1) L) of the global sequence",
    "zigzag": (
        "of 2 P equal blocks of the global sequence rank r holds block r and block 2 P - 1 - r, "
        "which balances causal work; L is even"
    ),
    "stripe": "rank r holds positions r, r + P, r + 2 P, ... of the global sequence",
}
COMPUTED = {
    "native": (
        "flash-attn 3 or 2 where installed, else torch's own flash attention; on CPU tensors that "
        "it refuses, dense torch"
    ),
    "triton": "this library's Triton kernels, with float32 state from hop to hop",
}
_FUNC_DOC = """Attend exactly over a sequence sharded across the ranks of `group`.

    Layout: {rows}. Computed by {computed}.

    Args:
        {tensors}
        dropout_p: must be 0.
        softmax_scale: factor on q k^T, > 0; 1 / sqrt(D) if None.
        causal: a query sees no key of a later global position.
        window_size: (left, right) in tokens of global position, -1 for open.
        alibi_slopes: must be None.
        deterministic: gradients must be bitwise repeatable.
        return_attn_probs: also return lse.
        group: the ranks that hold the sequence; None for the default group.

    Returns:
        out [B, L, H, D] in q's dtype, of this rank's rows; with `return_attn_probs` the tuple
        (out, lse, None), lse [B, H, L] natural log, float32, differentiable.

    Raises:
        TypeError, ValueError: a bad argument. NotImplementedError: no backend runs it; the
        message lists every reason. All are raised before anything is sent.

    Example:
        >>> torch.distributed.init_process_group()  # under torchrun
        >>> out = {name}({example}, causal=True)
    """
_QKV = """q: [B, L, H, D], float16, bfloat16 or float32, this rank's rows.
        k, v: [B, L, Hk, D], Hk divides H; a length of their own if nothing is masked."""
_KV_PACKED = """q: [B, L, H, D], float16, bfloat16 or float32, this rank's rows.
        kv: [B, L, 2, Hk, D], k then v, Hk divides H."""
_QKV_PACKED = "qkv: [B, L, 3, H, D], float16, bfloat16 or float32: q, k, v of this rank's rows."
_FORWARD_DOC = """Run the forward pass alone, outside autograd.

    Layout: {rows}. Computed by {computed}. Arguments as in `{func}`, with the group first.

    Returns:
        out [B, L, H, D] in q's dtype, lse [B, H, L] natural log, float32.
    """
_BACKWARD_DOC = """Run the backward pass alone, outside autograd.

    Layout: {rows}. Computed by {computed}. Arguments as in `{func}`, with the group first.

    Args:
        dout: [B, L, H, D], gradient of out. out, softmax_lse: what the forward returned.

    Returns:
        dq [B, L, H, D], dk, dv [B, L, Hk, D] in the dtypes of q, k, v.
    """


def func(name: str, module: str, layout: str, backend: str):
    """Return the form (q, k, v, ...) under a public name."""

    def form(
        q: Tensor,
        k: Tensor,
        v: Tensor,
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


def kvpacked_func(name: str, module: str, layout: str, backend: str):
    """Return the form (q, kv, ...) under a public name."""

    def form(
        q: Tensor,
        kv: Tensor,
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
            lambda: _unpack_kv(q, kv),
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


def qkvpacked_func(name: str, module: str, layout: str, backend: str):
    """Return the form (qkv, ...) under a public name."""

    def form(
        qkv: Tensor,
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
            lambda: _unpack_qkv(qkv),
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


def forward(name: str, module: str, layout: str, backend: str):
    """Return the bare forward under a public name."""

    def form(
        process_group: dist.ProcessGroup | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float | None,
        dropout_p: float = 0,
        causal: bool = True,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> tuple[Tensor, Tensor]:
        with agreement(process_group, q) as same:
            call = ring_call(
                q,
                k,
                v,
                layout,
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
        return run_forward(call, q, k, v)

    return _named(form, name, module, layout, backend, _FORWARD_DOC)


def backward(name: str, module: str, layout: str, backend: str):
    """Return the bare backward under a public name."""

    def form(
        process_group: dist.ProcessGroup | None,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        softmax_scale: float | None,
        dropout_p: float = 0,
        causal: bool = True,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with agreement(process_group, q) as same:
            call = ring_call(
                q,
                k,
                v,
                layout,
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
            check_backward(dout, q, out, softmax_lse)
        return run_backward(call, dout, q, k, v, out, softmax_lse)

    return _named(form, name, module, layout, backend, _BACKWARD_DOC)


class BatchFunction(RingAttention):
    """The autograd entry under upstream's class names, with upstream's order of arguments."""

    layout = "contiguous"
    backend = "native"

    @classmethod
    def apply(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
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
    layout: str,
    backend: str,
    return_attn_probs: bool,
    group: dist.ProcessGroup | None,
    **options,
) -> Result:
    """Check, let the ranks agree, and run: what every form does once it has its arguments."""
    with agreement(group, own) as same:
        check_bool("return_attn_probs", return_attn_probs)
        q, k, v = unpack()
        call = ring_call(q, k, v, layout, backend, group, same, **options)
    out, lse = RingAttention.apply(q, k, v, call)
    return (out, lse, None) if return_attn_probs else out


def _unpack_kv(q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_tensor("q", q, ("B", "L", "H", "D"))
    check_packed("kv", kv, ("B", "L", "2", "Hk", "D"), 2)
    k, v = kv.unbind(2)
    return q, k, v


def _unpack_qkv(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_packed("qkv", qkv, ("B", "L", "3", "H", "D"), 3)
    q, k, v = qkv.unbind(2)
    return q, k, v


def _named(
    form: Callable, name: str, module: str, layout: str, backend: str, doc: str, **words: str
):
    return name_form(
        form, name, module, doc, rows=_ROWS[layout], computed=COMPUTED[backend], **words
    )


def name_form(form: Callable, name: str, module: str, doc: str, **words: str):
    """Give a form its public name, so that help(), inspect.signature and pickle find it."""
    stem = name.removesuffix("_forward").removesuffix("_backward")
    form.__name__ = form.__qualname__ = name
    form.__module__ = module
    form.__doc__ = doc.format(name=name, func=f"{stem}_func", **words)
    return form
