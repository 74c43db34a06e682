"""Run the Hopper backward.

Up to head dim 128 one kernel computes all and adds to dq in float32, and another rounds what is
finished. Above it are two kernels, for dq and for dk and dv, like the portable ones.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.attention import Attention
from ..core.packed import DocumentsStep
from ..kernels.configs import block_d
from ..kernels.hopper.configs import BackwardConfig, WideConfig, backward_config
from ..kernels.rows import _rows_kernel
from . import hopper
from .base import GradTarget, Saved, Step
from .descriptors import Like, addressable, like
from .documents import Side
from .hopper_choice import Work, config_for, copies_for
from .launch import ADDRESS, Described, Launch, strides, targets
from .work import BackwardInputs, heads, source_arguments, span_of, tables

if hopper.SUPPORTED:
    from ..kernels.hopper.backward import _hopper_bwd_kernel
    from ..kernels.hopper.backward_wide import _hopper_dkv_kernel
    from ..kernels.hopper.backward_wide_dq import _hopper_dq_kernel

_ROWS = 32  # that _rows_kernel moves at a time


def unsupported(
    arch: int,
    dtype: torch.dtype,
    head_dim: int,
    deterministic: bool = False,
    given: BackwardConfig | WideConfig | None = None,
) -> list[str]:
    """Return every reason why it cannot run and the portable kernels do; empty if it can.

    Args:
        arch: compute capability as kernels.configs counts it.
        deterministic: whether gradients must be bitwise repeatable.
        given: runs in place of the checked-in row, also where the portable kernels are faster.
    """
    reasons = hopper.unsupported_part(arch, dtype)
    config = backward_config(head_dim)
    if config is None:
        reasons.append(f"it takes head dims from 40 to 256 in steps of 8, not {head_dim}")
    if given is None and isinstance(config, BackwardConfig) and not config.wins:
        reasons.append(f"the portable kernels are faster at head dim {head_dim}")
    if deterministic and isinstance(config, BackwardConfig):
        reasons.append("it sums dq in any order, and deterministic asks for one")
    return reasons


def addresses(
    config: BackwardConfig | WideConfig, inputs: BackwardInputs, dq: Tensor | None
) -> bool:
    """Return whether the kernels can address these tensors, which views of others may forbid.

    Args:
        dq: the state [B, L, H, D]; None: there is none.
    """
    tensors = [inputs.q, inputs.k, inputs.v, inputs.dout]
    if isinstance(config, BackwardConfig) and dq is not None:
        if dq.dtype != torch.float32:
            return False
        tensors.append(like(dq))
    return all(addressable(x, inputs.documents) for x in tensors)


class HopperStep(NamedTuple):
    """One step's backward.

    Fused, dq is summed over the programs by atomic adds, so it is zeroed before the first step, and
    rows that a step finishes are rounded to the result after it. That is one pass over the float32
    dq each (4 bytes written, and 4 read and 2 written a number, once a call), and a plan of one
    step has a float32 dq too.

    Attributes:
        sources: q, k, v, dout by name, their last dimension contiguous. inputs: what they are like.
        queries: what cuts the rows of queries into tiles. sides: all that the call will want.
    """

    config: BackwardConfig | WideConfig
    attention: Attention
    step_plan: Step
    saved: Saved
    sources: dict[str, Tensor]
    inputs: BackwardInputs
    queries: Side
    sides: tuple[Side, ...]

    @property
    def keys(self) -> Side:
        """What cuts the rows of keys into tiles."""
        return Side(True, self.config.key_rows)

    def run(
        self, dq: Tensor | None, result: Tensor | None, dkv_target: Callable[[], GradTarget]
    ) -> None:
        """Do as Backend.backward, on the current device."""
        if isinstance(self.config, WideConfig):
            self._launch_dq(self.config, *targets(dq, result))
            self._launch_dkv(self.config, dkv_target())
        else:
            self._run_fused(self.config, dq, result, dkv_target)

    def _run_fused(
        self,
        config: BackwardConfig,
        dq: Tensor | None,
        result: Tensor | None,
        dkv_target: Callable[[], GradTarget],
    ) -> None:
        q, k = self.sources["q"], self.sources["k"]
        summed = _float32_like(q) if dq is None else dq
        if self.step_plan.first:
            summed.zero_()
        work = self._work()
        config = config_for(config, work)
        copies = copies_for(work, hopper.multiprocessors(q.device))
        late = not self.step_plan.first and getattr(dkv_target, "late", True)
        if copies == 1 and not late:
            self.launch_fused(config, summed, dkv_target())
        else:
            # Added after the kernel, which would have to wait for the accumulator to arrive. That
            # is 20 bytes of memory traffic a number of dk and dv, for a transfer that is hidden.
            dk, dv = _float32_like(k, copies), _float32_like(k, copies)
            self.launch_fused(config, summed, GradTarget(dk, dv, add=False), copies)
            target = dkv_target()
            for own, total in ((dk, target.dk), (dv, target.dv)):
                self._move(own, total, self.keys, target.offsets, ADD=target.add, COPIES=copies)
        if result is None or result is dq:
            return
        if dq is None:
            self._move(summed, result, self.queries)
        elif self._finishes():
            self._move(summed, result, self.queries, FINISHED=True)

    def _work(self) -> Work:
        q, k = self.inputs.q, self.inputs.k
        n_tiles = tables(self.step_plan, self.keys, self.sides, self.saved.lse.device)["n_tiles"]
        documents = isinstance(self.step_plan, DocumentsStep)
        return Work(
            programs=n_tiles * k.shape[0] * k.shape[2],
            group=q.shape[2] // k.shape[2],
            full=self._full(),
            windowed=_windowed(self.step_plan),
            head_numbers=0 if documents else q.shape[1] * q.shape[3],
        )

    def _finishes(self) -> bool:
        """Return whether the step finishes any rows."""
        step = self.step_plan
        if isinstance(step, DocumentsStep):
            return bool(step.plan.steps[step.index].finished)
        return bool(step.finished)

    def _full(self) -> bool:
        """Return whether every query sees every key of what it meets."""
        if isinstance(self.step_plan, DocumentsStep):
            return not self.attention.masked
        return all(block.full for block in self.step_plan.blocks)

    def launch_fused(
        self, config: BackwardConfig, dq: Tensor, target: GradTarget, copies: int = 1
    ) -> None:
        """Add to dq, float32, and store or add dk and dv, `copies` heads of each for one of k."""
        rotate, span = config.rotate and self._full(), span_of(self.step_plan, target)
        start = _fused_launch(config, self.inputs, like(dq), *_likes(target), span, rotate, copies)
        self._launch(start, self.keys, {"dq": dq} | _given(target))

    def _launch_dq(self, config: WideConfig, dq: Tensor, result: Tensor) -> None:
        """Store or add dq, in the result where it is finished."""
        start = _wide_dq_launch(config, self.inputs, like(dq), not self.step_plan.first)
        self._launch(start, self.queries, {"dq_ptr": dq, "result_ptr": result})

    def _launch_dkv(self, config: WideConfig, target: GradTarget) -> None:
        """Store or add dk and dv."""
        span = span_of(self.step_plan, target)
        start = _wide_dkv_launch(config, self.inputs, *_likes(target), span)
        self._launch(start, self.keys, _given(target))

    def _launch(self, start: Launch, side: Side, given: dict[str, Any]) -> None:
        """Launch one program for each of a side's tiles and each head."""
        given |= self.sources | {"lse_ptr": self.saved.lse, "delta_ptr": self.saved.delta}
        given |= tables(self.step_plan, side, self.sides, self.saved.lse.device)
        start(given["n_tiles"] * start.arguments["n_heads"], given)

    def _move(
        self,
        source: Tensor,
        target: Tensor,
        side: Side,
        offsets: Tensor | None = None,
        **constants: int,
    ) -> None:
        """Store source, or with ADD add it, to the target in the rows of a side's tiles.

        Args:
            offsets: of keys of several sources, as GradTarget has them.
            constants: COPIES: so many heads of source are summed for each of the target.
        """
        q, k, span = self.inputs.q, self.inputs.k, 0 if offsets is None else self.step_plan.span
        start = _rows_launch(q, k, side, like(source), like(target), span, **constants)
        given = {"source_ptr": source, "target_ptr": target, "offsets_ptr": offsets}
        self._launch(start, side, given)


def _windowed(step: Step) -> bool:
    """Return whether a band hides keys on both sides of what queries see, in every block."""
    if isinstance(step, DocumentsStep):
        return False
    bands = ((x, x.k_begin - x.q_end + 1, x.k_end - 1 - x.q_begin) for x in step.blocks)
    return all(lowest < x.lo and x.hi < highest for x, lowest, highest in bands)


def _arguments(
    inputs: BackwardInputs, side: Side, q_rows: int, with_dq: bool = False, copies: int = 1
) -> dict[str, Any]:
    """Return the arguments that every kernel takes.

    Args:
        q_rows: of q and dout that are read at a time; 64 of k and v. Others: as work.heads.
    """
    width = hopper.block_d(inputs.q.shape[3])
    arguments = heads(inputs.softmax_scale, inputs.q, inputs.k, side, with_dq, copies)
    arguments |= inputs.statistics() | {"BLOCK_D": width, "DOCUMENTS": inputs.documents}
    for name, x in inputs.sources().items():
        rows = q_rows if name in ("q", "dout") else 64
        arguments[name] = _describe(x, rows, width, inputs.documents)
    return arguments


def _describe(x: Like, rows: int, columns: int, documents: bool) -> Described:
    """Return how boxes of so many rows and columns of x are read or added to."""
    shape = (1, 1, rows, 1, columns) if documents else (1, 1, rows, columns)
    described = hopper.describe(x, shape, cut=documents)
    assert described is not None, "addresses() has refused this"
    return described


@lru_cache(maxsize=1024)
def _fused_launch(
    config: BackwardConfig,
    inputs: BackwardInputs,
    dq: Like,
    dk: Like,
    dv: Like,
    add: bool,
    span: int,
    rotate: bool,
    copies: int,
) -> Launch:
    """Return the launch of _hopper_bwd_kernel."""
    rows, keys = config.block_m, Side(True, config.key_rows)
    arguments = _arguments(inputs, keys, rows, with_dq=True, copies=copies)
    arguments |= _gradients(dk, dv, add, span)
    arguments |= {
        "dq": _describe(dq, rows, arguments["BLOCK_D"], inputs.documents),
        "copies": copies,
        "rotate": int(rotate),
        "BLOCK_M": rows,
        "Q_STAGES": config.q_stages,
        "DOUT_STAGES": config.dout_stages,
        "DQ_STAGES": config.dq_stages,
        "KEYS_IN_REGISTERS": config.keys_in_registers,
        "HEADS_APART": config.heads_apart,
        "OTHER_REGISTERS": config.registers[2],
    }
    return _with_registers(_hopper_bwd_kernel, config, arguments)


@lru_cache(maxsize=1024)
def _wide_dq_launch(config: WideConfig, inputs: BackwardInputs, dq: Like, add: bool) -> Launch:
    """Return the launch of _hopper_dq_kernel."""
    arguments = _arguments(inputs, Side(False, config.query_rows), 64)
    arguments |= {
        "dq_ptr": ADDRESS,
        "result_ptr": ADDRESS,
        "dq_strides": _strides_of_batches(dq),
        "ADD": add,
        "STAGES": config.stages,
        "QUERY_COLUMNS": config.query_columns,
        "PRODUCER_REGISTERS": config.registers[2],
    }
    return _with_registers(_hopper_dq_kernel, config, arguments)


@lru_cache(maxsize=1024)
def _wide_dkv_launch(
    config: WideConfig, inputs: BackwardInputs, dk: Like, dv: Like, add: bool, span: int
) -> Launch:
    """Return the launch of _hopper_dkv_kernel."""
    arguments = _arguments(inputs, Side(True, config.key_rows), 64)
    arguments |= _gradients(dk, dv, add, span) | {"PRODUCER_REGISTERS": config.registers[2]}
    return _with_registers(_hopper_dkv_kernel, config, arguments)


@lru_cache(maxsize=1024)
def _rows_launch(
    q: Like,
    k: Like,
    side: Side,
    source: Like,
    target: Like,
    span: int,
    ADD: bool = False,
    FINISHED: bool = False,
    COPIES: int = 1,
) -> Launch:
    """Return the launch of _rows_kernel on a side's tiles."""
    all_arguments = heads(1.0, q, k, side)
    names = "tiles_ptr", "n_tiles", "n_heads", "heads_in_flight", "heads", "HEAD_DIM"
    arguments = (
        {name: all_arguments[name] for name in names}
        | source_arguments(span)
        | {
            "source_ptr": ADDRESS,
            "target_ptr": ADDRESS,
            "source_strides": strides(source),
            "target_strides": strides(target),
            "BLOCK": _ROWS,
            "BLOCK_D": block_d(source.shape[3]),
            "ADD": ADD,
            "FINISHED": FINISHED,
            "COPIES": COPIES,
        }
    )
    return Launch(_rows_kernel, arguments)


def _with_registers(
    kernel: Any, config: BackwardConfig | WideConfig, arguments: dict[str, Any]
) -> Launch:
    at_launch, consumer, _ = config.registers
    arguments["CONSUMER_REGISTERS"] = consumer
    return Launch(kernel, arguments, num_warps=4, maxnreg=at_launch)


def _gradients(dk: Like, dv: Like, add: bool, span: int) -> dict[str, Any]:
    """Return what a kernel is told of dk and dv."""
    return source_arguments(span) | {
        "dk_ptr": ADDRESS,
        "dv_ptr": ADDRESS,
        "dk_strides": _strides_of_batches(dk),
        "dv_strides": _strides_of_batches(dv),
        "ADD": add,
    }


def _given(target: GradTarget) -> dict[str, Any]:
    """Return what a launch gives of dk and dv."""
    return {"dk_ptr": target.dk, "dv_ptr": target.dv, "offsets_ptr": target.offsets}


def _likes(target: GradTarget) -> tuple[Like, Like, bool]:
    return like(target.dk), like(target.dv), target.add


def _float32_like(x: Tensor, copies: int = 1) -> Tensor:
    """Return an empty float32 tensor of x's shape [B, L, H, D] with so many heads for each one."""
    batch, length, heads, head_dim = x.shape
    shape = batch, length, heads * copies, head_dim
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def _strides_of_batches(x: Like) -> tuple[int, int, int]:
    """Return the strides of a gradient as the kernels multiply them: below 2**31.

    That of a single batch is never taken.
    """
    batch, head, row = strides(x)
    batch = batch if x.shape[0] > 1 else 0
    assert max(batch, head, row) < 1 << 31, f"a stride of {x.strides} is too wide"
    return batch, head, row
