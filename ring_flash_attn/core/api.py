"""The library's own entry, and the checks that stand before every public form of call."""

import torch.distributed as dist
from torch import Tensor

from ..backends import select_backend
from ..ranks import ranks_of
from .agree import agreement
from .attention import Attention
from .choose import Route, wanted_exchange
from .function import Call, RingAttention, run_backward, run_forward
from .plan import RingPlan, plan_local, plan_ring
from .traffic import ring_traffic
from .validate import (
    check_attention,
    check_backward,
    check_layouts,
    check_tensors,
    check_transport,
)


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: str = "contiguous",
    backend: str = "native",
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
    group: dist.ProcessGroup | None = None,
    exchange: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend over a sequence sharded across the ranks of `group`.

    Args:
        q: [B, L, H, D], this rank's rows in the order that `layout` gives them.
        k, v: [B, Lk, Hk, D], Hk divides H. Lk may differ from L where nothing is masked.
        layout: `contiguous`, `zigzag` or `stripe`, see `core.layout.Layout`.
        backend: `native`, `triton`, `aten` or `reference`, see `backends.select_backend`.
        softmax_scale: factor on q k^T, > 0; 1 / sqrt(D) if None.
        causal: a query sees no key of a later global position.
        window_size: (left, right) in tokens of global position, -1 for open.
        deterministic: gradients must be bitwise repeatable.
        group: the ranks that hold the sequence; None for the default group.
        exchange: how K, V travel: `ring`, hop by hop over torch.distributed, or `copy-engine`,
            straight between the GPUs of one host, see `core.copy_engine`. None: what the
            environment variable RING_FLASH_ATTN_EXCHANGE says; if it is not set, with backend
            `triton` the copy engine where every rank can, else the ring.

    Returns:
        out [B, L, H, D] in q's dtype and lse [B, H, L], natural log, float32 (float64 for
        float64). Both are differentiable. A query that sees no key has out 0 and lse -inf.

    Raises:
        TypeError, ValueError: a bad argument.
        NotImplementedError: no backend of that name runs it, or not the exchange asked for; lists
            every reason.
        All are raised before anything is sent.
    """
    with agreement(group, q) as same:
        call = ring_call(
            q,
            k,
            v,
            layout,
            backend,
            group,
            same,
            exchange,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            deterministic=deterministic,
        )
    return RingAttention.apply(q, k, v, call)


def ring_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: str,
    backend: str,
    group: dist.ProcessGroup | None,
    same: dict[str, str] | None,
    exchange: str | None = None,
    **options,
) -> Call:
    """Check every argument of a distributed call and return all but the tensors as one value.

    Args:
        same: gets what the ranks must agree on, in words, unless None. See `agreement`.
        exchange: as in `ring_attention`.
        options: flash-attn's softmax_scale, causal, window_size, dropout_p, alibi_slopes and
            deterministic, as `check_attention` takes them.
    """
    check_tensors(q, k, v)
    attention = check_attention(q.shape[-1], **options)
    check_transport(group, q)
    rank, size, *_ = ranks_of(group)
    q_layout, k_layout = check_layouts(layout, attention, q, k, size)
    runs = select_backend(backend, attention, q, k, v)
    wanted = wanted_exchange(exchange, runs.name)
    plan = plan_ring(attention, q_layout, k_layout, rank)
    route = Route(ring_traffic(attention, q_layout, k_layout, rank), wanted)
    if same is not None:
        note_call(same, attention, q, k, layout)
        same["exchange"] = str(wanted)
    return Call(attention, plan, runs, group, route)


def note_call(
    same: dict[str, str], attention: Attention, q: Tensor, k: Tensor, layout: str
) -> None:
    """Put what every rank must do alike into `same`, in words."""
    same["q shape"] = str(list(q.shape))
    same["k and v shape"] = str(list(k.shape))
    same["dtype"] = str(q.dtype)
    same["kind of device"] = q.device.type
    same["layout"] = layout
    same["mask and scale"] = str(attention)


def local_forward(
    q: Tensor, k: Tensor, v: Tensor, backend: str, **options
) -> tuple[Tensor, Tensor]:
    """Return out, lse of one device, without a process group and outside autograd.

    Where q and k have different lengths, a mask aligns their last rows, as flash-attn does.
    `options` as in `ring_call`.
    """
    return run_forward(_local_call(q, k, v, backend, options), q, k, v)


def local_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    backend: str,
    **options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv of `local_forward`."""
    call = _local_call(q, k, v, backend, options)
    check_backward(dout, q, out, softmax_lse)
    return run_backward(call, dout, q, k, v, out, softmax_lse)


def _local_call(q: Tensor, k: Tensor, v: Tensor, backend: str, options: dict) -> Call:
    check_tensors(q, k, v)
    attention = check_attention(q.shape[-1], **options)
    runs = select_backend(backend, attention, q, k, v)
    step = plan_local(attention, q.shape[1], k.shape[1])
    return Call(attention, RingPlan(0, 1, (step,)), runs)
