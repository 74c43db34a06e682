"""Launch a Triton kernel without binding its arguments anew every time.

Triton's own launch looks at each argument to find the compiled kernel, 100 us and more for the
forty that the attention kernels take. What decides here is a key of the few things that can differ
between two calls with the same constants.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from ..kernels.tile import INTERPRETED

# Versions whose compiled kernels take their arguments as this file passes them.
_KNOWN = triton.__version__.startswith("3.6.")
# (kernel, device, options, what each argument was specialised on) -> the compiled kernel.
_compiled: dict[tuple, Any] = {}


def launch(
    kernel: Any, grid: tuple[int, int, int], arguments: dict[str, Any], **options: int
) -> None:
    """Launch `kernel` on the current device and stream.

    Args:
        arguments: every parameter of the kernel by name, constants included. Ints that are not
            constants and not in a tuple must be among its `do_not_specialize`.
        options: Triton's, as num_warps.
    """
    if INTERPRETED.value or not _KNOWN:
        kernel[grid](**arguments, **options)
        return
    constants, others = _names(kernel)
    key = (
        kernel,
        torch.cuda.current_device(),
        *options.values(),
        *[arguments[name] for name in constants],
        *[_specialised(arguments[name]) for name in others],
    )
    compiled = _compiled.get(key)
    if compiled is None:
        for name in others:
            plain = isinstance(arguments[name], int)
            assert not plain or name in kernel.do_not_specialize, f"{name} would be compiled in"
        _compiled[key] = kernel[grid](**arguments, **options)
    else:
        compiled[grid](*[arguments[name] for name in kernel.arg_names])


def strides(x: Tensor) -> tuple[int, int, int]:
    """Return the strides of x [B, L, H, D] in the kernels' order: batch, head, row."""
    assert x.stride(3) == 1, f"rows must be contiguous, got strides {x.stride()}"
    return x.stride(0), x.stride(2), x.stride(1)


def targets(state: Tensor | None, result: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return a state and a result of the same strides; they are one where there is but one."""
    state, result = result if state is None else state, state if result is None else result
    assert state is not None and result is not None, "without a state there must be a result"
    assert state.stride() == result.stride(), "state and result share one set of strides"
    return state, result


def on(device: torch.device) -> AbstractContextManager:
    """Make `device` current: Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def _names(kernel: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of a kernel's constants, which are in capitals, and of all else."""
    others = tuple(name for name in kernel.arg_names if name.islower())
    return tuple(name for name in kernel.arg_names if name not in others), others


def _specialised(value: Any) -> Any:
    """Return what Triton compiles an argument that is no constant into the kernel by."""
    if isinstance(value, int):
        return -(1 << 31) <= value < 1 << 31
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return None
    if isinstance(value, tuple):
        return _of_strides(value)
    if value is None:
        return ()
    return value.base.dtype, tuple(value.block_shape)  # a descriptor, Triton's or Gluon's


@lru_cache(maxsize=4096)
def _of_strides(strides: tuple[int, ...]) -> tuple[tuple[bool, bool, bool], ...]:
    return tuple((x == 1, x % 16 == 0, x < 1 << 31) for x in strides)
