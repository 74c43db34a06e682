"""What a launch depends on of a tensor, and what the TMA (tensor memory accelerator) can read."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Like(NamedTuple):
    """All that a launch depends on of a tensor, but for its address.

    `aligned`: the address is a multiple of 16.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    aligned: bool


def like(x: Tensor) -> Like:
    """Return what a launch depends on of a tensor."""
    return Like(*key_of(x))


def key_of(x: Tensor) -> tuple[torch.dtype, tuple[int, ...], tuple[int, ...], bool]:
    """Return the fields of `like`, as what is looked up in every step: without their names."""
    return x.dtype, x.shape, x.stride(), x.data_ptr() % 16 == 0


@lru_cache(maxsize=4096)
def addressable(x: Like, cut: bool) -> bool:
    """Return whether the TMA can address such tensors, see tma_shape and cut_shape."""
    return (cut_shape(x) if cut else tma_shape(x)) is not None


def tma_shape(x: Like) -> tuple[list[int], list[int]] | None:
    """Return shape and strides of x [B, L, H, D] as the TMA is to see it: [B, H, L, D].

    Four dimensions, so that rows past L are out of bounds and not the next batch's, and columns
    past D not the next head's.

    Returns:
        None if the TMA cannot address x: base and strides must be multiples of 16 bytes, and
        nothing broadcast.
    """
    batch, length, heads, head_dim = x.shape
    at_batch, at_row, at_head, at_column = x.strides
    step = 16 // x.dtype.itemsize
    # The stride of a single one is never taken.
    at_batch = at_batch if batch > 1 else step
    at_row = at_row if length > 1 else step
    at_head = at_head if heads > 1 else step
    if at_column != 1 or not x.aligned or at_batch % step or at_row % step or at_head % step:
        return None
    if not (0 < at_batch < 1 << 38 and 0 < at_row < 1 << 38 and 0 < at_head < 1 << 38):
        return None
    return [batch, heads, length, head_dim], [at_batch, at_head, at_row, 1]


def cut_shape(x: Like) -> tuple[list[int], list[int]] | None:
    """Return shape and strides, [., ., rows, H, D], that let a load of x [1, L, H, D] end anywhere.

    Coordinates (2**30, end, 2**30 - end + row, head, 0) address `row`, and rows from `end` on are
    out of bounds, so they arrive as zeros: the third dimension ends at 2**30, and the 2**30 steps
    of the first add up to minus as many rows, 2**64 bytes left out, where addresses wrap. (The
    ragged descriptors of Triton's triton_kernels do the same.)

    Returns:
        None where tma_shape does, and for more than one batch.
    """
    plain = tma_shape(x)
    if plain is None or x.shape[0] > 1:
        return None
    _, at_head, at_row, _ = plain[1]
    far = 1 << 30
    rows = 0x7FFF0000
    return [rows, rows, far, *x.shape[2:]], [2**34 - at_row, at_row, at_row, at_head, 1]
