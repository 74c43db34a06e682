"""Backends whose kernel computes one whole block: fold block results into the state in torch.

A subclass gives `attend` (a block's out and lse) and `gradients` (a block's dq, dk, dv). The Triton
attention kernels do not come here: they fold inside the kernel.
"""

from collections.abc import Callable
from itertools import chain, pairwise

import torch
from torch import Tensor

from ..core.attention import Attention
from ..core.plan import Block, StepPlan
from .base import GradTarget, Saved, Step, state_dtype
from .fold import fold, put


class BlockBackend:
    """Run a step block by block."""

    name = "block"
    reads_documents = False
    merges = True

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
        step_plan: Step,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor | None,
        lse: Tensor,
        result: Tensor | None = None,
    ) -> None:
        assert isinstance(step_plan, StepPlan), "this backend takes blocks of rows"
        blocks = self.blocks_of(step_plan)
        alone = len(blocks) == 1
        if step_plan.first and not alone:
            # Blocks may share rows, so none may assume that it is the first to write one.
            out = _zeroed(out, q)
            lse.fill_(-torch.inf)
        for block in blocks:
            rows, keys = _rows(block), _keys(block)
            block_out, block_lse = self.attend(attention, block, q[:, rows], k[:, keys], v[:, keys])
            for part, target in _targets(block, step_plan, alone, out, result):
                mine = slice(part.start - rows.start, part.stop - rows.start)
                if step_plan.first and alone:
                    put(None, block_out[:, mine], target[:, part])
                    lse[:, :, part] = block_lse[:, :, mine]
                else:
                    assert out is not None
                    fold(
                        out[:, part],
                        lse[:, :, part],
                        block_out[:, mine],
                        block_lse[:, :, mine],
                        target[:, part],
                    )
        if not alone:
            _copy_finished(step_plan, out, result)

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
        # A lone block owns all rows that the step touches; several may share rows and add up.
        assert isinstance(step_plan, StepPlan), "this backend takes blocks of rows"
        blocks = self.blocks_of(step_plan)
        alone = len(blocks) == 1
        if step_plan.first and not alone:
            dq = _zeroed(dq, q)
        dkv = None
        for block in blocks:
            rows, keys = _rows(block), _keys(block)
            block_dq, block_dk, block_dv = self.gradients(
                attention, block, cut(saved, rows), q[:, rows], k[:, keys], v[:, keys]
            )
            for part, target in _targets(block, step_plan, alone, dq, result):
                share = block_dq[:, part.start - rows.start : part.stop - rows.start]
                store = step_plan.first and alone
                put(None if store or dq is None else dq[:, part], share, target[:, part])
            if dkv is None:
                dkv = dkv_target()
                sources = ((dkv.dk, dkv.dv), *dkv.others)
                if not (dkv.add or alone):
                    for x in chain.from_iterable(sources):
                        x.zero_()
            # No block has keys of two sources.
            source, first = divmod(block.k_begin, step_plan.span or step_plan.k_len)
            own = slice(first, first + block.k_end - block.k_begin)
            for whole, share in zip(sources[source], (block_dk, block_dv), strict=True):
                x = whole[:, own]
                put(None if alone and not dkv.add else x, share, x)
        if not alone:
            _copy_finished(step_plan, dq, result)


def _zeroed(state: Tensor | None, like: Tensor) -> Tensor:
    """Return the state zeroed, or a new one where the caller keeps none."""
    if state is None:
        return torch.zeros(like.shape, dtype=state_dtype(like.dtype), device=like.device)
    return state.zero_()


def _targets(
    block: Block, step_plan: StepPlan, alone: bool, state: Tensor | None, result: Tensor | None
) -> list[tuple[slice, Tensor]]:
    """Return the block's query rows in parts, each with the tensor that it is written to.

    Of several blocks none knows that it is the last on a row: they write the state, of which
    `_copy_finished` takes what is finished.
    """
    if state is None and alone:
        assert result is not None, "without a state there must be a result"
        return [(_rows(block), result)]
    assert state is not None
    if result is None or not alone:
        return [(_rows(block), state)]
    edges = {block.q_begin, block.q_end}
    edges |= {x for part in step_plan.finished for x in part if block.q_begin < x < block.q_end}
    parts = []
    for begin, end in pairwise(sorted(edges)):
        done = any(low <= begin and end <= high for low, high in step_plan.finished)
        parts.append((slice(begin, end), result if done else state))
    return parts


def _copy_finished(step_plan: StepPlan, state: Tensor | None, result: Tensor | None) -> None:
    if state is None or result is None or result is state:
        return
    for begin, end in step_plan.finished:
        result[:, begin:end] = state[:, begin:end]


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
