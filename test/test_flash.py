"""The flash-attn backends over fakes that record each version's signature, on the CPU."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import oracle
from flash_fakes import CALLS, VERSIONS, install
from ring_flash_attn.backends import flash, select_backend
from ring_flash_attn.backends.flash import Flash2Backend, Flash3Backend, Flash4Backend
from simulated_ring import MASKS, Shape, attention_of, check_exact, inputs, mask_id, ring, truth


@pytest.fixture(params=VERSIONS)
def backend(request, monkeypatch):
    return install(request.param, monkeypatch)


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
