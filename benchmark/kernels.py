"""One-device attention as plain calls: the library's Triton kernels and their flash rivals.

What `benchmark_kernels.py` times, and what `benchmark_comparison.py` measures a ring's share of.
"""

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import timing  # makes the library and the oracle importable
import torch
from packing import BATCH, Packing
from torch import Tensor

import oracle
from ring_flash_attn.backends.aten import AtenBackend
from ring_flash_attn.backends.base import GradTarget, Saved, Step
from ring_flash_attn.backends.flash import Flash3Backend, Flash4Backend
from ring_flash_attn.backends.varlen import Varlen, inexpressible, varlen_of
from ring_flash_attn.core.attention import Attention
from ring_flash_attn.core.packed import Documents, DocumentsStep, plan_packed
from ring_flash_attn.core.plan import StepPlan, plan_local

IMPLEMENTATIONS = ("triton", "triton-portable", "fa2", "cudnn", "fa3", "fa4")
FLASH = {"fa2": AtenBackend(), "fa3": Flash3Backend(), "fa4": Flash4Backend()}
aten = torch.ops.aten


class Inputs(NamedTuple):
    """q, dout [B, S, H, D], k, v [B, S, Hk, D], the mask and what is computed."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    attention: Attention

    @property
    def plan(self) -> StepPlan:
        return plan_local(self.attention, self.q.shape[1], self.k.shape[1])


class Kernel(NamedTuple):
    """One row: a pass of an implementation.

    Attributes:
        state: whether it folds into an fp32 state, or adds to gradients, that are there already.
        run: the timed call.
        result: runs it once and returns (out,) or (dq, dk, dv), [B, S, heads, D].
    """

    impl: str
    pass_: str
    state: bool
    run: Callable[[], object]
    result: Callable[[], tuple[Tensor, ...]]


def use_peers() -> Path:
    """Make the folder that $PEERS names (.peers) importable, after what is installed."""
    folder = Path(os.environ.get("PEERS", timing.ROOT / ".peers")).resolve()
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    runtime = folder / "libcudart.so.12"
    if runtime.exists() and torch.cuda.is_available():
        # What FlashAttention-3's library links to: once loaded, the linker finds it by its name.
        ctypes.CDLL(str(runtime))
    return folder


def draw(
    batch: int,
    length: int,
    heads: int,
    key_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    attention: Attention,
    seed: int = 0,
) -> Inputs:
    """Draw normal inputs on the current GPU, or on the CPU where there is none."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    generator = torch.Generator(device).manual_seed(seed)

    def normal(n: int) -> Tensor:
        shape = batch, length, n, head_dim
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    return Inputs(normal(heads), normal(key_heads), normal(key_heads), normal(heads), attention)


def shortened(inputs: Inputs, length: int) -> Inputs:
    """Return the first rows of every tensor."""
    return Inputs(*(x[:, :length].contiguous() for x in inputs[:4]), inputs.attention)


def truth(inputs: Inputs) -> oracle.Result:
    """Return dense attention in float64."""
    rows = list(range(inputs.q.shape[1]))
    causal, window = inputs.attention.causal, inputs.attention.window
    mask = oracle.visible(rows, rows, causal, window, inputs.q.device)
    q, k, v, dout = (x.double() for x in inputs[:4])
    return oracle.chunked(q, k, v, mask, dout)


def relative_error(got: tuple[Tensor, ...], want: oracle.Result) -> float:
    """Return the relative error of (out,), or the largest of (dq, dk, dv)."""
    expected = (want.out,) if len(got) == 1 else (want.dq, want.dk, want.dv)
    return max(oracle.errors(x, y).relative for x, y in zip(got, expected, strict=True))


def documents_step(inputs: Inputs, packing: Packing, step: int = 0) -> DocumentsStep:
    """Return the packed rows of a batch of one as a step, whose tables are not filled yet.

    Args:
        step: 0 stores, any other continues a state.
    """
    plan = plan_packed(inputs.attention, "contiguous", 1, 0)
    plan = plan._replace(steps=(plan.steps[0]._replace(step=step),))
    cu_seqlens = torch.tensor(packing.cu_seqlens, dtype=torch.int32, device=inputs.q.device)
    rows, longest = inputs.q.shape[1], max(packing.lengths)
    return DocumentsStep(plan, 0, Documents(cu_seqlens, cu_seqlens, rows, rows, longest, longest))


def kernels(impl: str, inputs: Inputs, packing: Packing | None = None) -> list[Kernel]:
    """Return every pass of an implementation.

    Args:
        packing: the documents in a batch of one; None or `batch` for sequences of their own.

    Raises:
        NotImplementedError: it cannot run here or not on these inputs; the message says why.
    """
    packing = None if packing is None or packing.name == BATCH else packing
    if impl == "triton":
        return triton_kernels(inputs, packing)
    if impl == "triton-portable":
        return triton_kernels(inputs, packing, portable=True)
    if impl == "cudnn":
        if packing is not None:
            raise NotImplementedError("torch's cuDNN attention takes no packed documents")
        return _cudnn_kernels(inputs)
    backend = FLASH[impl]
    _check(backend, inputs)
    block = inputs.plan.blocks[0] if packing is None else _varlen(backend, inputs, packing)
    attention, (q, k, v) = inputs.attention, inputs[:3]

    def forward() -> tuple[Tensor, Tensor]:
        return backend.kernel_forward(attention, block, q, k, v)

    saved = Saved(inputs.dout, *forward(), None, None)

    def backward() -> tuple[Tensor, Tensor, Tensor]:
        return backend.kernel_backward(attention, block, saved, q, k, v)

    return [
        Kernel(impl, "fwd", False, forward, lambda: forward()[:1]),
        Kernel(impl, "bwd", False, backward, backward),
    ]


def _varlen(backend, inputs: Inputs, packing: Packing) -> Varlen:
    """Return the documents as a flash kernel takes them."""
    step = documents_step(inputs, packing)
    reasons = backend.lacks_varlen(inputs.q.device) + inexpressible(step.plan, step.documents)
    if reasons:
        raise NotImplementedError("; ".join(reasons))
    return varlen_of(step)


def triton_kernels(
    inputs: Inputs, packing: Packing | None = None, portable: bool = False, backend=None
) -> list[Kernel]:
    """Return the kernels that the library runs here, storing and continuing an fp32 state.

    Forward that stores writes the input's dtype, as its peers do. Backward is delta, dQ and dKV
    with float32 gradients. The tables of packed documents are filled before: once a call, for all
    steps, is how the library does it.

    Args:
        portable: the portable ones, also where the library has others for the part.
        backend: a TritonBackend with rows of its own in place of the library's.

    Raises:
        NotImplementedError: as kernels.
    """
    from ring_flash_attn.backends.triton import TritonBackend

    impl, backend = "triton", backend or TritonBackend()
    if portable:
        impl = "triton-portable"
        backend = TritonBackend(hopper_forward=False, hopper_backward=False)
    _check(backend, inputs)
    attention = inputs.attention
    plan, again = _steps(inputs, packing)
    q, k, v, dout, _ = inputs
    batch, length, heads, _ = q.shape

    def forward(dtype: torch.dtype = q.dtype) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(q, dtype=dtype)
        lse = torch.empty((batch, heads, length), dtype=torch.float32, device=q.device)
        backend.forward(attention, plan, q, k, v, out, lse)
        return out, lse

    out, lse = forward()
    state = forward(torch.float32)

    def fold() -> tuple[Tensor]:
        # The same keys once more: out stays what it is, lse grows.
        backend.forward(attention, again, q, k, v, *state)
        return state[:1]

    def backward(grads: tuple[Tensor, ...] | None = None) -> tuple[Tensor, ...]:
        adds = grads is not None
        dq, dk, dv = grads or (torch.empty_like(x, dtype=torch.float32) for x in (q, k, v))
        saved = backend.prepare_backward(dout, out, lse, None)
        target = GradTarget(dk, dv, adds)
        backend.backward(attention, again if adds else plan, saved, q, k, v, dq, lambda: target)
        return dq, dk, dv

    sums = tuple(torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))

    def add_once() -> tuple[Tensor, ...]:
        for x in sums:
            x.zero_()
        return backward(sums)

    return [
        Kernel(impl, "fwd", False, forward, lambda: forward()[:1]),
        Kernel(impl, "fwd", True, fold, fold),
        Kernel(impl, "bwd", False, backward, backward),
        Kernel(impl, "bwd", True, lambda: backward(sums), add_once),
    ]


def _steps(inputs: Inputs, packing: Packing | None) -> tuple[Step, Step]:
    """Return the step that stores, and the one that continues a state."""
    if packing is None:
        return inputs.plan, inputs.plan._replace(step=1)
    return documents_step(inputs, packing), documents_step(inputs, packing, step=1)


def _cudnn_kernels(inputs: Inputs) -> list[Kernel]:
    """Return torch's cuDNN attention, keys repeated beforehand for grouped heads."""
    q, k, v, dout, attention = inputs
    if not q.is_cuda:
        raise NotImplementedError("runs on cuda, got cpu")
    if attention.window != (-1, -1):
        raise NotImplementedError("torch's cuDNN attention takes no window")
    key_heads = k.shape[2]
    group = q.shape[2] // key_heads
    scale, causal = attention.softmax_scale, attention.causal
    repeated = (x.repeat_interleave(group, 2) if group > 1 else x for x in (k, v))
    q, k, v, dout = (x.transpose(1, 2) for x in (q, *repeated, dout))

    def forward() -> tuple:
        return aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )

    out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = forward()

    def backward() -> tuple[Tensor, Tensor, Tensor]:
        positional = (dout, q, k, v, out, lse, seed, offset, None, cum_q, cum_k, max_q, max_k)
        return aten._scaled_dot_product_cudnn_attention_backward(
            *positional, 0.0, causal, scale=scale
        )

    def gradients() -> tuple[Tensor, ...]:
        dq, dk, dv = (x.transpose(1, 2).float() for x in backward())
        return dq, *(x.unflatten(2, (key_heads, group)).sum(3) for x in (dk, dv))

    return [
        Kernel("cudnn", "fwd", False, forward, lambda: (forward()[0].transpose(1, 2),)),
        Kernel("cudnn", "bwd", False, backward, gradients),
    ]


def _check(backend, inputs: Inputs) -> None:
    reasons = backend.unsupported(inputs.attention, inputs.q, inputs.k, inputs.v)
    if reasons:
        raise NotImplementedError("; ".join(reasons))
