"""torch's own flash attention as a backend: FlashAttention-2 on CUDA, the fused kernel on CPU.

On CUDA a block's out, dq, dk, dv come rounded to 16 bits and are folded in float32. On CPU the
block results are in the state's dtype.
"""

from functools import lru_cache

import torch
from torch import Tensor

from ..core.attention import Attention
from ..core.plan import Block
from .base import Saved, state_dtype
from .fused import FusedBackend, aligned, names, open_window
from .reference import band_mask
from .varlen import Varlen

_CUDA_DTYPES = (torch.float16, torch.bfloat16)
_CPU_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_MAX_CUDA_HEAD_DIM = 256
# Chips of 99 KiB shared memory, where torch has no backward kernel for head dims 193 to 224.
_SMALL_SHARED_MEMORY = ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))


class AtenBackend(FusedBackend):
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
            reasons.append(f"computes in {names(_CPU_DTYPES)} on cpu, got {q.dtype}")
        return reasons

    def lacks_varlen(self, device: torch.device) -> list[str]:
        if device.type != "cuda":
            return [f"torch's flash attention takes cu_seqlens on cuda only, got {device.type}"]
        return [] if _has_unpadded_lse() else ["this torch pads the lse of packed rows"]

    def kernel_forward(
        self, attention: Attention, block: Block | Varlen, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        if isinstance(block, Block) and not q.is_cuda:
            return _cpu_forward(attention.softmax_scale, block, q, k, v)
        return _cuda_forward(attention.softmax_scale, block, q, k, v)

    def kernel_backward(
        self,
        attention: Attention,
        block: Block | Varlen,
        saved: Saved,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if isinstance(block, Block) and not q.is_cuda:
            return _cpu_backward(attention.softmax_scale, block, saved, q, k, v)
        return _cuda_backward(attention.softmax_scale, block, saved, q, k, v)


def _unsupported_on_cuda(attention: Attention, q: Tensor) -> list[str]:
    reasons = []
    head_dim = q.shape[-1]
    capability = torch.cuda.get_device_capability(q.device)
    if not torch.backends.cuda.is_flash_attention_available():
        reasons.append("this build of torch has no flash attention")
    if capability < (8, 0):
        reasons.append(f"needs sm_80 or newer, got sm_{capability[0]}{capability[1]}")
    if q.dtype not in _CUDA_DTYPES:
        reasons.append(f"computes in {names(_CUDA_DTYPES)} on cuda, got {q.dtype}")
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


@lru_cache(maxsize=1)
def _has_unpadded_lse() -> bool:
    """Whether packed rows have lse [H, T], as the kernel's shape function says."""
    q, cu = torch.empty((4, 1, 8), device="meta"), torch.empty(2, dtype=torch.int32, device="meta")
    _, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, q, q, cu, cu, 3, 3, 0.0, False, False, scale=1.0
    )
    return lse.shape == (1, 4)


def _cuda_forward(
    scale: float, block: Block | Varlen, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    q, k, v = _packed(block, *(aligned(x) for x in (q, k, v)))
    sequences, left, right = _sequences(block, q, k)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        *sequences,
        0.0,
        (left, right) == (-1, 0),
        False,
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )
    return (out, lse) if isinstance(block, Block) else (out.unsqueeze(0), lse.unsqueeze(0))


def _cuda_backward(
    scale: float, block: Block | Varlen, saved: Saved, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dout, out, q, k, v = (aligned(x) for x in (saved.dout.to(q.dtype), saved.out, q, k, v))
    dout, out, q, k, v, lse = _packed(block, dout, out, q, k, v, saved.lse.contiguous())
    sequences, left, right = _sequences(block, q, k)
    no_dropout_state = torch.empty((), dtype=torch.int64, device=q.device)
    grads = torch.ops.aten._flash_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        *sequences,
        0.0,
        (left, right) == (-1, 0),
        no_dropout_state,
        no_dropout_state,
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )
    dq, dk, dv = grads if isinstance(block, Block) else (x.unsqueeze(0) for x in grads)
    return dq, dk, dv


def _packed(block: Block | Varlen, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors of a batch, those of packed documents without the axis B of 1."""
    return tensors if isinstance(block, Block) else tuple(x.squeeze(0) for x in tensors)


def _sequences(block: Block | Varlen, q: Tensor, k: Tensor) -> tuple[tuple, int, int]:
    """Return (cum_seq_q, cum_seq_k, max_q, max_k), left and right."""
    if isinstance(block, Block):
        return (None, None, q.shape[1], k.shape[1]), *open_window(block)
    return tuple(block.sequences.values()), block.left, block.right


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
