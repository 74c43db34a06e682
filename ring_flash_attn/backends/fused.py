"""Backends over a fused flash-attention kernel: one call a block, in either direction.

A subclass gives the two calls, `kernel_forward` and `kernel_backward`, for a block of rows and for
all documents of a packed step. What such kernels share is here: they compute rowsum(dout * out)
inside, know no gradient of lse, and state a band as a bottom-right window.
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from ..core.attention import Attention
from ..core.packed import Documents, DocumentsStep, PackedPlan
from ..core.plan import Block, StepPlan, trim
from .base import GradTarget, Saved, Step
from .blocks import BlockBackend
from .fold import fold, put
from .varlen import Varlen, inexpressible, poison_wrong, varlen_of

_ALIGNMENT = 8  # elements of 16 bits: the CUDA kernels load 16 bytes at a time


class FusedBackend(BlockBackend):
    """One call of a fused kernel per block; for packed documents, where they can be one call, per
    step."""

    merges = False  # a kernel takes the keys of a step as documents side by side

    def kernel_forward(
        self, attention: Attention, block: Block | Varlen, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return (out [B, n, H, D], lse [B, H, n]) of a block; B is 1 where it is a Varlen."""
        raise NotImplementedError

    def kernel_backward(
        self,
        attention: Attention,
        block: Block | Varlen,
        saved: Saved,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return a block's (dq, dk, dv) from the final out and lse, without dlse."""
        raise NotImplementedError

    def lacks_varlen(self, device: torch.device) -> list[str]:
        """Return every reason why `kernel_forward` and `kernel_backward` take no Varlen."""
        raise NotImplementedError

    def needs_lengths(self, plan: PackedPlan, documents: Documents) -> list[str]:
        """Return every reason why a packed call runs document by document; empty if by steps."""
        lacking = self.lacks_varlen(documents.cu_q.device)
        return [*lacking, *inexpressible(plan, documents)]

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
        if isinstance(step_plan, StepPlan):
            return super().forward(attention, step_plan, q, k, v, out, lse, result)
        if not step_plan.sees:
            return None
        varlen, target = varlen_of(step_plan), _target(step_plan, out, result)
        step_out, step_lse = self.attend(attention, varlen, q, k, v)
        if step_lse.shape != lse.shape:
            raise RuntimeError(
                f"{self.name} must return lse {list(lse.shape[1:])} of packed rows, got "
                f"{list(step_lse.shape[1:])}: this version pads it"
            )
        step_lse = step_lse.masked_fill(~varlen.sees, -torch.inf)
        if step_plan.first:
            put(None, step_out, target, varlen.sees)
            lse.copy_(step_lse)
        else:
            assert out is not None
            fold(out, lse, step_out, step_lse, target)
        if step_plan.last:
            poison_wrong(step_plan, target, 1)
            poison_wrong(step_plan, lse, 2)

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
        if isinstance(step_plan, StepPlan):
            return super().backward(attention, step_plan, saved, q, k, v, dq, dkv_target, result)
        if not step_plan.sees:
            return None
        varlen, target = varlen_of(step_plan), _target(step_plan, dq, result)
        if saved.dlse is not None:
            saved = saved._replace(dlse=saved.dlse.masked_fill(~varlen.sees, 0.0))
        step_dq, step_dk, step_dv = self.gradients(attention, varlen, saved, q, k, v)
        put(None if step_plan.first else dq, step_dq, target, varlen.sees)
        if step_plan.last:
            poison_wrong(step_plan, target, 1)
        dkv = dkv_target()
        for x, share in ((dkv.dk, step_dk), (dkv.dv, step_dv)):
            put(x if dkv.add else None, share, x, varlen.seen)

    def blocks_of(self, step_plan: StepPlan) -> tuple[Block, ...]:
        return split_tall(step_plan).blocks

    def attend(
        self, attention: Attention, block: Block | Varlen, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.kernel_forward(attention, block, q, k, v)

    def gradients(
        self,
        attention: Attention,
        block: Block | Varlen,
        saved: Saved,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = self.kernel_backward(attention, block, saved, q, k, v)
        if saved.dlse is None:
            return dq, dk, dv
        more_dq, more_dk = self._gradients_of_lse(attention, block, saved, saved.dlse, q, k, v)
        return dq + more_dq, dk + more_dk, dv

    def _gradients_of_lse(
        self,
        attention: Attention,
        block: Block | Varlen,
        saved: Saved,
        dlse: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return what dlse adds to a block's (dq, dk), in the state's dtype.

        The kernels know no dlse. It adds scale * p * dlse to dscores, p = exp(score - final lse):

            dq_i += scale * dlse_i * sum_j p_ij k_j    a forward whose v is k, rescaled from the
                                                       block's own lse to the final one
            dk_j += scale * sum_i p_ij (dlse_i q_i)    dv of a backward whose dout is dlse * q
        """
        mean_key, block_lse = self.kernel_forward(attention, block, q, k, k)
        share = attention.softmax_scale * dlse * torch.exp(block_lse - saved.lse)
        more_dq = mean_key.to(dlse.dtype) * _per_row(share)
        # Scaled to 1 at most, so that float16 neither overflows nor loses a small dlse.
        peak = dlse.abs().amax().clamp_min(torch.finfo(dlse.dtype).tiny)
        weighted = q.to(dlse.dtype) * _per_row(dlse / peak)
        *_, summed = self.kernel_backward(attention, block, saved._replace(dout=weighted), q, k, v)
        return more_dq, summed.to(dlse.dtype) * (attention.softmax_scale * peak)


def _target(step: DocumentsStep, state: Tensor | None, result: Tensor | None) -> Tensor:
    """Return what a step writes: the result where no later step of this rank sees anything."""
    target = result if result is not None and (step.last or state is None) else state
    assert target is not None, "without a state there must be a result"
    return target


@lru_cache(maxsize=512)
def split_tall(step_plan: StepPlan) -> StepPlan:
    """Cut the blocks that FlashAttention-2 cannot express along query rows, into ones it can.

    It takes a right window of at least the number of keys for an open one, and an open one beside
    a bounded left for exactly that number. Both are wrong for a block of more queries than keys,
    whose first rows then see too much or nothing.
    """
    blocks = [piece for block in step_plan.blocks for piece in _row_pieces(block)]
    return step_plan._replace(blocks=tuple(blocks))


def _row_pieces(block: Block) -> list[Block]:
    """Return the rows that `hi` cuts, those that see all keys, and the rest, each as a block."""
    _, right = block.window
    if block.full or right < block.k_end - block.k_begin:
        return [block]
    cut_above = min(block.q_end, block.k_end - 1 - block.hi)  # the first row that hi leaves whole
    cut_below = max(cut_above, min(block.q_end, block.k_begin - block.lo + 1))
    rows = (block.q_begin, cut_above, cut_below, block.q_end)
    pieces = (trim(block._replace(q_begin=a, q_end=b)) for a, b in pairwise(rows))
    return [piece for piece in pieces if piece is not None]


def open_window(block: Block) -> tuple[int, int]:
    """Return the block's bottom-right window, -1 on a side that hides nothing.

    A side written out as a number takes the kernels' slower path for windows: 1.16 instead of
    0.95 ms, causal forward of (1, 8192, 16, 128), H100, torch 2.11, 2026-11-22.
    """
    left, right = block.window
    if left >= block.k_end - block.k_begin - 1:
        left = -1
    if right >= block.q_end - block.q_begin - 1:
        right = -1
    return left, right


def aligned(x: Tensor) -> Tensor:
    """Return x [B, n, H, D], copied if the CUDA kernels cannot load its rows 16 bytes at a time."""
    offsets = (x.storage_offset(), *x.stride()[:-1])
    fits = x.stride(-1) == 1 and not any(offset % _ALIGNMENT for offset in offsets)
    return x if fits else x.contiguous()


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _per_row(x: Tensor) -> Tensor:
    """View [B, H, n] as [B, n, H, 1]."""
    return x.transpose(1, 2).unsqueeze(-1)
