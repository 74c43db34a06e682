"""torch's own flash attention as a backend: FlashAttention-2 on CUDA, the fused kernel on CPU.

On CUDA a block's out, dq, dk, dv come rounded to 16 bits and are folded in float32. On CPU the
block results are in the state's dtype.
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from ..core.attention import Attention
from ..core.plan import Block, StepPlan, trim
from .base import GradTarget, Saved, state_dtype
from .blocks import BlockBackend
from .reference import band_mask

_CUDA_DTYPES = (torch.float16, torch.bfloat16)
_CPU_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_MAX_CUDA_HEAD_DIM = 256
# Chips of 99 KiB shared memory, where torch has no backward kernel for head dims 193 to 224.
_SMALL_SHARED_MEMORY = ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))
_CUDA_ALIGNMENT = 8  # elements: the kernels load 16 bytes at a time


class AtenBackend(BlockBackend):
    """One call of torch's flash attention per block, in either direction."""

    name = "aten"

    def unsupported(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> list[str]:
        reasons = []
        if v.shape[-1] != q.shape[-1]:
            reasons.append(f"v must be as wide as q, got {v.shape[-1]} and {q.shape[-1]}")
        if q.device.type == "cuda":
            return reasons + _unsupported_on_cuda(attention, q)
        if q.device.type != "cpu":
            return [*reasons, f"runs on cpu and cuda, got {q.device.type}"]
        if q.dtype not in _CPU_DTYPES:
            reasons.append(f"computes in {_names(_CPU_DTYPES)} on cpu, got {q.dtype}")
        return reasons

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
        super().forward(attention, split_tall(step_plan), q, k, v, out, lse)

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
        super().backward(attention, split_tall(step_plan), saved, q, k, v, dq, dkv_target)

    def attend(
        self, attention: Attention, block: Block, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        forward = _cuda_forward if q.is_cuda else _cpu_forward
        return forward(attention.softmax_scale, block, q, k, v)

    def gradients(
        self, attention: Attention, block: Block, saved: Saved, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        backward = _cuda_backward if q.is_cuda else _cpu_backward
        dq, dk, dv = backward(attention.softmax_scale, block, saved, q, k, v)
        if saved.dlse is None:
            return dq, dk, dv
        more_dq, more_dk = self._gradients_of_lse(attention, block, saved, saved.dlse, q, k, v)
        return dq + more_dq, dk + more_dk, dv

    def _gradients_of_lse(
        self,
        attention: Attention,
        block: Block,
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
        mean_key, block_lse = self.attend(attention, block, q, k, k)
        share = attention.softmax_scale * dlse * torch.exp(block_lse - saved.lse)
        more_dq = mean_key.to(dlse.dtype) * _per_row(share)
        # Scaled to 1 at most, so that float16 neither overflows nor loses a small dlse.
        peak = dlse.abs().amax().clamp_min(torch.finfo(dlse.dtype).tiny)
        weighted = q.to(dlse.dtype) * _per_row(dlse / peak)
        backward = _cuda_backward if q.is_cuda else _cpu_backward
        *_, summed = backward(
            attention.softmax_scale, block, saved._replace(dout=weighted), q, k, v
        )
        return more_dq, summed.to(dlse.dtype) * (attention.softmax_scale * peak)


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


def _unsupported_on_cuda(attention: Attention, q: Tensor) -> list[str]:
    reasons = []
    head_dim = q.shape[-1]
    capability = torch.cuda.get_device_capability(q.device)
    if not torch.backends.cuda.is_flash_attention_available():
        reasons.append("this build of torch has no flash attention")
    if capability < (8, 0):
        reasons.append(f"needs sm_80 or newer, got sm_{capability[0]}{capability[1]}")
    if q.dtype not in _CUDA_DTYPES:
        reasons.append(f"computes in {_names(_CUDA_DTYPES)} on cuda, got {q.dtype}")
    if head_dim % 8 or head_dim > _MAX_CUDA_HEAD_DIM:
        reasons.append(
            f"needs a head dim that 8 divides, at most {_MAX_CUDA_HEAD_DIM}, got {head_dim}"
        )
    elif 192 < head_dim <= 224 and capability in _SMALL_SHARED_MEMORY:
        reasons.append(
            f"has no backward of head dim 193 to 224 on sm_{capability[0]}{capability[1]}, "
            f"got {head_dim}"
        )
    if attention.deterministic:
        reasons.append("its backward takes no deterministic flag on cuda")
    return reasons


def _cuda_forward(
    scale: float, block: Block, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    q, k, v = (_aligned(x) for x in (q, k, v))
    left, right = _open_window(block)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        None,
        None,
        q.shape[1],
        k.shape[1],
        0.0,
        (left, right) == (-1, 0),
        False,
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )
    return out, lse


def _cuda_backward(
    scale: float, block: Block, saved: Saved, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dout, out, q, k, v = (_aligned(x) for x in (saved.dout.to(q.dtype), saved.out, q, k, v))
    left, right = _open_window(block)
    no_dropout_state = torch.empty((), dtype=torch.int64, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        saved.lse.contiguous(),
        None,
        None,
        q.shape[1],
        k.shape[1],
        0.0,
        (left, right) == (-1, 0),
        no_dropout_state,
        no_dropout_state,
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )


def _cpu_forward(
    scale: float, block: Block, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    q, k, v = (_heads_first(x) for x in (q, k, v))
    causal, mask = _cpu_mask(block, q)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=scale
    )
    return out.transpose(1, 2), lse


def _cpu_backward(
    scale: float, block: Block, saved: Saved, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dout, out, q, k, v = (_heads_first(x) for x in (saved.dout, saved.out, q, k, v))
    causal, mask = _cpu_mask(block, q)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, saved.lse, 0.0, causal, attn_mask=mask, scale=scale
    )
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _open_window(block: Block) -> tuple[int, int]:
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


def _cpu_mask(block: Block, q: Tensor) -> tuple[bool, Tensor | None]:
    """Return (causal, attn_mask). The CPU kernel's causal is top-left aligned.

    The mask is 0 or -inf in q's dtype: a bool one raises, and one of another dtype gives wrong
    results in float64 in silence (torch 2.13).
    """
    if block.full:
        return False, None
    if block.hi == block.k_begin - block.q_begin and block.lo == block.k_begin - block.q_end + 1:
        return True, None
    hidden = ~band_mask(block, q.device)
    return False, torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, -torch.inf)


def _heads_first(x: Tensor) -> Tensor:
    """View [B, n, H, D] as [B, H, n, D] in the state's dtype, with D contiguous.

    16-bit inputs are computed in float32: torch's 16-bit CPU kernel leaves lse 4e-5 off (torch
    2.13, an approximate exp), and would round every block. A strided D gives wrong results there.
    """
    x = x.to(state_dtype(x.dtype))
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)


def _aligned(x: Tensor) -> Tensor:
    """Return x [B, n, H, D], copied if the CUDA kernels cannot load its rows 16 bytes at a time."""
    offsets = (x.storage_offset(), *x.stride()[:-1])
    fits = x.stride(-1) == 1 and not any(offset % _CUDA_ALIGNMENT for offset in offsets)
    return x if fits else x.contiguous()


def _per_row(x: Tensor) -> Tensor:
    """View [B, H, n] as [B, n, H, 1]."""
    return x.transpose(1, 2).unsqueeze(-1)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
