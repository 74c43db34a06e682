"""Triton kernels that fold a step into the state themselves: sm_80 and up, or the interpreter."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..core.attention import Attention
from ..core.plan import Block, StepPlan
from ..core.tables import Tables, key_tables, query_tables
from ..kernels.configs import (
    DTYPES,
    INTERPRETER,
    MAX_HEAD_DIM,
    Choice,
    LaunchConfig,
    block_d,
    launch_config,
)
from ..kernels.delta import _delta_kernel
from ..kernels.dkv import _bwd_kernel_dkv
from ..kernels.dq import _bwd_kernel_dq
from ..kernels.forward import _fwd_kernel
from ..kernels.tile import INTERPRETED
from .base import GradTarget, Saved

# Share of L2 for what the heads in flight read again and again. Gluon prototypes, H100, 2026-11-22:
# all heads at once lost 9-11 % (forward, 32768 tokens), one at a time 14 % (backward, 8192).
L2_BYTES = 32 << 20
DELTA_ROWS = 64

Lookup = Callable[[int, int, str, str], Choice]


class DeviceTables(NamedTuple):
    """Tables on a device: tiles [n_tiles, 4] and entries [n, 4], int32."""

    tiles: Tensor
    entries: Tensor
    n_tiles: int


class TritonBackend:
    """Runs the kernels of kernels/, which accumulate in float32 and write the state themselves.

    The first call with a plan uploads its tables, a host sync, and a kernel compiles when it is
    first used; after that a step only launches. Capture a CUDA graph after such a first call.
    """

    name = "triton"

    def __init__(self, lookup: Lookup = launch_config) -> None:
        """Take launch configurations from `lookup`: a search script or a test brings its own."""
        self._lookup = lookup

    def unsupported(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> list[str]:
        """Return every reason why this backend cannot run these inputs; empty if it can."""
        reasons = []
        if not INTERPRETED.value:
            reasons += _unsupported_device(q.device)
        if _dtype_name(q) not in DTYPES:
            reasons.append(
                f"triton needs bfloat16, float16 or float32, got {q.dtype}; reference takes it"
            )
        if not q.dtype == k.dtype == v.dtype:
            reasons.append(f"triton needs one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
        head_dim = q.shape[-1]
        if head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
            reasons.append(
                f"triton needs a head_dim that is a multiple of 8 up to {MAX_HEAD_DIM}, "
                f"got {head_dim}; reference takes it"
            )
        if v.shape[-1] != head_dim:
            reasons.append(f"triton needs v as wide as k, got {v.shape[-1]} and {head_dim}")
        return reasons

    def forward(
        self,
        attention: Attention,
        step_plan: StepPlan,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        """As Backend.forward; `out` may also be of the input's dtype, then each step rounds it."""
        if not step_plan.blocks:
            return
        config = self._config(q, "forward")
        tables = device_tables(query_tables, step_plan.blocks, config.block_m, q.device)
        common = _query_arguments(attention, config, tables, q, k)
        with _on(q.device):
            _fwd_kernel[(tables.n_tiles * common["n_heads"],)](
                **_sources(config, {"q": q}, {"k": k, "v": v}),
                out_ptr=out,
                lse_ptr=lse,
                out_strides=_strides(out),
                lse_stride_batch=lse.stride(0),
                lse_stride_head=lse.stride(1),
                CARRY=not step_plan.first,
                **common,
            )

    def prepare_backward(
        self, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None
    ) -> Saved:
        """As Backend.prepare_backward, with delta [B, H, L] float32 from a kernel."""
        dout, out = _unit_stride(dout), _unit_stride(out)
        dlse = None if dlse is None else dlse.contiguous()
        batch, length, heads, head_dim = out.shape
        delta = torch.empty((batch, heads, length), dtype=torch.float32, device=out.device)
        with _on(out.device):
            _delta_kernel[(-(-length // DELTA_ROWS) * batch * heads,)](
                out,
                dout,
                dlse,
                delta,
                _strides(out),
                _strides(dout),
                length,
                heads,
                HEAD_DIM=head_dim,
                BLOCK_M=DELTA_ROWS,
                BLOCK_D=block_d(head_dim),
                HAS_DLSE=dlse is not None,
            )
        return Saved(dout, out, lse, dlse, delta)

    def backward(
        self,
        attention: Attention,
        step_plan: StepPlan,
        saved: Saved,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dq: Tensor,
        dkv_target: Callable[[], GradTarget],
    ) -> None:
        """As Backend.backward; without blocks dkv_target is not called."""
        if not step_plan.blocks:
            return
        self._backward_dq(attention, step_plan, saved, q, k, v, dq)
        self._backward_dkv(attention, step_plan, saved, q, k, v, dkv_target())

    def _backward_dq(
        self,
        attention: Attention,
        step_plan: StepPlan,
        saved: Saved,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dq: Tensor,
    ) -> None:
        config = self._config(q, "dq")
        tables = device_tables(query_tables, step_plan.blocks, config.block_m, q.device)
        common = _query_arguments(attention, config, tables, q, k)
        with _on(q.device):
            _bwd_kernel_dq[(tables.n_tiles * common["n_heads"],)](
                **_sources(config, {"q": q, "dout": saved.dout}, {"k": k, "v": v}),
                **_statistics(saved),
                dq_ptr=dq,
                dq_strides=_strides(dq),
                ADD=not step_plan.first,
                **common,
            )

    def _backward_dkv(
        self,
        attention: Attention,
        step_plan: StepPlan,
        saved: Saved,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        target: GradTarget,
    ) -> None:
        config = self._config(q, "dkv")
        tables = device_tables(key_tables, step_plan.blocks, config.block_n, q.device)
        batch, key_heads = k.shape[0], k.shape[2]
        group = q.shape[2] // key_heads
        read_again = 2 * group * q.shape[1] * q.shape[3] * q.element_size()
        with _on(q.device):
            _bwd_kernel_dkv[(tables.n_tiles * batch * key_heads,)](
                **_sources(config, {"q": q, "dout": saved.dout}, {"k": k, "v": v}),
                **_statistics(saved),
                dk_ptr=target.dk,
                dv_ptr=target.dv,
                dk_strides=_strides(target.dk),
                dv_strides=_strides(target.dv),
                key_heads=key_heads,
                ADD=target.add,
                **_arguments(attention, config, tables, q.shape[3]),
                n_heads=batch * key_heads,
                heads_in_flight=max(1, L2_BYTES // read_again),
                group=group,
            )

    def _config(self, q: Tensor, pass_: str) -> LaunchConfig:
        return self._lookup(_arch(q.device), q.shape[3], _dtype_name(q), pass_).config


@lru_cache(maxsize=512)
def device_tables(
    build: Callable[[tuple[Block, ...], int], Tables],
    blocks: tuple[Block, ...],
    tile_rows: int,
    device: torch.device,
) -> DeviceTables:
    """Build tables with `build` (query_tables or key_tables) and upload them, once a plan.

    The copy blocks, so the tables may be read on every stream. A table that 511 younger plans have
    pushed out of the cache is freed; its kernels are long done.
    """
    tables = build(blocks, tile_rows)
    tiles, entries = (
        torch.tensor(lines, dtype=torch.int32).to(device)
        for lines in (tables.tiles, tables.entries)
    )
    return DeviceTables(tiles, entries, len(tables.tiles))


def _query_arguments(
    attention: Attention, config: LaunchConfig, tables: DeviceTables, q: Tensor, k: Tensor
) -> dict:
    """Return what forward and dQ, whose programs own query tiles, are launched with."""
    batch, _, query_heads, head_dim = q.shape
    group = query_heads // k.shape[2]
    read_again = 2 * k.shape[1] * head_dim * k.element_size()
    return {
        **_arguments(attention, config, tables, head_dim),
        "n_heads": batch * query_heads,
        "heads_in_flight": group * max(1, L2_BYTES // read_again),
        "query_heads": query_heads,
        "group": group,
    }


def _arguments(
    attention: Attention, config: LaunchConfig, tables: DeviceTables, head_dim: int
) -> dict:
    """Return what every attention kernel is launched with."""
    return {
        "tiles_ptr": tables.tiles,
        "entries_ptr": tables.entries,
        "n_tiles": tables.n_tiles,
        "softmax_scale": attention.softmax_scale,
        "HEAD_DIM": head_dim,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": block_d(head_dim),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _statistics(saved: Saved) -> dict:
    """Return the arguments for lse and delta."""
    assert saved.delta is not None, "saved comes from another backend's prepare_backward"
    return {
        "lse_ptr": saved.lse,
        "delta_ptr": saved.delta,
        "lse_stride_batch": saved.lse.stride(0),
        "lse_stride_head": saved.lse.stride(1),
        "delta_stride_batch": saved.delta.stride(0),
        "delta_stride_head": saved.delta.stride(1),
    }


def _sources(config: LaunchConfig, queries: dict[str, Tensor], keys: dict[str, Tensor]) -> dict:
    """Return the arguments for the tensors that are read: all by descriptor or all by pointer."""
    tensors = {name: _unit_stride(x) for name, x in (queries | keys).items()}
    tma = config.tma and all(_fits_descriptor(x) for x in tensors.values())
    arguments: dict = {"TMA": tma}
    for name, x in tensors.items():
        rows = config.block_m if name in queries else config.block_n
        arguments[name] = _descriptor(x, rows) if tma else x
        # A descriptor holds the strides itself; constant ones keep the kernel from recompiling.
        arguments[f"{name}_strides"] = (0, 0, 0) if tma else _strides(x)
    return arguments


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Describe x [B, L, H, D] to the TMA as [B, H, L, D] with box [1, 1, rows, block_d(D)].

    Four dimensions, so that rows past L are out of bounds and not the next batch's, and columns
    past D not the next head's. The leading ones fold away: the load is one tile.
    """
    x = x.transpose(1, 2)
    aligned = 16 // x.element_size()
    strides = [x.stride(i) if x.shape[i] > 1 else aligned for i in range(3)]
    box = [1, 1, rows, block_d(x.shape[3])]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], box)


def _fits_descriptor(x: Tensor) -> bool:
    """Whether the TMA can address x: base and strides multiples of 16 bytes, no broadcast."""
    size = x.element_size()
    strides = [x.stride(i) * size for i in range(3) if x.shape[i] > 1]
    return x.data_ptr() % 16 == 0 and all(s % 16 == 0 and 0 < s < 1 << 40 for s in strides)


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Return the strides of x [B, L, H, D] in the kernels' order: batch, head, row."""
    assert x.stride(3) == 1, f"rows must be contiguous, got strides {x.stride()}"
    return x.stride(0), x.stride(2), x.stride(1)


def _unit_stride(x: Tensor) -> Tensor:
    """Return x, copied if its last dimension is not contiguous: no kernel takes that stride.

    Gradients of a sum come so, expanded from one number; views of a packed qkv do not.
    """
    return x if x.stride(-1) == 1 else x.contiguous()


def _dtype_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _unsupported_device(device: torch.device) -> list[str]:
    if device.type != "cuda" or torch.version.hip:
        return [
            f"triton needs an NVIDIA GPU, got a tensor on {device}; to run its kernels in Triton's "
            "interpreter, set TRITON_INTERPRET=1 before importing ring_flash_attn"
        ]
    if _arch(device) < 80:
        return [f"triton needs compute capability 8.0 or more, {device} has {_arch(device) / 10}"]
    return []


@lru_cache(maxsize=64)
def _arch(device: torch.device) -> int:
    """Return a device's compute capability as kernels.configs counts it."""
    if INTERPRETED.value:
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _on(device: torch.device) -> AbstractContextManager:
    """Make `device` current: Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
