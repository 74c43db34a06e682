"""The Triton ring over gloo: the reference ring's grid in float32, and 16-bit cases.

On a CPU the kernels run in Triton's interpreter. With a GPU all ranks share it, and messages pass
through host memory.
"""

from functools import cache

import pytest
import torch

from ranks import run_ranks
from ring_cases import TENSORS, Case, grid, shard_errors

pytestmark = pytest.mark.kernel

FLOAT32_BOUND = 2e-5
HALF_CASES = [
    Case("contiguous", 21, "causal"),
    Case("zigzag", 22, "causal", heads=4, key_heads=1, head_dim=32),
    Case("zigzag", 22, "causal-window", heads=3, key_heads=3),
    Case("stripe", 21, "window", batch=2),
]


# Rings of this size keep the grid's heads. Others have half as many, which halve the minutes that
# the interpreter takes, still two query heads a key head.
ALL_HEADS = 2


@cache
def measured(world_size: int, dtype: torch.dtype):
    cases = HALF_CASES
    if dtype == torch.float32:
        cases = grid()
        if world_size != ALL_HEADS:
            cases = [case._replace(heads=2, key_heads=1) for case in cases]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args = (world_size, cases, "triton", dtype, device)
    return run_ranks(world_size, shard_errors, *args, timeout_s=550)


@pytest.mark.parametrize("index", range(len(grid())), ids=[str(case) for case in grid()])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4], ids=lambda n: f"P{n}")
def test_float32_ring_equals_dense(world_size: int, index: int):
    for rank, errors in enumerate(measured(world_size, torch.float32)):
        for tensor in TENSORS:
            assert errors[index][tensor].ours.max_abs < FLOAT32_BOUND, f"{tensor} on rank {rank}"


@pytest.mark.parametrize("index", range(len(HALF_CASES)), ids=[str(case) for case in HALF_CASES])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("world_size", [1, 3], ids=lambda n: f"P{n}")
def test_16_bit_ring_errs_at_most_twice_as_much_as_dense(world_size: int, dtype, index: int):
    ranks = [errors[index] for errors in measured(world_size, dtype)]
    for tensor in TENSORS:
        # Over the whole sequence: a few rows alone would compare two draws of rounding noise.
        for measure in ("max_abs", "rmse"):
            ours = max(getattr(rank[tensor].ours, measure) for rank in ranks)
            dense = max(getattr(rank[tensor].dense, measure) for rank in ranks)
            assert ours <= 2 * dense + 1e-5, f"{tensor}, {measure}"
