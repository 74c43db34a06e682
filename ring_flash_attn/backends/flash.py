"""flash-attn's own kernels as backends, where installed: FlashAttention-2, -3 and -4.

What differs between their versions stays in this file. Each returns block results rounded to 16
bits, which the state then folds in float32.
"""

import inspect
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from ..core.attention import Attention
from ..core.plan import Block
from .base import Saved
from .fused import FusedBackend, aligned, names, open_window
from .varlen import Varlen

_DTYPES = (torch.float16, torch.bfloat16)
_MAX_HEAD_DIM = 256


@lru_cache(maxsize=8)
def load(module: str) -> ModuleType | str:
    """Return a module, or the reason why it cannot be used.

    A module that says `IS_STAND_IN` only looks like flash-attn (it ignores windows), so it is
    refused.
    """
    try:
        package = module.partition(".")[0]
        if find_spec(package) is None:
            return f"{package} is not installed"
        loaded = import_module(module)
    except (ImportError, OSError) as error:
        return f"{module} does not load: {error}"
    if getattr(loaded, "IS_STAND_IN", False):
        return f"{module} is a stand-in that ignores windows"
    return loaded


class _FlashBackend(FusedBackend):
    """Shared by the versions: what they cannot run, and the order of arguments."""

    module = ""
    install = ""
    capabilities: tuple[int, ...] = ()

    def unsupported(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> list[str]:
        reasons = []
        if q.device.type != "cuda":
            reasons.append(f"runs on cuda, got {q.device.type}")
        if q.dtype not in _DTYPES:
            reasons.append(f"computes in {names(_DTYPES)}, got {q.dtype}")
        head_dim = q.shape[-1]
        if head_dim % 8 or head_dim > _MAX_HEAD_DIM:
            reasons.append(
                f"needs a head dim that 8 divides, at most {_MAX_HEAD_DIM}, got {head_dim}"
            )
        if v.shape[-1] != head_dim:
            reasons.append(f"v must be as wide as q, got {v.shape[-1]} and {head_dim}")
        if q.device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(q.device)
            if major not in self.capabilities:
                known = ", ".join(f"sm_{x}x" for x in self.capabilities)
                reasons.append(f"runs on {known}, got sm_{major}{minor}")
        loaded = load(self.module)
        if isinstance(loaded, str):
            reasons.append(f"{loaded} ({self.install})")
        return reasons

    def _loaded(self) -> ModuleType:
        loaded = load(self.module)
        if isinstance(loaded, str):
            raise ImportError(f"{loaded} ({self.install})")
        return loaded

    def kernel_forward(
        self, attention: Attention, block: Block | Varlen, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (aligned(x) for x in (q, k, v))
        if isinstance(block, Block):
            return self._forward(attention, *open_window(block), q, k, v)
        q, k, v = (x.squeeze(0) for x in (q, k, v))
        out, lse = self._forward(attention, block.left, block.right, q, k, v, **block.sequences)
        return out.unsqueeze(0), lse.unsqueeze(0)

    def kernel_backward(
        self,
        attention: Attention,
        block: Block | Varlen,
        saved: Saved,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dout, out, q, k, v = (aligned(x) for x in (saved.dout.to(q.dtype), saved.out, q, k, v))
        given = dout, q, k, v, out, saved.lse.contiguous()
        if isinstance(block, Block):
            return self._backward(attention, *open_window(block), *given)
        given = (x.squeeze(0) for x in given)
        grads = self._backward(attention, block.left, block.right, *given, **block.sequences)
        dq, dk, dv = (x.unsqueeze(0) for x in grads)
        return dq, dk, dv

    def _forward(self, attention, left, right, q, k, v, **sequences) -> tuple[Tensor, Tensor]:
        """Return (out, lse) of a batch; of packed rows [T, H, D], lse [H, T], with `sequences`."""
        raise NotImplementedError

    def _backward(self, attention, left, right, dout, q, k, v, out, lse, **sequences):
        raise NotImplementedError


class Flash2Backend(_FlashBackend):
    """FlashAttention-2, package `flash_attn` (2.1 to 2.8)."""

    name = "flash2"
    module = "flash_attn.flash_attn_interface"
    install = "pip install flash-attn --no-build-isolation"
    capabilities = (8, 9, 10, 12)

    def lacks_varlen(self, device: torch.device) -> list[str]:
        if "softcap" in _parameters(self._loaded()._flash_attn_varlen_forward):
            return []
        return ["before 2.6, which brought softcap, the lse of packed rows is padded"]

    def _forward(self, attention, left, right, q, k, v, **sequences):
        flash = self._loaded()
        run = flash._flash_attn_varlen_forward if sequences else flash._flash_attn_forward
        outputs = run(
            q,
            k,
            v,
            **sequences,
            **_options2(run, attention, left, right),
            **_if_taken(run, return_softmax=False),
        )
        # (out, lse, ...) since 2.7; before, (out, q, k, v, out_padded, lse, ...).
        return outputs[0], outputs[5 if len(outputs) == 8 else 1]

    def _backward(self, attention, left, right, dout, q, k, v, out, lse, **sequences):
        flash = self._loaded()
        run = flash._flash_attn_varlen_backward if sequences else flash._flash_attn_backward
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        run(
            dout,
            q,
            k,
            v,
            out,
            lse,
            dq,
            dk,
            dv,
            **sequences,
            **_options2(run, attention, left, right),
            **_if_taken(run, deterministic=attention.deterministic),
        )
        return dq, dk, dv


class Flash3Backend(_FlashBackend):
    """FlashAttention-3: the ops that `flash_attn_3._C` registers."""

    name = "flash3"
    module = "flash_attn_3._C"
    install = "build the folder hopper of flash-attention"
    capabilities = (9,)

    def lacks_varlen(self, device: torch.device) -> list[str]:
        return []

    def _forward(self, attention, left, right, q, k, v, **sequences):
        self._loaded()
        out, lse, *_ = torch.ops.flash_attn_3.fwd(
            q,
            k,
            v,
            **sequences,
            softmax_scale=attention.softmax_scale,
            is_causal=(left, right) == (-1, 0),
            window_size_left=left,
            window_size_right=right,
            # 0 would let a heuristic split the keys, whose merge depends on the part's load.
            num_splits=1,
        )
        return out, lse

    def _backward(self, attention, left, right, dout, q, k, v, out, lse, **sequences):
        self._loaded()
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        torch.ops.flash_attn_3.bwd(
            dout,
            q,
            k,
            v,
            out,
            lse,
            dq,
            dk,
            dv,
            **sequences,
            softmax_scale=attention.softmax_scale,
            is_causal=(left, right) == (-1, 0),
            window_size_left=left,
            window_size_right=right,
            deterministic=attention.deterministic,
        )
        return dq, dk, dv


class Flash4Backend(_FlashBackend):
    """FlashAttention-4, written in CuTe DSL, package `flash-attn-4`."""

    name = "flash4"
    module = "flash_attn.cute.interface"
    install = "pip install flash-attn-4"
    capabilities = (9, 10)

    def lacks_varlen(self, device: torch.device) -> list[str]:
        return ["flash4 is not known to take sequences that have queries and no keys"]

    def _forward(self, attention, left, right, q, k, v, **sequences):
        assert not sequences, "lacks_varlen says no"
        run = self._loaded()._flash_attn_fwd
        out, lse, *_ = run(q, k, v, return_lse=True, **_options4(attention, left, right))
        return out, lse

    def _backward(self, attention, left, right, dout, q, k, v, out, lse, **sequences):
        assert not sequences, "lacks_varlen says no"
        run = self._loaded()._flash_attn_bwd
        options = _options4(attention, left, right)
        dq, dk, dv, *_ = run(
            q, k, v, out, dout, lse, deterministic=attention.deterministic, **options
        )
        return dq, dk, dv


def _options2(run: Callable, attention: Attention, left: int, right: int) -> dict:
    options = {
        "dropout_p": 0.0,
        "softmax_scale": attention.softmax_scale,
        "causal": (left, right) == (-1, 0),
        "alibi_slopes": None,
    }
    # One pair until 2.6, two ints since 2.7.
    if "window_size" in _parameters(run):
        options["window_size"] = (left, right)
    else:
        options |= {"window_size_left": left, "window_size_right": right}
    return options | _if_taken(run, softcap=0.0)


def _options4(attention: Attention, left: int, right: int) -> dict:
    causal = (left, right) == (-1, 0)
    return {
        "softmax_scale": attention.softmax_scale,
        "causal": causal,
        "window_size_left": None if left < 0 else left,
        "window_size_right": None if right < 0 or causal else right,
    }


def _if_taken(run: Callable, **options) -> dict:
    """Return the options that this version's function has."""
    return {name: value for name, value in options.items() if name in _parameters(run)}


@lru_cache(maxsize=16)
def _parameters(run: Callable) -> frozenset[str]:
    # torch wraps the functions of 2.7 and later as custom ops, which keep the original here.
    return frozenset(inspect.signature(getattr(run, "_init_fn", run)).parameters)
