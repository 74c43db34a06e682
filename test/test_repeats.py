"""Thousands of forwards over the same packed documents, each bitwise the first.

What a kernel does too early now and then shows here, not in an error against the truth: once a
consumer let its slot of Q be filled anew before its loads had returned, and one call in 2000 had
some rows of one tile wrong. It takes short tiles between long ones, so documents of many lengths.
The test itself runs on any machine.
"""

import pytest
import torch

from ring_flash_attn.backends.triton import TritonBackend
from ring_flash_attn.core.attention import Attention
from ring_flash_attn.core.packed import Documents, on_device, plan_packed
from ring_flash_attn.core.ring import ring_forward

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]
LENGTHS = (256, 1382, 2, 408)
SMALL_LENGTHS = (6, 20, 2, 8)
RUNS = 8000


class Sources:
    """The keys and values of every step, as an exchange that has them all."""

    def __init__(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._pairs = pairs

    def kv(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._pairs[step]

    def kv_done(self, step: int) -> None:
        pass


def differing(lengths, head_dim, heads, steps, runs, device, spoiled=None) -> list[str]:
    """Return which results of which later forwards differ from the first one's.

    Args:
        steps: ranks of the ring, of which this is the last one's part. spoiled: a run to change a
            number in.
    """
    generator = torch.Generator(device).manual_seed(0)
    rows, dtype = sum(lengths), torch.bfloat16 if device.type == "cuda" else torch.float32

    def normal(count: int) -> torch.Tensor:
        x = torch.randn(1, rows, count, head_dim, generator=generator, device=device)
        return x.to(dtype)

    q, sources = (
        normal(heads),
        Sources([(normal(heads // 4), normal(heads // 4)) for _ in range(steps)]),
    )
    edges = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    attention, backend = Attention(head_dim**-0.5, True), TritonBackend()
    plan = plan_packed(attention, "zigzag", steps, steps - 1)

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        documents = on_device(plan, Documents(edges, edges, rows, rows))
        return ring_forward(attention, documents, backend, sources, q)

    first, found = forward(), []
    for run in range(1, runs):
        again = forward()
        if run == spoiled:
            again[1][0, 0, rows // 2] += 1e-3
        pairs = zip(("out", "lse"), again, first, strict=True)
        found += [f"{name} of run {run}" for name, x, y in pairs if not torch.equal(x, y)]
    return found


@pytest.mark.parametrize("steps", [1, 2])
def test_another_result_is_found(device, steps):
    given = SMALL_LENGTHS, 16, 4, steps, 3, device
    assert differing(*given) == []
    assert differing(*given, spoiled=2) == ["lse of run 2"]


@pytest.mark.gpu
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
def test_thousands_on_a_gpu(head_dim, steps):
    found = differing(LENGTHS, head_dim, 32, steps, RUNS, torch.device("cuda"))
    assert not found, (len(found), found[:5])
