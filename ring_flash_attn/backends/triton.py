"""Triton kernels that fold a step into the state themselves: sm_80 and up, or the interpreter."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.attention import Attention
from ..kernels import configs
from ..kernels.hopper.configs import (
    BackwardConfig,
    ForwardConfig,
    WideConfig,
    backward_config,
    forward_config,
)
from ..kernels.tile import INTERPRETED
from . import hopper, hopper_backward, portable
from .base import GradTarget, Saved, Step
from .descriptors import like
from .documents import Side
from .launch import Launch, on, targets
from .work import backward_inputs, ends_inside, one_entry, span_of, tables


class TritonBackend:
    """Runs the kernels of kernels/, which accumulate in float32 and write the state themselves.

    The first call with a plan uploads its tables, a host sync, and a kernel compiles when it is
    first used; after that a step only launches. Capture a CUDA graph after such a first call.
    """

    name = "triton"
    reads_documents = True
    merges = True

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
        documents = ends_inside(step_plan)
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
            start = portable.forward_launch(
                config, attention.softmax_scale, tensors, lse.stride(), carry, documents
            )
            given |= tables(step_plan, portable.side_of("forward", config), choices.sides, q.device)
            _launch(start, given)

    def prepare_backward(
        self, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None
    ) -> Saved:
        """As Backend.prepare_backward, with delta [B, H, L] float32 from a kernel."""
        dout, out = _unit_stride(dout), _unit_stride(out)
        dlse = None if dlse is None else dlse.contiguous()
        batch, length, heads, _ = out.shape
        delta = torch.empty((batch, heads, length), dtype=torch.float32, device=out.device)
        start = portable.delta_launch(like(out), like(dout), dlse is not None)
        given = {"out_ptr": out, "dout_ptr": dout, "dlse_ptr": dlse, "delta_ptr": delta}
        with on(out.device):
            start(-(-length // portable.DELTA_ROWS) * batch * heads, given)
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
        q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
        documents = ends_inside(step_plan)
        choices = self._choices(attention, q, documents)
        sources = {"q": q, "k": k, "v": v, "dout": saved.dout}
        inputs = backward_inputs(attention, saved, sources, documents)
        config = choices.hopper_backward
        with on(q.device):
            if config is not None and hopper_backward.addresses(config, inputs, dq):
                cut = choices.queries, choices.sides
                step = hopper_backward.HopperStep(
                    config, attention, step_plan, saved, sources, inputs, *cut
                )
                step.run(dq, result, dkv_target)
                return
            dq, result = targets(dq, result)
            given = sources | {"lse_ptr": saved.lse, "delta_ptr": saved.delta}
            config = choices.configs["dq"]
            start = portable.dq_launch(config, inputs, like(dq), not step_plan.first)
            given |= {"dq_ptr": dq, "result_ptr": result}
            side = portable.side_of("dq", config)
            _launch(start, given | tables(step_plan, side, choices.sides, q.device))
            target = dkv_target()
            config = choices.configs["dkv"]
            span = span_of(step_plan, target)
            start = portable.dkv_launch(
                config, inputs, like(target.dk), like(target.dv), target.add, span
            )
            given |= {"dk_ptr": target.dk, "dv_ptr": target.dv, "offsets_ptr": target.offsets}
            side = portable.side_of("dkv", config)
            _launch(start, given | tables(step_plan, side, choices.sides, q.device))

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
    sides = {x: portable.side_of(x, config) for x, config in chosen.items()}
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


def _launch(start: Launch, given: dict[str, Any]) -> None:
    """Launch one program a tile and head."""
    start(given["n_tiles"] * start.arguments["n_heads"], given)


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
