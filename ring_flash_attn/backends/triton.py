"""Triton kernels that fold a step into the state themselves: sm_80 and up, or the interpreter."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..core.attention import Attention
from ..core.packed import DocumentsStep
from ..kernels import configs
from ..kernels.delta import _delta_kernel
from ..kernels.dkv import _bwd_kernel_dkv
from ..kernels.dq import _bwd_kernel_dq
from ..kernels.forward import _fwd_kernel
from ..kernels.hopper.configs import (
    BackwardConfig,
    ForwardConfig,
    WideConfig,
    backward_config,
    forward_config,
)
from ..kernels.tile import INTERPRETED
from . import hopper, hopper_backward
from .base import GradTarget, Saved, Step
from .descriptors import Like, like, tma_shape
from .documents import Side
from .launch import ADDRESS, Described, Launch, on, strides, targets
from .work import heads, one_entry, statistics, tables

DELTA_ROWS = 64


class TritonBackend:
    """Runs the kernels of kernels/, which accumulate in float32 and write the state themselves.

    The first call with a plan uploads its tables, a host sync, and a kernel compiles when it is
    first used; after that a step only launches. Capture a CUDA graph after such a first call.
    """

    name = "triton"
    reads_documents = True

    def __init__(
        self,
        lookup: configs.Lookup = configs.launch_config,
        hopper_forward: bool | ForwardConfig = hopper.WANTED,
        hopper_backward: bool | BackwardConfig | WideConfig = hopper.WANTED,
    ) -> None:
        """Take launch configurations from `lookup`: a search script or a test brings its own.

        Args:
            hopper_forward, hopper_backward: run the Hopper kernels where they can, with the
                checked-in row or the given one. Up to head dim 128 that backward sums dq in any
                order, so with Attention.deterministic the portable one runs.
        """
        self._lookup = lookup
        self._hopper_forward = hopper_forward
        self._hopper_backward = hopper_backward

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
        step_plan: Step,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor | None,
        lse: Tensor,
        result: Tensor | None = None,
    ) -> None:
        """As Backend.forward; `out` may also be of the input's dtype: then each step rounds it."""
        out, result = targets(out, result)
        if not step_plan.sees:
            return
        q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
        documents = isinstance(step_plan, DocumentsStep)
        choices = self._choices(attention, q, documents)
        given = {"q": q, "k": k, "v": v, "state": out, "out_ptr": out, "result_ptr": result}
        given["lse_ptr"] = lse
        tensors, carry = (like(q), like(k), like(v), like(out)), not step_plan.first
        with on(q.device):
            config = choices.hopper_forward
            if config is not None:
                side = Side(False, config.block_m)
                start = hopper.forward_launch(
                    config,
                    attention.softmax_scale,
                    tensors,
                    lse.stride(),
                    carry,
                    documents,
                    one_entry(step_plan, side),
                )
                if start is not None:
                    given |= tables(step_plan, side, choices.sides, q.device)
                    hopper.launch_forward(start, q.device, given)
                    return
            config = choices.configs["forward"]
            start = _forward_launch(
                config, attention.softmax_scale, tensors, lse.stride(), carry, documents
            )
            given |= tables(step_plan, _side("forward", config), choices.sides, q.device)
            _launch(start, given)

    def prepare_backward(
        self, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None
    ) -> Saved:
        """As Backend.prepare_backward, with delta [B, H, L] float32 from a kernel."""
        dout, out = _unit_stride(dout), _unit_stride(out)
        dlse = None if dlse is None else dlse.contiguous()
        batch, length, heads, _ = out.shape
        delta = torch.empty((batch, heads, length), dtype=torch.float32, device=out.device)
        start = _delta_launch(like(out), like(dout), dlse is not None)
        given = {"out_ptr": out, "dout_ptr": dout, "dlse_ptr": dlse, "delta_ptr": delta}
        with on(out.device):
            start(-(-length // DELTA_ROWS) * batch * heads, given)
        return Saved(dout, out, _unit_stride(lse), dlse, delta)

    def backward(
        self,
        attention: Attention,
        step_plan: Step,
        saved: Saved,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dq: Tensor | None,
        dkv_target: Callable[[], GradTarget],
        result: Tensor | None = None,
    ) -> None:
        """As Backend.backward: dq, then dkv_target(), then dk and dv. No blocks: no call."""
        if not step_plan.sees:
            return
        assert saved.delta is not None, "saved comes from another backend's prepare_backward"
        q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
        documents = isinstance(step_plan, DocumentsStep)
        choices = self._choices(attention, q, documents)
        sources = {"q": q, "k": k, "v": v, "dout": saved.dout}
        config = choices.hopper_backward
        with on(q.device):
            if config is not None and hopper_backward.addresses(config, sources, dq, documents):
                step = hopper_backward.HopperStep(
                    config, attention, step_plan, saved, sources, choices.queries, choices.sides
                )
                step.run(dq, result, dkv_target)
                return
            dq, result = targets(dq, result)
            tensors = tuple(like(x) for x in sources.values())
            shared = attention.softmax_scale, tensors, saved.lse.stride(), saved.delta.stride()
            given = sources | {"lse_ptr": saved.lse, "delta_ptr": saved.delta}
            config = choices.configs["dq"]
            start = _dq_launch(config, *shared, like(dq), not step_plan.first, documents)
            given |= {"dq_ptr": dq, "result_ptr": result}
            _launch(start, given | tables(step_plan, _side("dq", config), choices.sides, q.device))
            target = dkv_target()
            config = choices.configs["dkv"]
            start = _dkv_launch(
                config, *shared, like(target.dk), like(target.dv), target.add, documents
            )
            given |= {"dk_ptr": target.dk, "dv_ptr": target.dv}
            _launch(start, given | tables(step_plan, _side("dkv", config), choices.sides, q.device))

    def _choices(self, attention: Attention, q: Tensor, documents: bool) -> "_Choices":
        return _choices(
            self._lookup,
            self._hopper_forward,
            self._hopper_backward,
            attention.deterministic,
            q.device,
            q.dtype,
            q.shape[3],
            documents,
        )


class _Choices(NamedTuple):
    """How the passes of a call run.

    Attributes:
        configs: of the portable kernels, by pass.
        hopper_forward, hopper_backward: of the Hopper kernels; None: the portable ones run.
        queries: what dq's pass cuts into tiles.
        sides: what the passes cut into tiles.
    """

    configs: dict[str, configs.LaunchConfig]
    hopper_forward: ForwardConfig | None
    hopper_backward: BackwardConfig | WideConfig | None
    queries: Side
    sides: tuple[Side, ...]


@lru_cache(maxsize=256)
def _choices(
    lookup: configs.Lookup,
    wants_forward: bool | ForwardConfig,
    wants_backward: bool | BackwardConfig | WideConfig,
    deterministic: bool,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    documents: bool,
) -> _Choices:
    arch, dtype_name = _arch(device), str(dtype).removeprefix("torch.")
    chosen = {x: lookup(arch, head_dim, dtype_name, x, documents).config for x in configs.PASSES}
    sides = {x: _side(x, config) for x, config in chosen.items()}
    forward = backward = None
    if wants_forward and not hopper.unsupported(arch, dtype, head_dim):
        forward = forward_config(head_dim) if wants_forward is True else wants_forward
    if forward is not None:
        sides["forward"] = Side(False, forward.block_m)
    given = None if isinstance(wants_backward, bool) else wants_backward
    backward_reasons = hopper_backward.unsupported(arch, dtype, head_dim, deterministic, given)
    if wants_backward and not backward_reasons:
        backward = given or backward_config(head_dim)
    if backward is not None:
        sides["dkv"] = Side(True, backward.key_rows)
        # The fused kernel has no tiles of queries; finished rows of dq are those of the forward's.
        fused = isinstance(backward, BackwardConfig)
        sides["dq"] = sides["forward"] if fused else Side(False, backward.query_rows)
    unique = tuple(dict.fromkeys(sides.values()))
    return _Choices(chosen, forward, backward, sides["dq"], unique)


def _side(pass_: str, config: configs.LaunchConfig) -> Side:
    """Return what a pass cuts into tiles."""
    return Side(True, config.block_n) if pass_ == "dkv" else Side(False, config.block_m)


def _launch(start: Launch, given: dict[str, Any]) -> None:
    """Launch one program a tile and head."""
    start(given["n_tiles"] * start.arguments["n_heads"], given)


@lru_cache(maxsize=1024)
def _forward_launch(
    config: configs.LaunchConfig,
    softmax_scale: float,
    tensors: tuple[Like, Like, Like, Like],
    lse_strides: tuple[int, ...],
    carry: bool,
    documents: bool,
) -> Launch:
    """Return the launch of _fwd_kernel for tensors q, k, v, out like these, as hopper's."""
    q, k, v, out = tensors
    outputs = {
        "out_ptr": ADDRESS,
        "result_ptr": ADDRESS,
        "lse_ptr": ADDRESS,
        "out_strides": strides(out),
        "lse_stride_batch": lse_strides[0],
        "lse_stride_head": lse_strides[1],
        "CARRY": carry,
    }
    sources = {"q": q, "k": k, "v": v}
    return _portable(_fwd_kernel, "forward", config, softmax_scale, sources, outputs, documents)


@lru_cache(maxsize=1024)
def _dq_launch(
    config: configs.LaunchConfig,
    softmax_scale: float,
    tensors: tuple[Like, Like, Like, Like],
    lse_strides: tuple[int, ...],
    delta_strides: tuple[int, ...],
    dq: Like,
    add: bool,
    documents: bool,
) -> Launch:
    """Return the launch of _bwd_kernel_dq for q, k, v, dout and dq like these."""
    outputs = statistics(lse_strides, delta_strides) | {
        "dq_ptr": ADDRESS,
        "result_ptr": ADDRESS,
        "dq_strides": strides(dq),
        "ADD": add,
    }
    return _portable(
        _bwd_kernel_dq, "dq", config, softmax_scale, _named(tensors), outputs, documents
    )


@lru_cache(maxsize=1024)
def _dkv_launch(
    config: configs.LaunchConfig,
    softmax_scale: float,
    tensors: tuple[Like, Like, Like, Like],
    lse_strides: tuple[int, ...],
    delta_strides: tuple[int, ...],
    dk: Like,
    dv: Like,
    add: bool,
    documents: bool,
) -> Launch:
    """Return the launch of _bwd_kernel_dkv for q, k, v, dout and dk, dv like these."""
    outputs = statistics(lse_strides, delta_strides) | {
        "dk_ptr": ADDRESS,
        "dv_ptr": ADDRESS,
        "dk_strides": strides(dk),
        "dv_strides": strides(dv),
        "ADD": add,
        "COPIES": config.copies,
    }
    return _portable(
        _bwd_kernel_dkv, "dkv", config, softmax_scale, _named(tensors), outputs, documents
    )


def _named(tensors: tuple[Like, Like, Like, Like]) -> dict[str, Like]:
    return dict(zip(("q", "k", "v", "dout"), tensors, strict=True))


def _portable(
    kernel: Any,
    pass_: str,
    config: configs.LaunchConfig,
    softmax_scale: float,
    sources: dict[str, Like],
    outputs: dict[str, Any],
    documents: bool,
) -> Launch:
    """Return the launch of a kernel on every tile and head of the side that it writes.

    Args:
        sources: what it reads tile by tile: q, k, v, backward also dout.
        outputs: arguments that only this kernel takes.
    """
    q, k = sources["q"], sources["k"]
    arguments = heads(softmax_scale, q, k, _side(pass_, config)) | outputs
    arguments |= _source_arguments(config, sources)
    arguments |= {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": configs.block_d(q.shape[3]),
        "DOCUMENTS": documents,
    }
    return Launch(kernel, arguments, num_warps=config.num_warps, num_stages=config.num_stages)


@lru_cache(maxsize=256)
def _delta_launch(out: Like, dout: Like, has_dlse: bool) -> Launch:
    """Return the launch of _delta_kernel for out and dout [B, L, H, D] like these."""
    _, length, heads, head_dim = out.shape
    arguments = {
        "out_ptr": ADDRESS,
        "dout_ptr": ADDRESS,
        "dlse_ptr": ADDRESS if has_dlse else None,
        "delta_ptr": ADDRESS,
        "out_strides": strides(out),
        "dout_strides": strides(dout),
        "length": length,
        "heads": heads,
        "HEAD_DIM": head_dim,
        "BLOCK_M": DELTA_ROWS,
        "BLOCK_D": configs.block_d(head_dim),
        "HAS_DLSE": has_dlse,
    }
    return Launch(_delta_kernel, arguments)


def _source_arguments(config: configs.LaunchConfig, sources: dict[str, Like]) -> dict[str, Any]:
    """Return the arguments for tensors that are read: all by descriptor or all by pointer."""
    described = _descriptors(config, sources) if config.tma else None
    arguments: dict[str, Any] = {"TMA": described is not None}
    for name, x in sources.items():
        arguments[name] = ADDRESS if described is None else described[name]
        # A descriptor holds the strides itself; constant ones keep the kernel from recompiling.
        arguments[f"{name}_strides"] = strides(x) if described is None else (0, 0, 0)
    return arguments


def _descriptors(
    config: configs.LaunchConfig, sources: dict[str, Like]
) -> dict[str, Described] | None:
    """Return a descriptor of each tensor, None if the TMA cannot address one of them."""
    described = {}
    for name, x in sources.items():
        rows = config.block_n if name in ("k", "v") else config.block_m
        descriptor = _descriptor(x, rows)
        if descriptor is None:
            return None
        described[name] = descriptor
    return described


def _descriptor(x: Like, rows: int) -> Described | None:
    """Describe x [B, L, H, D] to the TMA as [B, H, L, D] with box [1, 1, rows, block_d(D)].

    The leading ones fold away: the load is one tile. None if the TMA cannot address x.
    """
    shape_and_strides = tma_shape(x)
    if shape_and_strides is None:
        return None
    box = [1, 1, rows, configs.block_d(x.shape[3])]
    return Described(lambda base: TensorDescriptor(base, *shape_and_strides, box))


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
