"""The one-pass fold kernel against the fold written out in torch, which test_backends.py checks."""

import pytest
import torch

from ring_flash_attn.backends import fold as module
from ring_flash_attn.backends.fold import fold, fold_in_one_pass, put, put_in_one_pass

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("head_dim", [8, 40, 64])
@pytest.mark.parametrize("block_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("result_dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_one_pass_folds_as_torch_does(device, head_dim, block_dtype, result_dtype):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    # Row ranges of longer tensors, one of them half of a packed pair, as a ring passes them.
    out, lse = normal(2, 50, 3, head_dim), normal(2, 3, 50)
    block_out = normal(2, 50, 3, 2, head_dim)[:, 5:42, :, 1].to(block_dtype)
    block_lse = normal(2, 3, 37)
    mine = slice(9, 46)
    # Nothing seen before, by the block, by either.
    lse[:, :, 12:20], block_lse[:, :, 6:15] = -torch.inf, -torch.inf
    out[:, 12:20], block_out[:, 6:15] = 0, torch.nan
    want_out, want_lse = out.double(), lse.double()
    fold(want_out[:, mine], want_lse[:, :, mine], block_out.double(), block_lse.double())
    result = out if result_dtype is None else torch.full_like(out, torch.nan, dtype=result_dtype)
    before = result.clone()
    fold_in_one_pass(out[:, mine], lse[:, :, mine], block_out, block_lse, result[:, mine])
    rtol = 2**-8 if result_dtype == torch.bfloat16 else 1e-5
    got = result[:, mine].double()
    torch.testing.assert_close(got, want_out[:, mine], rtol=rtol, atol=1e-6)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-6)
    outside = torch.ones(50, dtype=torch.bool)
    outside[mine] = False
    assert torch.equal(result[:, outside].nan_to_num(), before[:, outside].nan_to_num())


@pytest.mark.parametrize("result_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("add", [False, True], ids=["store", "add"])
@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
def test_one_pass_puts_as_torch_does(device, some, add, result_dtype):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    state = normal(2, 50, 3, 40)
    share = normal(2, 37, 3, 2, 40)[:, :, :, 1].to(torch.bfloat16)
    mine = slice(9, 46)
    rows = None
    read = share.double()
    if some:
        # Of a packed step, rows of documents; what lies elsewhere may be anything.
        rows = torch.arange(37, device=device) % 3 > 0
        share[:, ~rows], read[:, ~rows] = torch.nan, 0
    want = (state[:, mine] if add else 0) + read
    plain = torch.full_like(want, torch.nan)
    put(state[:, mine].double() if add else None, share, plain, rows)
    torch.testing.assert_close(plain, want)
    result = state if result_dtype is None else torch.full_like(state, torch.nan).to(result_dtype)
    before = result.clone()
    put_in_one_pass(state[:, mine] if add else None, share, result[:, mine], rows)
    rtol = 2**-8 if result_dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(result[:, mine].double(), want.double(), rtol=rtol, atol=1e-7)
    outside = torch.ones(50, dtype=torch.bool)
    outside[mine] = False
    assert torch.equal(result[:, outside].nan_to_num(), before[:, outside].nan_to_num())


@pytest.mark.gpu
def test_a_float32_state_on_a_gpu_is_folded_in_one_pass(monkeypatch):
    called = []
    monkeypatch.setattr(module, "fold_in_one_pass", lambda *args: called.append(args))
    state, lse = torch.zeros(1, 4, 1, 8, device="cuda"), torch.zeros(1, 1, 4, device="cuda")
    fold(state, lse, state.clone(), lse.clone())
    assert called
