"""Launch the Hopper kernels: descriptors; of the forward work counter and number of programs."""

import os
from functools import cache, lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from ..kernels.hopper.configs import ForwardConfig, forward_config
from .descriptors import Like, cut_shape, tma_shape
from .documents import Side, Table
from .launch import ADDRESS, Described, Launch, current_stream, strides
from .work import heads

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


@lru_cache(maxsize=1024)
def forward_launch(
    config: ForwardConfig,
    softmax_scale: float,
    tensors: tuple[Like, Like, Like, Like],
    lse_strides: tuple[int, ...],
    carry: bool,
    documents: bool,
    one_entry: bool,
) -> Launch | None:
    """Return the launch of _hopper_fwd_kernel for tensors q, k, v, out like these.

    Args:
        tensors: q [B, L, H, D], k, v [B, Lk, Hk, D], out [B, L, H, D].
        lse_strides: of lse [B, H, L].
        carry: whether out is read too. documents: whether the rows are packed documents.
        one_entry: whether no tile meets more than one entry.

    Returns:
        None if the kernel cannot address such tensors, which views of others may be.
    """
    q, k, v, out = tensors
    if max(out.strides) >= 1 << 31 or (carry and out.dtype != torch.float32):
        return None
    width = block_d(q.shape[3])
    v_box = (1, 1, config.block_n, 1, width) if documents else (1, 1, config.block_n, width)
    described: dict[str, Any] = {
        "q": describe(q, (1, 1, 64, width)),
        "k": describe(k, (1, 1, config.block_n, width)),
        "v": describe(v, v_box, cut=documents),
    }
    if carry:
        # As many bytes as a block of K or V, in whose room it goes.
        described["state"] = describe(out, (1, 1, 64, width * config.block_n // 128))
    if None in described.values():
        return None
    at_launch, consumer, producer = config.registers
    arguments = heads(softmax_scale, q, k, Side(False, config.block_m)) | {
        "state": None,
        **described,
        "out_ptr": ADDRESS,
        "result_ptr": ADDRESS,
        "lse_ptr": ADDRESS,
        "counter_ptr": ADDRESS,
        "out_strides": strides(out),
        "lse_stride_batch": lse_strides[0],
        "lse_stride_head": lse_strides[1],
        "CARRY": carry,
        "BLOCK_D": width,
        "BLOCK_N": config.block_n,
        "DOCUMENTS": documents,
        "ONE_ENTRY": one_entry,
        "CONSUMERS": config.consumers,
        "K_STAGES": config.k_stages,
        "V_STAGES": config.v_stages,
        "PING_PONG": config.ping_pong,
        "RESCALE_LATE": config.rescale_late,
        "Q_COLUMNS": config.q_columns,
        "SHUFFLES": config.shuffles,
        "CONSUMER_REGISTERS": consumer,
        "PRODUCER_REGISTERS": producer,
    }
    return Launch(_hopper_fwd_kernel, arguments, num_warps=4, maxnreg=at_launch)


def launch_forward(
    start: Launch, device: torch.device, table: Table, given: dict[str, Any]
) -> None:
    """Launch what forward_launch returned: as many programs as run at a time, at most."""
    given["tiles_ptr"], given["entries_ptr"], given["n_tiles"] = table
    given["counter_ptr"] = _counter(device)
    items = table.n_tiles * start.arguments["n_heads"]
    start(min(items, multiprocessors(device)), given)


def block_d(head_dim: int) -> int:
    """Return the width of the kernels' tiles: the next power of two, at least 64."""
    return max(64, 1 << (head_dim - 1).bit_length())


def describe(x: Like, box: tuple[int, ...], cut: bool = False) -> Described | None:
    """Say how a kernel reads tensors like x [B, L, H, D]; None if the TMA cannot address them.

    Args:
        box: of the descriptor's dimensions, see tma_shape and cut_shape.
        cut: as cut_shape, whose loads may end anywhere.
    """
    shape_and_strides = cut_shape(x) if cut else tma_shape(x)
    if shape_and_strides is None:
        return None

    def make(base: Tensor) -> Any:
        return TensorDescriptor(base, *shape_and_strides, list(box), _layout(base.dtype, box))

    return Described(make)


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
    return _stream_counter(device, current_stream(device.index))


@cache
def _stream_counter(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(2, dtype=torch.int32, device=device)


@cache
def multiprocessors(device: torch.device) -> int:
    """Return how many streaming multiprocessors a device has; 1 for a CPU."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
