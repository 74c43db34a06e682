"""Packed rings and gathered keys in float64 over gloo, through the reference backend."""

from functools import cache

import pytest
import torch

from packed_cases import packed_errors, packed_grid
from ranks import run_ranks
from ring_cases import TENSORS

BOUND = 1e-10
CASES = packed_grid()


@cache
def measured(world_size: int):
    args = (world_size, CASES, "reference", torch.float64, "cpu")
    return run_ranks(world_size, packed_errors, *args)


@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(case) for case in CASES])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4], ids=lambda n: f"P{n}")
def test_float64_documents_equal_dense(world_size: int, index: int):
    for rank, errors in enumerate(measured(world_size)):
        for tensor in TENSORS:
            assert errors[index][tensor].ours.max_abs < BOUND, f"{tensor} on rank {rank}"
