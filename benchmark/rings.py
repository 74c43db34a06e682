"""Ring attention as plain calls, this library's and ring-flash-attn 0.1.8's, and their errors."""

import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import timing  # makes the library and the oracle importable
import torch
import torch.distributed as dist
from kernels import Inputs, use_peers
from rank_timing import over_ranks
from torch import Tensor

import oracle
from comparison import Place
from ring_flash_attn.backends import select_backend
from ring_flash_attn.core.api import ring_attention
from ring_flash_attn.core.attention import Attention

BACKENDS = {
    "triton": "triton",
    "native-aten": "aten",
    "native-fa2": "flash2",
    "native-fa3": "flash3",
}
# The one-device kernel that a ring is measured against, as kernels.kernels names it.
KERNELS = {
    **{"triton": "triton", "native-aten": "fa2", "native-fa2": "fa2", "native-fa3": "fa3"},
    **{"upstream-fa2": "fa2", "upstream-fa3": "fa3"},
}
STEMS = {"contiguous": "ring", "zigzag": "zigzag_ring", "stripe": "stripe"}
Ring = Callable[[Tensor, Tensor, Tensor], Tensor]
Shard = Callable[[Tensor], Tensor]  # of a global tensor, this rank's rows


class RingErrors(NamedTuple):
    """Relative errors over every rank's rows."""

    out: float
    dq: float
    dk: float
    dv: float


def ring(impl: str, layout: str, inputs: Inputs, exchange: str = "ring") -> Ring:
    """Return q, k, v -> out of an implementation.

    Raises:
        NotImplementedError: it cannot run here or not on these inputs; the message says why.
    """
    attention = inputs.attention
    masked = {"causal": attention.causal, "window_size": attention.window}
    if impl in BACKENDS:
        check_backend(impl, attention, *inputs[:3])
        options = {"layout": layout, "backend": BACKENDS[impl], "exchange": exchange, **masked}
        return lambda q, k, v: ring_attention(q, k, v, **options)[0]
    func = getattr(upstream(impl, layout, inputs), f"{STEMS[layout]}_flash_attn_func")
    return lambda q, k, v: func(q, k, v, causal=attention.causal)


def check_backend(impl: str, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise NotImplementedError, with the reasons alone, where a backend does not run this."""
    try:
        select_backend(BACKENDS[impl], attention, q, k, v)
    except NotImplementedError as error:
        reasons = (line.strip() for line in str(error).splitlines()[1:])
        raise NotImplementedError("; ".join(reasons)) from None


def upstream(impl: str, layout: str, inputs: Inputs) -> ModuleType:
    """Return ring-flash-attn 0.1.8 over the kernels of `impl`.

    Raises:
        NotImplementedError: it cannot run here or not on these inputs; the message says why.
    """
    attention = inputs.attention
    if not inputs.q.is_cuda:
        raise NotImplementedError("runs on cuda, got cpu")
    if attention.window != (-1, -1):
        raise NotImplementedError(
            "takes a window of each hop for one of the whole: wrong"
            if layout in STEMS
            else f"{layout} is timed without a window: the stand-in for flash-attn takes none"
        )
    if not attention.causal and layout in ("zigzag", "stripe"):
        raise NotImplementedError(f"{layout} is causal only")
    return _upstream(impl)


def _upstream(impl: str) -> ModuleType:
    """Load ring-flash-attn 0.1.8 from $PEERS (.peers) over FlashAttention-2 or -3.

    Both fit in one process: each has its own copy of the stand-in for flash-attn, which reads
    USE_FA3 when it is imported, and of upstream, which binds that copy's functions.
    """
    name = impl.replace("-", "_")
    if name in sys.modules:
        return sys.modules[name]
    folder = use_peers() / "upstream" / "ring_flash_attn"
    if not (folder / "__init__.py").exists():
        raise NotImplementedError(f"ring-flash-attn 0.1.8 is not in {_shown(folder)}")
    wants_fa3 = impl == "upstream-fa3"
    os.environ["USE_FA3"] = "1" if wants_fa3 else "0"
    interface = "flash_attn.flash_attn_interface"
    if getattr(sys.modules.get(interface), "IS_STAND_IN", False):
        del sys.modules[interface], sys.modules["flash_attn"]
    try:
        loaded = importlib.import_module(interface)
    except (ImportError, OSError) as error:
        raise NotImplementedError(f"its flash-attn does not load: {error}") from error
    if getattr(loaded, "USE_FA3", False) != wants_fa3:
        raise NotImplementedError("the flash-attn installed is not over FlashAttention-3")
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def step(ring: Ring, inputs: Inputs) -> Callable[[], None]:
    """Return forward and backward as one call; the inputs' gradients are made anew by each."""
    q, k, v = (x.requires_grad_() for x in inputs[:3])

    def forward_backward() -> None:
        q.grad = k.grad = v.grad = None
        ring(q, k, v).backward(inputs.dout)

    return forward_backward


def forward_only(ring: Ring, inputs: Inputs) -> Callable[[], None]:
    """Return the forward without autograd."""
    q, k, v = inputs[:3]

    def forward() -> None:
        with torch.no_grad():
            ring(q, k, v)

    return forward


def batch_shard(layout: str, place: Place) -> Shard:
    """Return [B, S, ...] -> [B, L, ...]: this rank's rows of a global tensor."""
    return lambda x: oracle.shard(x, layout, place.world_size, place.rank)


def ring_errors(
    ring: Ring, shard: Shard, inputs: Inputs, truth: oracle.Result, place: Place
) -> RingErrors:
    """Return the errors of a ring over the global `inputs`; NaN where a result is not finite."""
    q, k, v, dout = (shard(x) for x in inputs[:4])
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = ring(*leaves)
    got = (out.detach(), *torch.autograd.grad(out, leaves, dout))
    want = [shard(x) for x in (truth.out, truth.dq, truth.dk, truth.dv)]
    sums = [
        [float((x.double() - y).square().sum()), float(y.square().sum())]
        for x, y in zip(got, want, strict=True)
    ]
    total = over_ranks(sums, dist.ReduceOp.SUM, place)
    return RingErrors(*(math.sqrt(wrong / size) for wrong, size in total))


def _shown(folder: Path) -> str:
    """Return a path relative to the checkout if it lies there."""
    return str(folder.relative_to(timing.ROOT) if folder.is_relative_to(timing.ROOT) else folder)
