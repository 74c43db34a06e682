"""The autograd Functions, by finite differences: gradients of out and of lse, in float64.

Through the reference backend, which sees what every backend sees; the kernels' own gradients are
compared with the oracle's elsewhere.
"""

import pytest
import torch
import torch.distributed as dist

from ring_flash_attn import packed_attention, ring_attention

MASKS = [(False, (-1, -1)), (True, (-1, -1)), (True, (3, 0)), (False, (2, 1))]


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def leaves(*sizes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(size, dtype=torch.float64, generator=generator).requires_grad_()
        for size in sizes
    ]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "stripe"])
def test_a_batch(layout, mask):
    causal, window = mask

    def attend(q, k, v):
        return ring_attention(
            q, k, v, layout=layout, backend="reference", causal=causal, window_size=window
        )

    q, k, v = leaves((2, 6, 2, 2), (2, 6, 1, 2), (2, 6, 1, 2))
    assert torch.autograd.gradcheck(attend, (q, k, v))


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "stripe"])
def test_documents(layout, mask):
    causal, window = mask
    cu_seqlens = torch.tensor([0, 4, 6, 12], dtype=torch.int32)

    def attend(q, k, v):
        return packed_attention(
            q,
            k,
            v,
            cu_seqlens,
            6,
            layout=layout,
            backend="reference",
            causal=causal,
            window_size=window,
        )

    assert torch.autograd.gradcheck(attend, leaves((12, 2, 2), (12, 1, 2), (12, 1, 2)))


def test_a_wrong_gradient_is_found():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1.0

        @staticmethod
        def backward(ctx, dx):
            return dx * 1.01

    def attend(q, k, v):
        return ring_attention(Wrong.apply(q), k, v, backend="reference", causal=True)

    with pytest.raises(RuntimeError, match="Jacobian"):
        torch.autograd.gradcheck(attend, leaves((1, 4, 1, 2), (1, 4, 1, 2), (1, 4, 1, 2)))
