"""Launch the Hopper kernels: descriptors; of the forward work counter and number of programs."""

import os
from functools import cache, lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from ..kernels.hopper.configs import ForwardConfig, forward_config
from .descriptors import Address, address, cut_shape, tma_shape
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


def forward_arguments(
    config: ForwardConfig,
    tensors: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    state: Tensor | None,
    documents: bool,
    one_entry: bool,
) -> dict[str, Any] | None:
    """Return the arguments of _hopper_fwd_kernel that the portable forward does not take alike.

    Args:
        tensors: q [B, L, H, D], k, v [B, Lk, Hk, D].
        out: [B, L, H, D], what is written. state: the same, if it is read too.

    Returns:
        None if the kernel cannot address these tensors, which views of others may forbid.
    """
    if max(out.stride()) >= 1 << 31 or (state is not None and state.dtype != torch.float32):
        return None
    q, k, v = tensors
    width = block_d(q.shape[3])
    v_box = (1, 1, config.block_n, 1, width) if documents else (1, 1, config.block_n, width)
    described = {
        "q": describe(q, (1, 1, 64, width)),
        "k": describe(k, (1, 1, config.block_n, width)),
        "v": describe(v, v_box, cut=documents),
    }
    if state is not None:
        # As many bytes as a block of K or V, in whose room it goes.
        described["state"] = describe(state, (1, 1, 64, width * config.block_n // 128))
    if None in described.values():
        return None
    _, consumer, producer = config.registers
    return {
        "state": None,
        **described,
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


def describe(x: Tensor, box: tuple[int, ...], cut: bool = False) -> Any:
    """Return a descriptor of x [B, L, H, D], None if the TMA cannot address it.

    Args:
        box: of the descriptor's dimensions, see tma_shape and cut_shape.
        cut: as cut_shape, whose loads may end anywhere.
    """
    if x.is_cuda:
        return _described(address(x), box, cut)
    shape_and_strides = cut_shape(x) if cut else tma_shape(x)
    if shape_and_strides is None:
        return None
    return TensorDescriptor(x, *shape_and_strides, list(box), _layout(x.dtype, box))


@lru_cache(maxsize=4096)
def _described(x: Address, box: tuple[int, ...], cut: bool) -> Any:
    """Describe what lies at an address: to do it anew costs the host."""
    shape_and_strides = cut_shape(x) if cut else tma_shape(x)
    if shape_and_strides is None:
        return None
    return TensorDescriptor(x, *shape_and_strides, list(box), _layout(x.dtype, box))


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
