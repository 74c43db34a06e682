"""Stand-ins that record the signatures of flash-attn's versions, and compute densely on the CPU.

A fake computes dense attention with its version's own reading of the window arguments, so a wrong
window, a wrong order of arguments or an output taken from the wrong place shows as a wrong result.
"""

from itertools import pairwise
from types import ModuleType, SimpleNamespace

import torch

import oracle
from ring_flash_attn.backends import flash
from ring_flash_attn.backends.aten import AtenBackend
from ring_flash_attn.backends.flash import Flash2Backend, Flash3Backend, Flash4Backend

CALLS: list[dict] = []


def seen(q, k, causal, left, right):
    """flash-attn aligns the last query with the last key; a negative side is open."""
    n, m = q.shape[1], k.shape[1]
    return oracle.visible(
        list(range(m - n, m)), list(range(m)), causal, (max(left, -1), max(right, -1))
    )


def note(which, rows, causal, left, right):
    CALLS.append({"pass": which, "rows": rows, "causal": causal, "window": (left, right)})


def forward(q, k, v, scale, causal, left, right):
    note("forward", q.shape[1], causal, left, right)
    return oracle.attention(q, k, v, seen(q, k, causal, left, right), scale)


def backward(dout, q, k, v, out, lse, scale, causal, left, right):
    note("backward", q.shape[1], causal, left, right)
    return gradients(dout, q, k, v, out, lse, scale, causal, left, right)


def gradients(dout, q, k, v, out, lse, scale, causal, left, right):
    """Written out, from the final out and lse that were given, as the kernels do."""
    group = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(group, 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, keys) * scale
    mask = seen(q, k, causal, left, right)
    p = torch.exp(scores - lse.unsqueeze(-1)).masked_fill(~mask, 0.0)
    dp = torch.einsum("bihd,bjhd->bhij", dout, values)
    ds = p * (dp - (dout * out).sum(-1).transpose(1, 2).unsqueeze(-1)) * scale
    dq = torch.einsum("bhij,bjhd->bihd", ds, keys)
    dk, dv = torch.einsum("bhij,bihd->bjhd", ds, q), torch.einsum("bhij,bihd->bjhd", p, dout)
    return dq, *(x.unflatten(2, (k.shape[2], group)).sum(3) for x in (dk, dv))


def sequences(cu_q, cu_k, max_q, max_k, q, k):
    """Yield the rows of q and of k of every sequence that has both.

    The others' results, and rows behind the last sequence, stay NaN here, as torch.empty left them.
    """
    for cu, rows in ((cu_q, len(q)), (cu_k, len(k))):
        assert cu.dtype == torch.int32 and cu.is_contiguous() and cu[0] == 0 and cu[-1] <= rows
        assert cu.diff().min() >= 0
    assert len(cu_q) == len(cu_k)
    for (begin, end), (k_begin, k_end) in zip(
        pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True
    ):
        assert end - begin <= max_q and k_end - k_begin <= max_k
        if begin < end and k_begin < k_end:
            yield slice(begin, end), slice(k_begin, k_end)


def varlen_forward(q, k, v, cu_seqlens, scale, causal, window, nothing_seen):
    """`forward` in every sequence of packed rows: out [T, H, D], lse [H, T]."""
    note("forward", len(q), causal, *window)
    out, lse = torch.full_like(q, torch.nan), torch.full_like(q[..., 0].T, torch.nan)
    for rows, keys in sequences(*cu_seqlens, q, k):
        own = q[None, rows], k[None, keys], v[None, keys]
        own_out, own_lse = oracle.attention(*own, seen(*own[:2], causal, *window), scale)
        out[rows], lse[:, rows] = own_out[0], own_lse[0]
    return out, lse.masked_fill(lse == -torch.inf, nothing_seen)


def varlen_backward(dout, q, k, v, out, lse, cu_seqlens, scale, causal, window):
    note("backward", len(q), causal, *window)
    grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    for rows, keys in sequences(*cu_seqlens, q, k):
        own = dout[None, rows], q[None, rows], k[None, keys], v[None, keys], out[None, rows]
        own_grads = gradients(*own, lse[None, :, rows], scale, causal, *window)
        for target, grad, where in zip(grads, own_grads, (rows, keys, keys), strict=True):
            target[where] = grad[0]
    return grads


def flash2_sides(keys, window):
    """FlashAttention-2 takes a side of at least the number of keys for an open one."""
    left, right = (-1 if side >= keys else side for side in window)
    if left >= 0 and right < 0:
        right = keys
    return left, right


def flash_2_6() -> ModuleType:
    """2.1 to 2.6: the window as a pair, eight outputs, plain functions. Packed: as in 2.6.3."""
    module = ModuleType("flash_attn.flash_attn_interface")

    def _flash_attn_varlen_forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        return_softmax=False,
        block_table=None,
        leftpad_k=None,
        seqused_k=None,
    ):
        assert (dropout_p, softcap, alibi_slopes, return_softmax) == (0.0, 0.0, None, False)
        assert (block_table, leftpad_k, seqused_k) == (None, None, None)
        assert max_seqlen_q > 1, "then it swaps heads and rows, for one row a sequence"
        cu_seqlens = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        window = flash2_sides(max_seqlen_k, window_size)
        out, lse = varlen_forward(
            q, k, v, cu_seqlens, softmax_scale, causal, window, nothing_seen=torch.inf
        )
        return out, q, k, v, out, lse, None, None

    def _flash_attn_varlen_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        rng_state=None,
    ):
        assert (dropout_p, softcap, alibi_slopes, deterministic) == (0.0, 0.0, None, False)
        cu_seqlens = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        window = flash2_sides(max_seqlen_k, window_size)
        given = dout, q, k, v, out, softmax_lse, cu_seqlens, softmax_scale, causal, window
        for target, grad in zip((dq, dk, dv), varlen_backward(*given), strict=True):
            target.copy_(grad)

    module._flash_attn_varlen_forward = _flash_attn_varlen_forward
    module._flash_attn_varlen_backward = _flash_attn_varlen_backward

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size, alibi_slopes, return_softmax
    ):
        assert (dropout_p, alibi_slopes, return_softmax) == (0.0, None, False)
        out, lse = forward(q, k, v, softmax_scale, causal, *flash2_sides(k.shape[1], window_size))
        return out, q, k, v, out, lse, None, None

    def _flash_attn_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        alibi_slopes,
        deterministic,
        rng_state=None,
    ):
        assert (dropout_p, alibi_slopes, deterministic) == (0.0, None, False)
        window = flash2_sides(k.shape[1], window_size)
        grads = backward(dout, q, k, v, out, softmax_lse, softmax_scale, causal, *window)
        for target, grad in zip((dq, dk, dv), grads, strict=True):
            target.copy_(grad)

    module._flash_attn_forward = _flash_attn_forward
    module._flash_attn_backward = _flash_attn_backward
    return module


class CustomOp:
    """Like torch's CustomOpDef: callable, its signature only on `_init_fn`."""

    def __init__(self, function):
        self._init_fn = function

    def __call__(self, *args, **kwargs):
        return self._init_fn(*args, **kwargs)


def flash_2_8() -> ModuleType:
    """2.7 and 2.8: the window as two ints, softcap, four outputs, custom ops."""
    module, old = ModuleType("flash_attn.flash_attn_interface"), flash_2_6()

    def _flash_attn_forward(
        q,
        k,
        v,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes,
        return_softmax: bool,
    ):
        assert softcap == 0.0
        window = (window_size_left, window_size_right)
        outputs = old._flash_attn_forward(
            q, k, v, dropout_p, softmax_scale, causal, window, alibi_slopes, return_softmax
        )
        return outputs[0], outputs[5], None, None

    def _flash_attn_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes,
        deterministic: bool,
        rng_state=None,
    ):
        assert softcap == 0.0
        grads = (dout, q, k, v, out, softmax_lse, dq, dk, dv)
        window = (window_size_left, window_size_right)
        old._flash_attn_backward(
            *grads, dropout_p, softmax_scale, causal, window, alibi_slopes, deterministic
        )

    # Packed: Dao-AILab/flash-attention at 0053002 (2.7).
    def _flash_attn_varlen_forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int = -1,
        window_size_right: int = -1,
        softcap: float = 0.0,
        alibi_slopes=None,
        return_softmax: bool = False,
        block_table=None,
        leftpad_k=None,
        seqused_k=None,
    ):
        cu_seqlens = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        window = (window_size_left, window_size_right)
        options = dropout_p, softmax_scale, causal, window, softcap, alibi_slopes, return_softmax
        rest = block_table, leftpad_k, seqused_k
        outputs = old._flash_attn_varlen_forward(q, k, v, *cu_seqlens, *options, *rest)
        return outputs[0], outputs[5], None, None

    def _flash_attn_varlen_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes,
        deterministic: bool,
        rng_state=None,
    ):
        cu_seqlens = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        grads = (dout, q, k, v, out, softmax_lse, dq, dk, dv)
        window = (window_size_left, window_size_right)
        options = dropout_p, softmax_scale, causal, window, softcap, alibi_slopes, deterministic
        old._flash_attn_varlen_backward(*grads, *cu_seqlens, *options)

    module._flash_attn_varlen_forward = CustomOp(_flash_attn_varlen_forward)
    module._flash_attn_varlen_backward = CustomOp(_flash_attn_varlen_backward)
    module._flash_attn_forward = CustomOp(_flash_attn_forward)
    module._flash_attn_backward = CustomOp(_flash_attn_backward)
    return module


def flash3_sides(queries, keys, window):
    """FlashAttention-3 takes a side that reaches over the longest sequence for an open one."""
    left, right = window
    return -1 if left >= keys - 1 else left, -1 if right >= queries - 1 else right


def flash_3() -> SimpleNamespace:
    """torch.ops.flash_attn_3, of which only the arguments that we pass are spelled out.

    Names and defaults as in hopper/flash_api.cpp's TORCH_LIBRARY (3.0).
    """

    def fwd(
        q,
        k,
        v,
        *,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        softmax_scale=None,
        is_causal=False,
        window_size_left=-1,
        window_size_right=-1,
        num_splits=0,
    ):
        assert num_splits == 1
        window = (window_size_left, window_size_right)
        if cu_seqlens_q is not None:
            cu_seqlens = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
            window = flash3_sides(max_seqlen_q, max_seqlen_k, window)
            given = q, k, v, cu_seqlens, softmax_scale, is_causal, window
            return *varlen_forward(*given, nothing_seen=-torch.inf), None, None
        return *forward(q, k, v, softmax_scale, is_causal, *window), None, None

    def bwd(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq=None,
        dk=None,
        dv=None,
        *,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        softmax_scale=None,
        is_causal=False,
        window_size_left=-1,
        window_size_right=-1,
        deterministic=False,
    ):
        window = (window_size_left, window_size_right)
        given = dout, q, k, v, out, softmax_lse
        if cu_seqlens_q is None:
            grads = backward(*given, softmax_scale, is_causal, *window)
        else:
            assert not deterministic
            cu_seqlens = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
            window = flash3_sides(max_seqlen_q, max_seqlen_k, window)
            grads = varlen_backward(*given, cu_seqlens, softmax_scale, is_causal, window)
        for target, grad in zip((dq, dk, dv), grads, strict=True):
            target.copy_(grad)
        return (softmax_lse,)

    return SimpleNamespace(fwd=fwd, bwd=bwd)


def flash_4() -> ModuleType:
    module = ModuleType("flash_attn.cute.interface")

    def sides(left, right):
        return -1 if left is None else left, -1 if right is None else right

    def _flash_attn_fwd(
        q,
        k,
        v,
        softmax_scale=None,
        causal=False,
        window_size_left=None,
        window_size_right=None,
        return_lse=False,
    ):
        assert return_lse
        window = sides(window_size_left, window_size_right)
        return *forward(q, k, v, softmax_scale, causal, *window), None, None, None

    def _flash_attn_bwd(
        q,
        k,
        v,
        out,
        dout,
        lse,
        softmax_scale=None,
        causal=False,
        softcap=0.0,
        window_size_left=None,
        window_size_right=None,
        deterministic=False,
    ):
        window = sides(window_size_left, window_size_right)
        return backward(dout, q, k, v, out, lse, softmax_scale, causal, *window)

    module._flash_attn_fwd, module._flash_attn_bwd = _flash_attn_fwd, _flash_attn_bwd
    return module


def aten() -> tuple:
    """torch's two ops on CUDA, as in 2.13, with FlashAttention-2 inside."""

    def _flash_attention_forward(
        query,
        key,
        value,
        cum_seq_q,
        cum_seq_k,
        max_q,
        max_k,
        dropout_p,
        is_causal,
        return_debug_mask,
        *,
        scale=None,
        window_size_left=None,
        window_size_right=None,
    ):
        assert (dropout_p, return_debug_mask) == (0.0, False)
        assert max_q > 1, "then it swaps heads and rows, for one row a sequence"
        window = flash2_sides(max_k, (window_size_left, window_size_right))
        cu_seqlens = cum_seq_q, cum_seq_k, max_q, max_k
        given = query, key, value, cu_seqlens, scale, is_causal, window
        return *varlen_forward(*given, nothing_seen=torch.inf), None, None, None

    def _flash_attention_backward(
        grad_out,
        query,
        key,
        value,
        out,
        logsumexp,
        cum_seq_q,
        cum_seq_k,
        max_q,
        max_k,
        dropout_p,
        is_causal,
        rng_state,
        unused,
        *,
        scale=None,
        window_size_left=None,
        window_size_right=None,
    ):
        assert dropout_p == 0.0
        window = flash2_sides(max_k, (window_size_left, window_size_right))
        given = grad_out, query, key, value, out, logsumexp
        cu_seqlens = cum_seq_q, cum_seq_k, max_q, max_k
        return varlen_backward(*given, cu_seqlens, scale, is_causal, window)

    return _flash_attention_forward, _flash_attention_backward


VERSIONS = {
    "2.6": (Flash2Backend, flash_2_6),
    "2.8": (Flash2Backend, flash_2_8),
    "3": (Flash3Backend, flash_3),
    "4": (Flash4Backend, flash_4),
}


def install(version: str, monkeypatch):
    """Return the backend of a version, over its fake."""
    CALLS.clear()
    if version == "aten":
        for op in aten():
            monkeypatch.setattr(torch.ops.aten, op.__name__, op)
        return AtenBackend()
    backend, fake = VERSIONS[version]
    if backend is Flash3Backend:
        monkeypatch.setattr(torch.ops, "flash_attn_3", fake(), raising=False)
        module = ModuleType("flash_attn_3._C")
    else:
        module = fake()
    monkeypatch.setattr(flash, "load", lambda name: module)
    return backend()
