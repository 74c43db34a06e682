"""Who computes a step, and the one function that says which backend runs."""

from functools import cache
from importlib.util import find_spec

from torch import Tensor

from ..core.attention import Attention
from ..core.packed import Documents, PackedPlan
from .aten import AtenBackend
from .base import Backend
from .flash import Flash2Backend, Flash3Backend, Flash4Backend
from .fused import FusedBackend
from .reference import ReferenceBackend

NAMES = ("native", "triton", "flash2", "flash3", "flash4", "aten", "reference")
_NATIVE = (Flash3Backend(), Flash2Backend(), AtenBackend())
_BY_NAME = {backend.name: backend for backend in (*_NATIVE, Flash4Backend(), ReferenceBackend())}


def select_backend(name: str, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Backend:
    """Return the backend that runs a call, before anything is sent.

    `native` takes the first that supports the input: `flash3` (FlashAttention-3, on sm_90), then
    `flash2` (the package flash-attn), then `aten` (torch's own flash attention), then, on CPU
    tensors only, `reference` (dense: memory grows with the square of the length, so a GPU is never
    sent there unasked). Every other name is that backend or an error; none falls back to another
    in silence.

    Raises:
        ValueError: unknown name.
        NotImplementedError: no backend of that name runs these inputs; lists every reason.
        ImportError: the package triton is missing.
    """
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
    reasons = []
    for backend in _candidates(name, q):
        unsupported = backend.unsupported(attention, q, k, v)
        if not unsupported:
            return backend
        reasons += [f"{backend.name}: {reason}" for reason in unsupported]
    raise NotImplementedError(
        f"no {name} backend runs q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} of "
        f"{q.dtype} on {q.device.type} with {attention}:\n  " + "\n  ".join(reasons)
    )


def needs_lengths(backend: Backend, plan: PackedPlan, documents: Documents) -> list[str]:
    """Return every reason why a backend wants the lengths of documents on the host, where it then
    runs block by block of each document; empty if it takes the documents as they are."""
    if backend.reads_documents:
        return []
    if isinstance(backend, FusedBackend):
        return backend.needs_lengths(plan, documents)
    return [f"{backend.name} computes blocks of rows"]


def _candidates(name: str, q: Tensor) -> list[Backend]:
    if name == "triton":
        return [_triton()]
    if name != "native":
        return [_BY_NAME[name]]
    return [*_NATIVE, *([_BY_NAME["reference"]] if q.device.type == "cpu" else [])]


@cache
def _triton() -> Backend:
    """Return the Triton backend, imported on use: the rest works where Triton is not installed."""
    if find_spec("triton") is None:
        raise ImportError("backend triton needs the package triton: pip install triton")
    from .triton import TritonBackend

    return TritonBackend()
