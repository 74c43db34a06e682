"""Backends whose kernel computes one whole block: fold block results into the state in torch.

A subclass gives `attend` (a block's out and lse) and `gradients` (a block's dq, dk, dv). Triton
kernels do not come here: they fold inside the kernel.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.attention import Attention
from ..core.plan import Block, StepPlan
from .base import GradTarget, Saved


class BlockBackend:
    """Run a step block by block."""

    name = "block"

    def blocks_of(self, step_plan: StepPlan) -> tuple[Block, ...]:
        """Return the step's blocks, cut as this backend's kernel needs them."""
        return step_plan.blocks

    def attend(
        self, attention: Attention, block: Block, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return (out [B, n, H, D], lse [B, H, n]) of q [B, n, H, D], k, v [B, m, Hk, D]."""
        raise NotImplementedError

    def gradients(
        self, attention: Attention, block: Block, saved: Saved, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the block's share (dq, dk, dv), given `saved` cut to the block's query rows."""
        raise NotImplementedError

    def prepare_backward(
        self, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None
    ) -> Saved:
        return Saved(dout, out, lse, dlse, None)

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
        blocks = self.blocks_of(step_plan)
        store = step_plan.first and len(blocks) == 1
        if step_plan.first and not store:
            # Blocks may share rows, so none may assume that it is the first to write one.
            out.zero_()
            lse.fill_(-torch.inf)
        for block in blocks:
            rows, keys = _rows(block), _keys(block)
            block_out, block_lse = self.attend(attention, block, q[:, rows], k[:, keys], v[:, keys])
            if store:
                out[:, rows] = block_out
                lse[:, :, rows] = block_lse
            else:
                fold(out[:, rows], lse[:, :, rows], block_out, block_lse)

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
        # A lone block owns all rows that the step touches; several may share rows and add up.
        blocks = self.blocks_of(step_plan)
        alone = len(blocks) == 1
        if step_plan.first and not alone:
            dq.zero_()
        target = None
        for block in blocks:
            rows, keys = _rows(block), _keys(block)
            block_dq, block_dk, block_dv = self.gradients(
                attention, block, cut(saved, rows), q[:, rows], k[:, keys], v[:, keys]
            )
            _put(dq[:, rows], block_dq, store=step_plan.first and alone)
            if target is None:
                target = dkv_target()
                if not (target.add or alone):
                    target.dk.zero_()
                    target.dv.zero_()
            _put(target.dk[:, keys], block_dk, store=alone and not target.add)
            _put(target.dv[:, keys], block_dv, store=alone and not target.add)


def fold(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merge a block's result into the state in place: the online softmax across blocks.

    A row that saw nothing on either side stays (0, -inf): its weights are 0, never NaN.

    Args:
        out: [B, n, H, D], lse: [B, H, n]: state, read and written.
        block_out: [B, n, H, D], any dtype. block_lse: [B, H, n].
    """
    total = torch.logaddexp(lse, block_lse.to(lse.dtype))
    finite = torch.where(total == -torch.inf, 0.0, total)
    kept = torch.exp(lse - finite).transpose(1, 2).unsqueeze(-1)
    new = torch.exp(block_lse - finite).transpose(1, 2).unsqueeze(-1)
    out.mul_(kept).addcmul_(block_out, new)
    lse.copy_(total)


def _put(where: Tensor, share: Tensor, store: bool) -> None:
    if store:
        where.copy_(share)
    else:
        where.add_(share)


def cut(saved: Saved, rows: slice) -> Saved:
    """Return `saved` for some query rows, as views."""
    return Saved(
        saved.dout[:, rows],
        saved.out[:, rows],
        saved.lse[:, :, rows],
        None if saved.dlse is None else saved.dlse[:, :, rows],
        None if saved.delta is None else saved.delta[:, :, rows],
    )


def _rows(block: Block) -> slice:
    return slice(block.q_begin, block.q_end)


def _keys(block: Block) -> slice:
    return slice(block.k_begin, block.k_end)
