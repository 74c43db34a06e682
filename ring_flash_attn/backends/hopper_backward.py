"""Run the Hopper backward.

Up to head dim 128 one kernel computes all and adds to dq in float32, and another rounds what is
finished. Above it are two kernels, for dq and for dk and dv, like the portable ones.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ..core.attention import Attention
from ..core.packed import DocumentsStep
from ..kernels.configs import block_d
from ..kernels.hopper.configs import BackwardConfig, WideConfig, backward_config
from ..kernels.rows import _rows_kernel
from . import hopper
from .base import GradTarget, Step
from .descriptors import Like, addressable, key_of, like
from .documents import Side
from .hopper_choice import Work, config_for, copies_for
from .launch import ADDRESS, Described, Launch, strides
from .two_kernels import TwoKernelStep
from .work import (
    BackwardInputs,
    StepTables,
    heads,
    kept,
    source_arguments,
    start_on,
    target_key,
    target_likes,
    target_tensors,
)

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


def addresses(config: BackwardConfig | WideConfig, inputs: BackwardInputs, dq: Like | None) -> bool:
    """Return whether the kernels can address these tensors, which views of others may forbid.

    Args:
        dq: what the state [B, L, H, D] is like; None: there is none.
    """
    tensors = [inputs.q, inputs.k, inputs.v, inputs.dout]
    if isinstance(config, BackwardConfig) and dq is not None:
        if dq.dtype != torch.float32:
            return False
        tensors.append(dq)
    return all(addressable(x, inputs.documents) for x in tensors)


class FusedStep:
    """One step's backward up to head dim 128.

    dq is summed over the programs by atomic adds, so it is zeroed before the first step, and rows
    that a step finishes are rounded to the result after it. That is one pass over the float32 dq
    each (4 bytes written, and 4 read and 2 written a number, once a call), and a plan of one step
    has a float32 dq too.

    Args:
        config: a row; the step's work decides the order of heads and the slots of dq.
        dq, result: what the tensors are like that each call brings; None: it brings none.
        queries: what cuts the rows of queries into tiles.
    """

    def __init__(
        self,
        config: BackwardConfig,
        attention: Attention,
        step_plan: Step,
        inputs: BackwardInputs,
        dq: Like | None,
        result: Like | None,
        tables: StepTables,
        queries: Side,
    ) -> None:
        self._alive, self._inputs, self._tables = kept(step_plan), inputs, tables
        self._first = step_plan.first
        self._queries, self._keys = queries, Side(True, config.key_rows)
        full = _full(attention, step_plan)
        work = _work(step_plan, inputs, tables.of(step_plan, self._keys).n_tiles, full)
        self._copies = copies_for(work, hopper.multiprocessors(tables.device))
        self._config, self._rotate = config_for(config, work), config.rotate and full
        # What is finished of dq is rounded to the result, all of it where there is no other step.
        self._rounds = result is not None and (dq is None or _finishes(step_plan))
        self._finished = dq is not None
        self._starts: dict[tuple, Launch] = {}

    def run(
        self,
        step_plan: Step,
        given: dict[str, Tensor],
        dq: Tensor | None,
        result: Tensor | None,
        dkv_target: Callable[[], GradTarget],
    ) -> None:
        """As BackwardStep."""
        summed = _float32_like(given["q"]) if dq is None else dq
        if self._first:
            summed.zero_()
        late = not self._first and getattr(dkv_target, "late", True)
        if self._copies == 1 and not late:
            self._fused(step_plan, given, summed, dkv_target())
        else:
            # Added after the kernel, which would have to wait for the accumulator to arrive. That
            # is 20 bytes of memory traffic a number of dk and dv, for a transfer that is hidden.
            dk, dv = (_float32_like(given["k"], self._copies) for _ in range(2))
            self._fused(step_plan, given, summed, GradTarget(dk, dv, add=False), self._copies)
            target = dkv_target()
            for own, total in ((dk, target.dk), (dv, target.dv)):
                self._add(step_plan, own, total, target)
        if self._rounds and result is not None and result is not dq:
            self._move(step_plan, self._queries, summed, result, FINISHED=self._finished)

    def _fused(
        self,
        step_plan: Step,
        given: dict[str, Tensor],
        dq: Tensor,
        target: GradTarget,
        copies: int = 1,
    ) -> None:
        """Add to dq, float32, and store or add dk and dv, `copies` heads of each for one of k."""
        of_target = target_key(step_plan, target)
        key = key_of(dq), of_target, copies
        start = self._starts.get(key)
        if start is None:
            likes = like(dq), *target_likes(of_target)
            start = _fused_launch(self._config, self._inputs, *likes, self._rotate, copies)
            self._starts[key] = start
        table = self._tables.of(step_plan, self._keys)
        start_on(table, start, given | {"dq": dq} | target_tensors(target))

    def _add(self, step_plan: Step, own: Tensor, total: Tensor, target: GradTarget) -> None:
        """Store or add to one of a target's tensors the sum over the copies of its own."""
        offsets, how = target.offsets, {"ADD": target.add, "COPIES": self._copies}
        self._move(step_plan, self._keys, own, total, offsets, **how)

    def _move(
        self,
        step_plan: Step,
        side: Side,
        source: Tensor,
        target: Tensor,
        offsets: Tensor | None = None,
        **constants: int,
    ) -> None:
        """Store source, or with ADD add it, to the target in the rows of a side's tiles.

        Args:
            offsets: of keys of several sources, as GradTarget has them.
            constants: COPIES: so many heads of source are summed for each of the target.
        """
        span = 0 if offsets is None else step_plan.span
        key = side.keys, key_of(source), key_of(target), span, *constants.values()
        start = self._starts.get(key)
        if start is None:
            q, k = self._inputs.q, self._inputs.k
            start = _rows_launch(q, k, side, like(source), like(target), span, **constants)
            self._starts[key] = start
        given = {"source_ptr": source, "target_ptr": target, "offsets_ptr": offsets}
        start_on(self._tables.of(step_plan, side), start, given)


def wide_step(
    config: WideConfig, step_plan: Step, inputs: BackwardInputs, dq: Like, tables: StepTables
) -> TwoKernelStep:
    """Return a step's backward above head dim 128 for such inputs and dq."""
    return TwoKernelStep(
        step_plan,
        tables,
        Side(False, config.query_rows),
        Side(True, config.key_rows),
        _wide_dq_launch(config, inputs, dq, not step_plan.first),
        partial(_wide_dkv_launch, config, inputs),
    )


def _work(step_plan: Step, inputs: BackwardInputs, n_tiles: int, full: bool) -> Work:
    q, k = inputs.q, inputs.k
    documents = isinstance(step_plan, DocumentsStep)
    return Work(
        programs=n_tiles * k.shape[0] * k.shape[2],
        group=q.shape[2] // k.shape[2],
        full=full,
        windowed=_windowed(step_plan),
        head_numbers=0 if documents else q.shape[1] * q.shape[3],
    )


def _finishes(step_plan: Step) -> bool:
    """Return whether the step finishes any rows."""
    if isinstance(step_plan, DocumentsStep):
        return bool(step_plan.plan.steps[step_plan.index].finished)
    return bool(step_plan.finished)


def _full(attention: Attention, step_plan: Step) -> bool:
    """Return whether every query sees every key of what it meets."""
    if isinstance(step_plan, DocumentsStep):
        return not attention.masked
    return all(block.full for block in step_plan.blocks)


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
