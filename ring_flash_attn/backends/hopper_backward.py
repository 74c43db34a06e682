"""Run the Hopper backward.

Up to head dim 128 one kernel computes all and adds to dq in float32, and another rounds what is
finished. Above it are two kernels, for dq and for dk and dv, like the portable ones.
"""

from collections.abc import Callable
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
from .descriptors import address, addressable
from .documents import Side
from .launch import launch, strides, targets
from .work import work

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
    config: BackwardConfig | WideConfig,
    sources: dict[str, Tensor],
    dq: Tensor | None,
    documents: bool,
) -> bool:
    """Return whether the kernels can address these tensors, which views of others may forbid.

    Args:
        sources: q, k, v, dout, each [B, L, H, D].
        dq: the state [B, L, H, D]; None: there is none.
    """
    tensors = [*sources.values()]
    if isinstance(config, BackwardConfig) and dq is not None:
        if dq.dtype != torch.float32:
            return False
        tensors.append(dq)
    return all(addressable(address(x), documents) for x in tensors)


class HopperStep(NamedTuple):
    """One step's backward.

    Fused, dq is summed over the programs by atomic adds, so it is zeroed before the first step, and
    rows that a step finishes are rounded to the result after it. That is one pass over the float32
    dq each (4 bytes written, and 4 read and 2 written a number, once a call), and a plan of one
    step has a float32 dq too.

    Attributes:
        sources: q, k, v, dout by name, their last dimension contiguous.
        queries: what cuts the rows of queries into tiles. sides: all that the call will want.
    """

    config: BackwardConfig | WideConfig
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

    @property
    def documents(self) -> bool:
        """Whether the rows are packed documents, whose lengths the device knows."""
        return isinstance(self.step_plan, DocumentsStep)

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
        if self.step_plan.first or not getattr(dkv_target, "late", True):
            self.launch_fused(config, summed, dkv_target())
        else:
            # Added after the kernel, which would have to wait for the accumulator to arrive. That
            # is 20 bytes of memory traffic a number of dk and dv, for a transfer that is hidden.
            own = GradTarget(_float32_like(k), _float32_like(k), add=False)
            self.launch_fused(config, summed, own)
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

    def launch_fused(self, config: BackwardConfig, dq: Tensor, target: GradTarget) -> None:
        """Add to dq, float32, and store or add dk and dv."""
        rows, width = config.block_m, hopper.block_d(dq.shape[3])
        boxes = {"q": (rows, width), "k": (64, width), "v": (64, width), "dout": (rows, width)}
        arguments = self._work(self.keys, with_dq=True) | self._statistics() | _gradients(target)
        arguments |= {name: self._describe(self.sources[name], boxes[name]) for name in boxes}
        arguments |= {
            "dq": self._describe(dq, (64, width // 2 if rows == 64 else width)),
            "rotate": int(config.rotate and self._full()),
            "BLOCK_D": width,
            "BLOCK_M": rows,
            "DOCUMENTS": self.documents,
            "Q_STAGES": config.q_stages,
            "DOUT_STAGES": config.dout_stages,
            "DS_STAGES": config.ds_stages,
            "DQ_STAGES": config.dq_stages,
            "EARLY": config.early,
            "OTHER_REGISTERS": config.registers[2],
        }
        _launch(_hopper_bwd_kernel, config, arguments)

    def _launch_dq(self, config: WideConfig, dq: Tensor, result: Tensor) -> None:
        """Store or add dq, in the result where it is finished."""
        arguments = self._work(self.queries) | self._statistics() | self._wide_sources()
        arguments |= {
            "dq_ptr": dq,
            "result_ptr": result,
            "dq_strides": _strides_of_batches(dq),
            "ADD": not self.step_plan.first,
            "STAGES": config.stages,
            "PRODUCER_REGISTERS": config.registers[2],
        }
        _launch(_hopper_dq_kernel, config, arguments)

    def _launch_dkv(self, config: WideConfig, target: GradTarget) -> None:
        """Store or add dk and dv."""
        arguments = self._work(self.keys) | self._statistics() | self._wide_sources()
        arguments |= _gradients(target) | {"PRODUCER_REGISTERS": config.registers[2]}
        _launch(_hopper_dkv_kernel, config, arguments)

    def _wide_sources(self) -> dict[str, Any]:
        """Return what both wide kernels are told of q, k, v and dout."""
        width = hopper.block_d(self.sources["q"].shape[3])
        described = {name: self._describe(x, (64, width)) for name, x in self.sources.items()}
        return described | {"BLOCK_D": width, "DOCUMENTS": self.documents}

    def _statistics(self) -> dict[str, Any]:
        """Return what every kernel is told of lse and delta."""
        lse, delta = self.saved.lse, self.saved.delta
        assert delta is not None
        return {
            "lse_ptr": lse,
            "delta_ptr": delta,
            "lse_stride_batch": lse.stride(0),
            "lse_stride_head": lse.stride(1),
            "delta_stride_batch": delta.stride(0),
            "delta_stride_head": delta.stride(1),
        }

    def _describe(self, x: Tensor, box: tuple[int, int]) -> Any:
        """Return a descriptor of x with boxes of so many rows and columns."""
        rows, columns = box
        shape = (1, 1, rows, 1, columns) if self.documents else (1, 1, rows, columns)
        described = hopper.describe(x, shape, cut=self.documents)
        assert described is not None, "addresses() has refused this"
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


def _launch(kernel: Any, config: BackwardConfig | WideConfig, arguments: dict[str, Any]) -> None:
    """Launch one program a tile and head."""
    at_launch, consumer, _ = config.registers
    grid = arguments["n_tiles"] * arguments["n_heads"], 1, 1
    arguments["CONSUMER_REGISTERS"] = consumer
    hopper.launch(kernel, grid, arguments, num_warps=4, maxnreg=at_launch)


def _gradients(target: GradTarget) -> dict[str, Any]:
    """Return what a kernel is told of dk and dv."""
    return {
        "dk_ptr": target.dk,
        "dv_ptr": target.dv,
        "dk_strides": _strides_of_batches(target.dk),
        "dv_strides": _strides_of_batches(target.dv),
        "ADD": target.add,
    }


def _float32_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.float32, device=x.device)


def _strides_of_batches(x: Tensor) -> tuple[int, int, int]:
    """Return the strides of a gradient as the kernels multiply them: below 2**31.

    That of a single batch is never taken.
    """
    batch, head, row = strides(x)
    batch = batch if x.shape[0] > 1 else 0
    assert max(batch, head, row) < 1 << 31, f"a stride of {tuple(x.stride())} is too wide"
    return batch, head, row
