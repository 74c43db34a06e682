"""Packing and padding an lse, in torch and in Triton, against loops over documents."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ring_flash_attn import triton_utils, utils
from upstream_signatures import FUNCTIONS

pytestmark = pytest.mark.kernel

HEADS = 3
# Beside a block of rows: below, equal, above, several.
CASES = [[5], [128], [129, 1], [7, 0, 300, 13], [0, 0, 4, 0], [0]]
VERSIONS = pytest.mark.parametrize("version", [utils, triton_utils], ids=["torch", "triton"])


def example(lengths, extra, device, dtype=torch.float32):
    """Return (packed [T, H], padded [N, H, max_seqlen], cu_seqlens, max_seqlen)."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(sum(lengths), HEADS, generator=generator)
    packed[::5] = -torch.inf
    max_seqlen = max(lengths) + extra
    padded = torch.zeros(len(lengths), HEADS, max_seqlen)
    cu_seqlens = [0]
    for n, length in enumerate(lengths):
        for row in range(length):
            for head in range(HEADS):
                padded[n, head, row] = packed[cu_seqlens[n] + row, head]
        cu_seqlens.append(cu_seqlens[n] + length)
    cu = torch.tensor(cu_seqlens, dtype=torch.int32, device=device)
    return packed.to(device, dtype), padded.to(device, dtype), cu, max_seqlen


def same(got, want):
    assert got.dtype == want.dtype
    assert got.is_contiguous()
    assert torch.equal(got, want)


@VERSIONS
@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("lengths", CASES, ids=str)
def test_flatten_packs_and_unflatten_pads(version, lengths, extra, device):
    packed, padded, cu_seqlens, max_seqlen = example(lengths, extra, device)
    # What stands past the end of a document is never read into the result.
    end = cu_seqlens.diff().view(-1, 1, 1)
    past = torch.arange(max_seqlen, device=device) >= end
    flat = version.flatten_varlen_lse(padded.masked_fill(past, torch.nan), cu_seqlens)
    same(flat, packed.T.contiguous())
    same(version.unflatten_varlen_lse(packed, cu_seqlens, max_seqlen), padded)
    same(version.unflatten_varlen_lse(packed.unsqueeze(2), cu_seqlens, max_seqlen), padded)
    again = version.unflatten_varlen_lse(flat.T, cu_seqlens, max_seqlen)
    same(version.flatten_varlen_lse(again, cu_seqlens), flat)


@VERSIONS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_any_float_dtype_passes_unchanged(version, dtype, device):
    packed, padded, cu_seqlens, max_seqlen = example([7, 0, 140], 1, device, dtype)
    same(version.flatten_varlen_lse(padded, cu_seqlens), packed.T.contiguous())
    same(version.unflatten_varlen_lse(packed, cu_seqlens, max_seqlen), padded)


@VERSIONS
def test_strided_inputs(version, device):
    packed, padded, cu_seqlens, max_seqlen = example([7, 2, 140], 1, device)
    wide = cu_seqlens.repeat_interleave(2)[::2]
    padded_view = padded.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    packed_view = packed.repeat_interleave(2, 0)[::2]
    same(version.flatten_varlen_lse(padded_view, wide), packed.T.contiguous())
    same(version.unflatten_varlen_lse(packed_view, wide, max_seqlen), padded)


@VERSIONS
def test_no_documents(version, device):
    cu_seqlens = torch.zeros(1, dtype=torch.int32, device=device)
    assert version.flatten_varlen_lse(torch.empty(0, 3, 4).to(device), cu_seqlens).shape == (3, 0)
    padded = version.unflatten_varlen_lse(torch.empty(0, 3).to(device), cu_seqlens, 4)
    assert padded.shape == (0, 3, 4)


@pytest.mark.parametrize("name", ["flatten_kernel", "unflatten_kernel"])
def test_a_kernel_has_upstreams_parameters(name):
    kernel = getattr(triton_utils, name)
    assert ", ".join(inspect.signature(kernel.fn).parameters) == FUNCTIONS["triton_utils"][name]


def test_cpu_tensors_need_no_interpreter():
    code = """
import torch
from ring_flash_attn import triton_utils, utils
lse, cu_seqlens = torch.randn(2, 3, 5), torch.tensor([0, 5, 8], dtype=torch.int32)
flat = triton_utils.flatten_varlen_lse(lse, cu_seqlens)
assert torch.equal(flat, utils.flatten_varlen_lse(lse, cu_seqlens))
padded = triton_utils.unflatten_varlen_lse(flat.T, cu_seqlens, 5)
assert torch.equal(padded, utils.unflatten_varlen_lse(flat.T, cu_seqlens, 5))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
