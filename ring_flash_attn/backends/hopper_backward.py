"""Run the Hopper backward: one kernel adds to dq in float32, one more rounds what is finished."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.attention import Attention
from ..core.packed import DocumentsStep
from ..kernels.configs import block_d
from ..kernels.hopper.configs import BackwardConfig, backward_config
from ..kernels.rows import _rows_kernel
from . import hopper
from .base import GradTarget, Saved, Step
from .descriptors import cut_shape, tma_shape
from .documents import Side
from .launch import launch, strides
from .work import work

if hopper.SUPPORTED:
    from ..kernels.hopper.backward import _hopper_bwd_kernel

_ROWS = 32  # that _rows_kernel moves at a time


def unsupported(
    arch: int, dtype: torch.dtype, head_dim: int, deterministic: bool = False
) -> list[str]:
    """Return every reason why it cannot run and the portable kernels do; empty if it can.

    Args:
        arch: compute capability as kernels.configs counts it.
        deterministic: whether gradients must be bitwise repeatable.
    """
    reasons = hopper.unsupported_part(arch, dtype)
    if backward_config(head_dim) is None:
        reasons.append(f"it takes head dims from 40 to 128 in steps of 8, not {head_dim}")
    if deterministic:
        reasons.append("it sums dq in any order, and deterministic asks for one")
    return reasons


def addresses(sources: dict[str, Tensor], dq: Tensor | None, documents: bool) -> bool:
    """Return whether the kernel can address these tensors, which views of others may forbid.

    Args:
        sources: q, k, v, dout, each [B, L, H, D].
        dq: the state [B, L, H, D]; None: a tensor of our own.
    """
    shape = cut_shape if documents else tma_shape
    if dq is not None and (dq.dtype != torch.float32 or shape(dq) is None):
        return False
    return all(shape(x) is not None for x in sources.values())


class HopperStep(NamedTuple):
    """One step's backward.

    dq is summed over the programs by atomic adds, so it is zeroed before the first step, and rows
    that a step finishes are rounded to the result after it. That is one pass over the float32 dq
    each (4 bytes written, and 4 read and 2 written a number, once a call), and a plan of one step
    has a float32 dq too.

    Attributes:
        sources: q, k, v, dout by name, their last dimension contiguous.
        queries: what cuts the rows of queries into tiles. sides: all that the call will want.
    """

    config: BackwardConfig
    attention: Attention
    step_plan: Step
    saved: Saved
    sources: dict[str, Tensor]
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
        q, k = self.sources["q"], self.sources["k"]
        summed = _float32_like(q) if dq is None else dq
        if self.step_plan.first:
            summed.zero_()
            self._launch(summed, dkv_target())
        else:
            # Added after the kernel, which would have to wait for the accumulator to arrive. That
            # is 20 bytes of memory traffic a number of dk and dv, for a transfer that is hidden.
            own = GradTarget(_float32_like(k), _float32_like(k), add=False)
            self._launch(summed, own)
            target = dkv_target()
            self._move(own.dk, target.dk, self.keys, ADD=target.add)
            self._move(own.dv, target.dv, self.keys, ADD=target.add)
        if result is None or result is dq:
            return
        if dq is None:
            self._move(summed, result, self.queries)
        elif self._finishes():
            self._move(summed, result, self.queries, FINISHED=True)

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

    def _launch(self, dq: Tensor, target: GradTarget) -> None:
        config, saved = self.config, self.saved
        assert saved.delta is not None
        at_launch, consumer, others = config.registers
        arguments = self._work(self.keys, with_dq=True)
        arguments |= self._descriptors(dq)
        arguments |= {
            "lse_ptr": saved.lse,
            "delta_ptr": saved.delta,
            "dk_ptr": target.dk,
            "dv_ptr": target.dv,
            "lse_stride_batch": saved.lse.stride(0),
            "lse_stride_head": saved.lse.stride(1),
            "delta_stride_batch": saved.delta.stride(0),
            "delta_stride_head": saved.delta.stride(1),
            "dk_strides": _strides_of_batches(target.dk),
            "dv_strides": _strides_of_batches(target.dv),
            "rotate": int(config.rotate and self._full()),
            "BLOCK_D": hopper.block_d(dq.shape[3]),
            "BLOCK_M": config.block_m,
            "ADD": target.add,
            "DOCUMENTS": isinstance(self.step_plan, DocumentsStep),
            "Q_STAGES": config.q_stages,
            "DOUT_STAGES": config.dout_stages,
            "DS_STAGES": config.ds_stages,
            "DQ_STAGES": config.dq_stages,
            "EARLY": config.early,
            "CONSUMER_REGISTERS": consumer,
            "OTHER_REGISTERS": others,
        }
        grid = arguments["n_tiles"] * arguments["n_heads"], 1, 1
        hopper.launch(_hopper_bwd_kernel, grid, arguments, num_warps=4, maxnreg=at_launch)

    def _descriptors(self, dq: Tensor) -> dict[str, Any]:
        """Return descriptors of all that the TMA loads, and of dq, to which it adds."""
        documents = isinstance(self.step_plan, DocumentsStep)
        width, rows = hopper.block_d(dq.shape[3]), self.config.block_m
        boxes = {"q": (rows, width), "k": (64, width), "v": (64, width), "dout": (rows, width)}
        boxes["dq"] = 64, width // 2 if rows == 64 else width
        described = {}
        for name, x in (*self.sources.items(), ("dq", dq)):
            block, columns = boxes[name]
            box = [1, 1, block, 1, columns] if documents else [1, 1, block, columns]
            shape = cut_shape(x) if documents else tma_shape(x)
            described[name] = hopper.describe(x, shape, box)
        return described

    def _move(self, source: Tensor, target: Tensor, side: Side, **constants: bool) -> None:
        """Store source, or with ADD add it, to the target in the rows of a side's tiles."""
        names = "tiles_ptr", "n_tiles", "n_heads", "heads_in_flight", "heads", "HEAD_DIM"
        all_arguments = self._work(side)
        arguments = {name: all_arguments[name] for name in names} | {
            "source_ptr": source,
            "target_ptr": target,
            "source_strides": strides(source),
            "target_strides": strides(target),
            "BLOCK": _ROWS,
            "BLOCK_D": block_d(source.shape[3]),
            "ADD": False,
            "FINISHED": False,
        }
        grid = arguments["n_tiles"] * arguments["n_heads"], 1, 1
        launch(_rows_kernel, grid, arguments | constants)

    def _work(self, side: Side, with_dq: bool = False) -> dict[str, Any]:
        q, k = self.sources["q"], self.sources["k"]
        return work(self.attention, self.step_plan, q, k, side, self.sides, with_dq)


def _float32_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.float32, device=x.device)


def _strides_of_batches(x: Tensor) -> tuple[int, int, int]:
    """Return the strides of dk or dv as the kernel multiplies them: below 2**31.

    That of a single batch is never taken.
    """
    batch, head, row = strides(x)
    batch = batch if x.shape[0] > 1 else 0
    assert max(batch, head, row) < 1 << 31, f"a stride of {tuple(x.stride())} is too wide"
    return batch, head, row
