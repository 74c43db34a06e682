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
from .descriptors import Like, key_of, like
from .documents import Side
from .launch import Launch, on, targets
from .work import (
    BackwardInputs,
    BackwardStep,
    StepTables,
    ends_inside,
    identity,
    kept,
    one_entry,
    start_on,
)

_KEPT_STEPS = 512  # of forward and of backward


class TritonBackend:
    """Runs the kernels of kernels/, which accumulate in float32 and write the state themselves.

    The first call with a plan uploads its tables, a host sync, and a kernel compiles when it is
    first used; after that a step only launches. Capture a CUDA graph after such a first call.

    What a step launches is found once for tensors of one shape, strides and dtype: finding it takes
    the host several times as long as launching it.
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
        self._forwards: dict[tuple, _ForwardStep] = {}
        self._backwards: dict[tuple, BackwardStep] = {}

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
        alike = key_of(q), key_of(k), key_of(v), key_of(out)
        key = attention, identity(step_plan), q.get_device(), *alike, lse.stride()
        found = self._forwards.get(key)
        if found is None:
            tensors = tuple(Like(*x) for x in alike)
            found = self._forward_step(attention, step_plan, tensors, lse.stride(), q.device)
            _keep(self._forwards, key, found)
        given = {"q": q, "k": k, "v": v, "state": out, "out_ptr": out, "result_ptr": result}
        given["lse_ptr"] = lse
        with on(q.device):
            found.run(step_plan, given)

    def _forward_step(
        self,
        attention: Attention,
        step_plan: Step,
        tensors: tuple[Like, ...],
        lse_strides: tuple[int, ...],
        device: torch.device,
    ) -> "_ForwardStep":
        """Return what computes a step for q, k, v, out like these."""
        documents, carry = ends_inside(step_plan), not step_plan.first
        choices = self._choices(attention, tensors[0], device, documents)
        common = attention.softmax_scale, tensors, lse_strides, carry, documents
        tables, alive = StepTables(choices.sides, device), kept(step_plan)
        config = choices.hopper_forward
        if config is not None:
            side = Side(False, config.block_m)
            start = hopper.forward_launch(config, *common, one_entry(step_plan, side))
            if start is not None:
                return _ForwardStep(start, side, tables, alive, device)
        config = choices.configs["forward"]
        start = portable.forward_launch(config, *common)
        return _ForwardStep(start, portable.side_of("forward", config), tables, alive)

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
        assert saved.delta is not None, "saved comes from another backend's prepare_backward"
        q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
        sources = {"q": q, "k": k, "v": v, "dout": saved.dout}
        alike = tuple(key_of(x) for x in sources.values())
        strides = saved.lse.stride(), saved.delta.stride()
        outputs = tuple(None if x is None else key_of(x) for x in (dq, result))
        key = attention, identity(step_plan), q.get_device(), *alike, *strides, *outputs
        found = self._backwards.get(key)
        if found is None:
            rest = *strides, attention.softmax_scale, ends_inside(step_plan)
            inputs = BackwardInputs._make([*(Like(*x) for x in alike), *rest])
            dq_like, result_like = (None if x is None else Like(*x) for x in outputs)
            found = self._backward_step(
                attention, step_plan, inputs, dq_like, result_like, q.device
            )
            _keep(self._backwards, key, found)
        given = sources | {"lse_ptr": saved.lse, "delta_ptr": saved.delta}
        with on(q.device):
            found.run(step_plan, given, dq, result, dkv_target)

    def _backward_step(
        self,
        attention: Attention,
        step_plan: Step,
        inputs: BackwardInputs,
        dq: Like | None,
        result: Like | None,
        device: torch.device,
    ) -> BackwardStep:
        """Return what computes a step backward for tensors like these."""
        choices = self._choices(attention, inputs.q, device, inputs.documents)
        tables = StepTables(choices.sides, device)
        state = result if dq is None else dq
        assert state is not None, "without a state there must be a result"
        config = choices.hopper_backward
        if config is None or not hopper_backward.addresses(config, inputs, dq):
            return portable.backward_step(choices.configs, step_plan, inputs, state, tables)
        if isinstance(config, WideConfig):
            return hopper_backward.wide_step(config, step_plan, inputs, state, tables)
        return hopper_backward.FusedStep(
            config, attention, step_plan, inputs, dq, result, tables, choices.queries
        )

    def _choices(
        self, attention: Attention, q: Like, device: torch.device, documents: bool
    ) -> "_Choices":
        return _choices(
            self._lookup,
            self._hopper_forward,
            self._hopper_backward,
            attention.deterministic,
            device,
            q.dtype,
            q.shape[3],
            documents,
        )


class _ForwardStep(NamedTuple):
    """A step's forward: all but the addresses, and the tables of documents.

    Attributes:
        start: the launch. side: what it cuts into tiles.
        alive: what the step is known by, see `identity`.
        device: of the Hopper kernel, which runs no more programs than fit; None: another one runs.
    """

    start: Launch
    side: Side
    tables: StepTables
    alive: object
    device: torch.device | None = None

    def run(self, step_plan: Step, given: dict[str, Any]) -> None:
        table = self.tables.of(step_plan, self.side)
        if self.device is None:
            start_on(table, self.start, given)
        else:
            hopper.launch_forward(self.start, self.device, table, given)


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


def _keep(kept: dict[tuple, Any], key: tuple, value: Any) -> None:
    """Keep a step for all calls that are alike. Forgets all where they are too many."""
    if len(kept) >= _KEPT_STEPS:
        kept.clear()
    kept[key] = value


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
