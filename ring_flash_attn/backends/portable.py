"""The portable kernels: their launches, kept by what they depend on, and a step's backward."""

from functools import lru_cache, partial
from typing import Any

from triton.tools.tensor_descriptor import TensorDescriptor

from ..kernels import configs
from ..kernels.delta import _delta_kernel
from ..kernels.dkv import _bwd_kernel_dkv
from ..kernels.dq import _bwd_kernel_dq
from ..kernels.forward import _fwd_kernel
from .base import Step
from .descriptors import Like, tma_shape
from .documents import Side
from .launch import ADDRESS, Described, Launch, strides
from .two_kernels import TwoKernelStep
from .work import BackwardInputs, StepTables, heads, source_arguments

DELTA_ROWS = 64  # of a program of _delta_kernel


def side_of(pass_: str, config: configs.LaunchConfig) -> Side:
    """Return what a pass cuts into tiles."""
    return Side(True, config.block_n) if pass_ == "dkv" else Side(False, config.block_m)


def backward_step(
    chosen: dict[str, configs.LaunchConfig],
    step_plan: Step,
    inputs: BackwardInputs,
    dq: Like,
    tables: StepTables,
) -> TwoKernelStep:
    """Return a step's backward for such inputs and dq.

    Args:
        chosen: the launch configuration of each pass.
    """
    of_dq, of_dkv = chosen["dq"], chosen["dkv"]
    return TwoKernelStep(
        step_plan,
        tables,
        side_of("dq", of_dq),
        side_of("dkv", of_dkv),
        dq_launch(of_dq, inputs, dq, not step_plan.first),
        partial(dkv_launch, of_dkv, inputs),
    )


@lru_cache(maxsize=1024)
def forward_launch(
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
def dq_launch(config: configs.LaunchConfig, inputs: BackwardInputs, dq: Like, add: bool) -> Launch:
    """Return the launch of _bwd_kernel_dq for such inputs and dq."""
    outputs = inputs.statistics() | {
        "dq_ptr": ADDRESS,
        "result_ptr": ADDRESS,
        "dq_strides": strides(dq),
        "ADD": add,
    }
    scale, documents = inputs.softmax_scale, inputs.documents
    return _portable(_bwd_kernel_dq, "dq", config, scale, inputs.sources(), outputs, documents)


@lru_cache(maxsize=1024)
def dkv_launch(
    config: configs.LaunchConfig, inputs: BackwardInputs, dk: Like, dv: Like, add: bool, span: int
) -> Launch:
    """Return the launch of _bwd_kernel_dkv for such inputs and dk, dv."""
    outputs = (
        inputs.statistics()
        | source_arguments(span)
        | {
            "dk_ptr": ADDRESS,
            "dv_ptr": ADDRESS,
            "dk_strides": strides(dk),
            "dv_strides": strides(dv),
            "ADD": add,
            "COPIES": config.copies,
        }
    )
    scale, documents = inputs.softmax_scale, inputs.documents
    return _portable(_bwd_kernel_dkv, "dkv", config, scale, inputs.sources(), outputs, documents)


@lru_cache(maxsize=256)
def delta_launch(out: Like, dout: Like, has_dlse: bool) -> Launch:
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
    arguments = heads(softmax_scale, q, k, side_of(pass_, config)) | outputs
    arguments |= _source_arguments(config, sources)
    arguments |= {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": configs.block_d(q.shape[3]),
        "DOCUMENTS": documents,
    }
    return Launch(kernel, arguments, num_warps=config.num_warps, num_stages=config.num_stages)


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
