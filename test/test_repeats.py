"""Thousands of passes over the same packed documents, each bitwise the first.

What a kernel does too early now and then shows here, not in an error against the truth: once a
consumer let its slot of Q be filled anew before its loads had returned, and in few of its calls
some rows of one tile were wrong. It takes short tiles between long ones, so documents of many
lengths.
The test itself runs on any machine.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from ring_flash_attn.backends import hopper
from ring_flash_attn.backends.base import GradTarget
from ring_flash_attn.backends.triton import TritonBackend
from ring_flash_attn.core.attention import Attention
from ring_flash_attn.core.packed import Documents, on_device, plan_packed
from ring_flash_attn.core.ring import ring_backward, ring_forward

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]
LENGTHS = (256, 1382, 2, 408)
SMALL_LENGTHS = (6, 20, 2, 8)
RUNS = 5000
NAMES = ("out", "lse", "dq", "dk", "dv")


class Sources:
    """The keys and values of every step, and room for their gradients, as an exchange."""

    def __init__(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._pairs = pairs
        self.gradients: list[torch.Tensor] = []

    def kv(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._pairs[step]

    def kv_done(self, step: int) -> None:
        pass

    def late(self, step: int) -> bool:
        return False

    def dkv_target(self, step: int) -> GradTarget:
        # Zeros: of a step's rows those that nobody sees are not written.
        pair = [torch.zeros_like(x, dtype=torch.float32) for x in self._pairs[step]]
        self.gradients += pair
        return GradTarget(*pair, add=False)

    def dkv_done(self, step: int) -> None:
        pass

    def finish(self) -> list[torch.Tensor]:
        found, self.gradients = self.gradients, []
        return [torch.stack(found[0::2]), torch.stack(found[1::2])]


class Case(NamedTuple):
    """What is computed: on the last rank of a ring of so many `steps`."""

    lengths: tuple[int, ...]
    head_dim: int
    heads: int
    steps: int
    device: torch.device

    @property
    def names(self) -> tuple[str, ...]:
        """What repeats bit by bit: the fused Hopper backward adds to dq in any order."""
        fused = 40 <= self.head_dim <= 128 and hopper.WANTED and self.device.type == "cuda"
        return ("out", "lse", "dk", "dv") if fused else NAMES


def results_of(case: Case) -> Callable[[], list[torch.Tensor]]:
    """Return what computes out, lse, dq, dk, dv, from the same numbers each time."""
    generator = torch.Generator(case.device).manual_seed(0)
    rows, dtype = sum(case.lengths), torch.bfloat16 if case.device.type == "cuda" else torch.float32

    def normal(count: int) -> torch.Tensor:
        shape = 1, rows, count, case.head_dim
        return torch.randn(shape, generator=generator, device=case.device).to(dtype)

    q, dout = normal(case.heads), normal(case.heads)
    few = case.heads // 4
    sources = Sources([(normal(few), normal(few)) for _ in range(case.steps)])
    edges = torch.tensor([0, *case.lengths]).cumsum(0).int().to(case.device)
    attention, backend = Attention(case.head_dim**-0.5, True), TritonBackend()
    plan = plan_packed(attention, "zigzag", case.steps, case.steps - 1)

    def compute() -> list[torch.Tensor]:
        given = attention, on_device(plan, Documents(edges, edges, rows, rows)), backend, sources
        out, lse = ring_forward(*given, q)
        saved = backend.prepare_backward(dout, out, lse, None)
        return [out, lse, *ring_backward(*given, saved, q)]

    return compute


def differing(case: Case, runs: int, spoiled: int | None = None) -> list[str]:
    """Return which results of which later runs differ from the first one's.

    Args:
        spoiled: a run to change a number of dv in.
    """
    compute, found = results_of(case), []
    first = compute()
    for run in range(1, runs):
        again = compute()
        if run == spoiled:
            again[4].view(-1)[-1] += 1e-3
        pairs = zip(NAMES, again, first, strict=True)
        differ = [name for name, x, y in pairs if name in case.names and not torch.equal(x, y)]
        found += [f"{name} of run {run}" for name in differ]
    return found


@pytest.mark.parametrize("steps", [1, 2])
def test_another_result_is_found(device, steps):
    case = Case(SMALL_LENGTHS, 16, 4, steps, device)
    assert differing(case, 3) == []
    assert differing(case, 3, spoiled=2) == ["dv of run 2"]


@pytest.mark.gpu
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
def test_thousands_on_a_gpu(head_dim, steps):
    found = differing(Case(LENGTHS, head_dim, 32, steps, torch.device("cuda")), RUNS)
    assert not found, (len(found), found[:5])
