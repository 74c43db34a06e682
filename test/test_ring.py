"""The ring itself: every layout and mask in float64 over gloo, through the reference backend."""

from functools import cache

import pytest
import torch

from ranks import run_ranks
from ring_cases import TENSORS, grid, shard_errors

BOUND = 1e-10


@cache
def measured(world_size: int):
    return run_ranks(
        world_size, shard_errors, world_size, grid(), "reference", torch.float64, "cpu"
    )


@pytest.mark.parametrize("index", range(len(grid())), ids=[str(case) for case in grid()])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4], ids=lambda n: f"P{n}")
def test_float64_ring_equals_dense(world_size: int, index: int):
    for rank, errors in enumerate(measured(world_size)):
        for tensor in TENSORS:
            assert errors[index][tensor].ours.max_abs < BOUND, f"{tensor} on rank {rank}"
