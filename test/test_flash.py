"""The flash-attn backends over fakes that record each version's signature, on the CPU.

A fake computes dense attention with its version's own reading of the window arguments, so a wrong
window, a wrong order of arguments or an output taken from the wrong place shows as a wrong result.
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import oracle
from ring_flash_attn.backends import flash, select_backend
from ring_flash_attn.backends.flash import Flash2Backend, Flash3Backend, Flash4Backend
from simulated_ring import MASKS, Shape, attention_of, check_exact, inputs, mask_id, ring, truth

CALLS: list[dict] = []


def seen(q, k, causal, left, right):
    """flash-attn aligns the last query with the last key; a negative side is open."""
    n, m = q.shape[1], k.shape[1]
    return oracle.visible(
        list(range(m - n, m)), list(range(m)), causal, (max(left, -1), max(right, -1))
    )


def forward(q, k, v, scale, causal, left, right):
    CALLS.append({"causal": causal, "window": (left, right), "rows": q.shape[1]})
    return oracle.attention(q, k, v, seen(q, k, causal, left, right), scale)


def backward(dout, q, k, v, out, lse, scale, causal, left, right):
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


def flash2_sides(q, k, window):
    """FlashAttention-2 takes a side of at least the number of keys for an open one."""
    left, right = (-1 if side >= k.shape[1] else side for side in window)
    if left >= 0 and right < 0:
        right = k.shape[1]
    return left, right


def flash_2_6() -> ModuleType:
    """2.1 to 2.6: the window as a pair, eight outputs, plain functions."""
    module = ModuleType("flash_attn.flash_attn_interface")

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size, alibi_slopes, return_softmax
    ):
        assert (dropout_p, alibi_slopes, return_softmax) == (0.0, None, False)
        out, lse = forward(q, k, v, softmax_scale, causal, *flash2_sides(q, k, window_size))
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
        window = flash2_sides(q, k, window_size)
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

    module._flash_attn_forward = CustomOp(_flash_attn_forward)
    module._flash_attn_backward = CustomOp(_flash_attn_backward)
    return module


def flash_3() -> SimpleNamespace:
    """torch.ops.flash_attn_3, of which only the arguments that we pass are spelled out."""

    def fwd(
        q,
        k,
        v,
        *,
        softmax_scale=None,
        is_causal=False,
        window_size_left=-1,
        window_size_right=-1,
        num_splits=0,
    ):
        assert num_splits == 1
        window = (window_size_left, window_size_right)
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
        softmax_scale=None,
        is_causal=False,
        window_size_left=-1,
        window_size_right=-1,
        deterministic=False,
    ):
        window = (window_size_left, window_size_right)
        grads = backward(dout, q, k, v, out, softmax_lse, softmax_scale, is_causal, *window)
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


VERSIONS = {
    "2.6": (Flash2Backend, flash_2_6),
    "2.8": (Flash2Backend, flash_2_8),
    "3": (Flash3Backend, flash_3),
    "4": (Flash4Backend, flash_4),
}


@pytest.fixture(params=VERSIONS)
def backend(request, monkeypatch):
    backend, fake = VERSIONS[request.param]
    if backend is Flash3Backend:
        monkeypatch.setattr(torch.ops, "flash_attn_3", fake(), raising=False)
        module = ModuleType("flash_attn_3._C")
    else:
        module = fake()
    monkeypatch.setattr(flash, "load", lambda name: module)
    CALLS.clear()
    return backend()


@pytest.mark.parametrize("mask", MASKS, ids=mask_id)
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_every_version_in_every_layout(backend, layout, mask):
    for size in (1, 3):
        given = inputs(Shape(12 * size, 12 * size, heads=4, key_heads=2))
        want, _ = truth(mask, given)
        check_exact(ring(backend, attention_of(mask), layout, size, given), want)
    assert CALLS


def test_plain_causal_is_asked_for_as_causal(backend):
    ring(backend, attention_of((True, (-1, -1))), "contiguous", 2, inputs(Shape(8, 8)))
    assert [call["causal"] for call in CALLS if call["rows"] == 4].count(True) >= 2


def reasons(backend, **changes):
    q = torch.zeros(1, 4, 2, changes.get("head_dim", 16), dtype=changes.get("dtype"))
    v = q[..., : changes.get("width", q.shape[-1])]
    return backend.unsupported(attention_of(MASKS[0]), q, q, v)


@pytest.mark.parametrize("backend_class", [Flash2Backend, Flash3Backend, Flash4Backend])
def test_unsupported_gives_every_reason(backend_class, monkeypatch):
    monkeypatch.setattr(flash, "load", lambda name: f"{name} is not installed")
    found = reasons(backend_class(), dtype=torch.float32, head_dim=260, width=16)
    for text in ("runs on cuda, got cpu", "got torch.float32", "got 260", "v must be", "install"):
        assert any(text in reason for reason in found), (text, found)


def test_a_stand_in_is_refused(monkeypatch):
    stand_in = ModuleType("flash_attn_pretender")
    stand_in.IS_STAND_IN = True
    stand_in.__spec__ = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "flash_attn_pretender", stand_in)
    flash.load.cache_clear()
    assert flash.load("flash_attn_pretender") == (
        "flash_attn_pretender is a stand-in that ignores windows"
    )


def test_what_is_not_installed_says_so():
    assert flash.load("no_such_flash.interface") == "no_such_flash is not installed"
    assert "json" in flash.load("json").__name__


def test_select_lists_the_reasons_of_every_native_backend(monkeypatch):
    q = torch.zeros(1, 4, 2, 16, dtype=torch.int32)
    with pytest.raises(NotImplementedError) as caught:
        select_backend("native", attention_of(MASKS[0]), q, q, q)
    for name in ("flash3: ", "flash2: ", "aten: ", "reference: "):
        assert name in str(caught.value)
