"""Triton kernels that fold a step into the state themselves: sm_80 and up, or the interpreter."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..core.attention import Attention
from ..core.plan import Block, StepPlan
from ..core.tables import Tables, key_tables, query_tables
from ..kernels import configs
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


class TritonBackend:
    """Runs the kernels of kernels/, which accumulate in float32 and write the state themselves.

    The first call with a plan uploads its tables, a host sync, and a kernel compiles when it is
    first used; after that a step only launches. Capture a CUDA graph after such a first call.
    """

    name = "triton"

    def __init__(self, lookup: configs.Lookup = configs.launch_config) -> None:
        """Take launch configurations from `lookup`: a search script or a test brings its own."""
        self._lookup = lookup

    def unsupported(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> list[str]:
        """Return every reason why this backend cannot run these inputs; empty if it can."""
        reasons = []
        if not INTERPRETED.value:
            reasons += _unsupported_device(q.device)
        if _dtype_name(q) not in configs.DTYPES:
            known = ", ".join(configs.DTYPES)
            reasons.append(f"triton needs one of {known}, got {q.dtype} (use reference)")
        if not q.dtype == k.dtype == v.dtype:
            reasons.append(f"triton needs one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
        head_dim, limit = q.shape[-1], configs.MAX_HEAD_DIM
        if head_dim % 8 or not 8 <= head_dim <= limit:
            need = f"a head_dim that is a multiple of 8 up to {limit}"
            reasons.append(f"triton needs {need}, got {head_dim} (use reference)")
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
        """As Backend.forward; `out` may also be of the input's dtype: then each step rounds it."""
        self._launch(
            _fwd_kernel,
            "forward",
            attention,
            step_plan,
            {"q": q, "k": k, "v": v},
            out_ptr=out,
            lse_ptr=lse,
            out_strides=_strides(out),
            lse_stride_batch=lse.stride(0),
            lse_stride_head=lse.stride(1),
            CARRY=not step_plan.first,
        )

    def prepare_backward(
        self, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None
    ) -> Saved:
        """As Backend.prepare_backward, with delta [B, H, L] float32 from a kernel."""
        dout, out = _unit_stride(dout), _unit_stride(out)
        dlse = None if dlse is None else dlse.contiguous()
        batch, length, heads, head_dim = out.shape
        delta = torch.empty((batch, heads, length), dtype=torch.float32, device=out.device)
        constants = {"HEAD_DIM": head_dim, "BLOCK_M": DELTA_ROWS}
        constants |= {"BLOCK_D": configs.block_d(head_dim), "HAS_DLSE": dlse is not None}
        strides = _strides(out), _strides(dout)
        launch: Any = _delta_kernel[(-(-length // DELTA_ROWS) * batch * heads,)]
        with _on(out.device):
            launch(out, dout, dlse, delta, *strides, length, heads, **constants)
        return Saved(dout, out, _unit_stride(lse), dlse, delta)

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
        """As Backend.backward: dq, then dkv_target(), then dk and dv. No blocks: no call."""
        if not step_plan.blocks:
            return
        assert saved.delta is not None, "saved comes from another backend's prepare_backward"
        sources = {"q": q, "k": k, "v": v, "dout": saved.dout}
        statistics = {
            "lse_ptr": saved.lse,
            "delta_ptr": saved.delta,
            "lse_stride_batch": saved.lse.stride(0),
            "lse_stride_head": saved.lse.stride(1),
            "delta_stride_batch": saved.delta.stride(0),
            "delta_stride_head": saved.delta.stride(1),
        }
        self._launch(
            _bwd_kernel_dq,
            "dq",
            attention,
            step_plan,
            sources,
            **statistics,
            dq_ptr=dq,
            dq_strides=_strides(dq),
            ADD=not step_plan.first,
        )
        target = dkv_target()
        self._launch(
            _bwd_kernel_dkv,
            "dkv",
            attention,
            step_plan,
            sources,
            **statistics,
            dk_ptr=target.dk,
            dv_ptr=target.dv,
            dk_strides=_strides(target.dk),
            dv_strides=_strides(target.dv),
            ADD=target.add,
        )

    def _launch(
        self,
        kernel: Any,
        pass_: str,
        attention: Attention,
        step_plan: StepPlan,
        sources: dict[str, Tensor],
        **arguments: Any,
    ) -> None:
        """Launch `kernel` on every tile and head of the side that it writes.

        Args:
            sources: what it reads tile by tile: q, k, v, backward also dout.
            arguments: what only this kernel takes.
        """
        if not step_plan.blocks:
            return
        q, k = sources["q"], sources["k"]
        batch, q_len, heads, head_dim = q.shape
        k_len, key_heads = k.shape[1:3]
        group = heads // key_heads
        config = self._lookup(_arch(q.device), head_dim, _dtype_name(q), pass_).config
        if pass_ == "dkv":
            # A key head's program reads q and dout of its group, again for every tile of keys.
            tiles, entries = device_tables(key_tables, step_plan.blocks, config.block_n, q.device)
            heads, sharing, rows_read = key_heads, 1, 2 * group * q_len
            arguments["COPIES"] = config.copies
        else:
            # The group's programs share k and v.
            tiles, entries = device_tables(query_tables, step_plan.blocks, config.block_m, q.device)
            sharing, rows_read = group, 2 * k_len
        in_l2 = max(1, L2_BYTES // (rows_read * head_dim * q.element_size()))
        with _on(q.device):
            kernel[(len(tiles) * batch * heads,)](
                **_source_arguments(config, sources),
                **arguments,
                tiles_ptr=tiles,
                entries_ptr=entries,
                n_tiles=len(tiles),
                n_heads=batch * heads,
                heads_in_flight=min(batch * heads, sharing * in_l2),
                heads=heads,
                group=group,
                softmax_scale=attention.softmax_scale,
                HEAD_DIM=head_dim,
                BLOCK_M=config.block_m,
                BLOCK_N=config.block_n,
                BLOCK_D=configs.block_d(head_dim),
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )


@lru_cache(maxsize=512)
def device_tables(
    build: Callable[[tuple[Block, ...], int], Tables],
    blocks: tuple[Block, ...],
    tile_rows: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Build tables with `build` (query_tables or key_tables) and upload them, once a plan.

    Returns tiles [n_tiles, 4] and entries [n, 4], int32.
    The copy blocks, so the tables may be read on every stream. A table that 511 younger ones have
    pushed out of the cache is freed; the kernels that read it are long done.
    """
    tables = build(blocks, tile_rows)
    tiles, entries = (torch.tensor(x, dtype=torch.int32) for x in (tables.tiles, tables.entries))
    return tiles.to(device), entries.to(device)


def _source_arguments(config: configs.LaunchConfig, sources: dict[str, Tensor]) -> dict[str, Any]:
    """Return the arguments for tensors that are read: all by descriptor or all by pointer."""
    sources = {name: _unit_stride(x) for name, x in sources.items()}
    tma = config.tma and all(_fits_descriptor(x) for x in sources.values())
    arguments: dict[str, Any] = {"TMA": tma}
    for name, x in sources.items():
        rows = config.block_n if name in ("k", "v") else config.block_m
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
    box = [1, 1, rows, configs.block_d(x.shape[3])]
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
        return configs.INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _on(device: torch.device) -> AbstractContextManager:
    """Make `device` current: Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
