"""Launch the Hopper kernels: descriptors; of the forward work counter and number of programs."""

import os
from functools import cache, lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from ..kernels.hopper.configs import ForwardConfig, forward_config
from .descriptors import cut_shape, tma_shape
from .launch import launch

# Gluon changes between versions. Others run the portable kernels, and do not import these.
SUPPORTED = triton.__version__.startswith("3.6.")
if SUPPORTED:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from ..kernels.hopper.forward import _hopper_fwd_kernel

_DTYPES = (torch.bfloat16, torch.float16)
WANTED = os.environ.get("RING_FLASH_ATTN_HOPPER", "1") != "0"


def unsupported(arch: int, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Return every reason why it cannot run and the portable forward does; empty if it can.

    Args:
        arch: compute capability as kernels.configs counts it.
    """
    reasons = unsupported_part(arch, dtype)
    if forward_config(head_dim) is None:
        reasons.append(f"it takes head dims from 40 to 256 in steps of 8, not {head_dim}")
    return reasons


def unsupported_part(arch: int, dtype: torch.dtype) -> list[str]:
    """Return the reasons that speak against every Hopper kernel."""
    reasons = []
    if arch != 90:
        reasons.append(f"it is made for sm_90, this is sm_{arch}")
    if not SUPPORTED:
        reasons.append(f"it is made for Triton 3.6, this is {triton.__version__}")
    if dtype not in _DTYPES:
        reasons.append(f"it multiplies bfloat16 and float16, not {dtype}")
    return reasons


def addresses(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, state: Tensor | None, documents: bool
) -> bool:
    """Return whether the kernel can address these tensors, which views of others may forbid.

    Args:
        q: [B, L, H, D]. k, v: [B, Lk, Hk, D].
        out: [B, L, H, D], what is written. state: the same, if it is read too.
    """
    if state is not None and (state.dtype != torch.float32 or tma_shape(state) is None):
        return False
    shapes = tma_shape(q), tma_shape(k), cut_shape(v) if documents else tma_shape(v)
    return None not in shapes and max(out.stride()) < 1 << 31


def forward_arguments(
    config: ForwardConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    documents: bool,
    one_entry: bool,
) -> dict[str, Any]:
    """Return the arguments of _hopper_fwd_kernel that the portable forward does not take alike."""
    width = block_d(q.shape[3])
    k_box = [1, 1, config.block_n, width]
    v_box = [1, 1, config.block_n, 1, width] if documents else k_box
    # As many bytes as a block of K or V, in whose room it goes.
    state_box = [1, 1, 64, width * config.block_n // 128]
    _, consumer, producer = config.registers
    return {
        "q": describe(q, tma_shape(q), [1, 1, 64, width]),
        "k": describe(k, tma_shape(k), k_box),
        "v": describe(v, cut_shape(v) if documents else tma_shape(v), v_box),
        "state": None if state is None else describe(state, tma_shape(state), state_box),
        "counter_ptr": _counter(q.device),
        "BLOCK_D": width,
        "BLOCK_N": config.block_n,
        "DOCUMENTS": documents,
        "ONE_ENTRY": one_entry,
        "CONSUMERS": config.consumers,
        "STAGES": config.stages,
        "PING_PONG": config.ping_pong,
        "RESCALE_LATE": config.rescale_late,
        "CONSUMER_REGISTERS": consumer,
        "PRODUCER_REGISTERS": producer,
    }


def launch_forward(config: ForwardConfig, arguments: dict[str, Any]) -> None:
    """Launch _hopper_fwd_kernel on the current device and stream."""
    items = arguments["n_tiles"] * arguments["n_heads"]
    programs = min(items, _multiprocessors(arguments["lse_ptr"].device))
    launch(
        _hopper_fwd_kernel,
        (programs, 1, 1),
        arguments,
        num_warps=4,
        maxnreg=config.registers[0],
    )


def block_d(head_dim: int) -> int:
    """Return the width of the kernels' tiles: the next power of two, at least 64."""
    return max(64, 1 << (head_dim - 1).bit_length())


def describe(x: Tensor, shape_and_strides: tuple[list[int], list[int]] | None, box: list[int]):
    """Return a descriptor of x, of shape and strides as the TMA is to see it."""
    assert shape_and_strides is not None, "unsupported() has refused this"
    return TensorDescriptor(x, *shape_and_strides, box, _layout(x.dtype, tuple(box)))


@lru_cache(maxsize=64)
def _layout(dtype: torch.dtype, box: tuple[int, ...]) -> Any:
    """Return how a box lies in shared memory."""
    of_torch = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}
    element = of_torch[dtype]
    return gl.NVMMASharedLayout.get_default_for(list(box), element)


def _counter(device: torch.device) -> Tensor:
    """Return two zeros that only launches on the current stream use, which leave them zero.

    A captured launch gets its own: its graph may be replayed on any stream.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(2, dtype=torch.int32, device=device)
    return _stream_counter(device, torch.cuda.current_stream(device).cuda_stream)


@cache
def _stream_counter(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(2, dtype=torch.int32, device=device)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
