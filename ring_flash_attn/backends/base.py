"""What a backend is: it computes one step of a ring, one source's K, V against local rows."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..core.attention import Attention
from ..core.packed import DocumentsStep
from ..core.plan import StepPlan

# What a backend computes: blocks of rows, or, where it can read them, documents on the device.
Step = StepPlan | DocumentsStep


class Saved(NamedTuple):
    """What every step of a backward reads, prepared once per call by the backend.

    Attributes:
        dout: [B, L, H, D], the input's dtype.
        out: [B, L, H, D], the input's dtype, the final output.
        lse: [B, H, L], state dtype, final; -inf where a row saw nothing.
        dlse: [B, H, L], state dtype, the gradient of lse; None if nobody asked for it.
        delta: [B, H, L], state dtype, rowsum(dout * out) - dlse; None if the backend's own kernel
            computes rowsum(dout * out) inside.
    """

    dout: Tensor
    out: Tensor
    lse: Tensor
    dlse: Tensor | None
    delta: Tensor | None


class GradTarget(NamedTuple):
    """Where a step's share of dk, dv goes: [B, L, Hk, D] of the source's rows, state dtype.

    `add`: add to what is there; otherwise store into every row that a block touches (the exchange
    minds the others). It may lie in the memory of another GPU, where storing is cheap and reading
    is not.

    A step over several sources, which has a `span`, has a dk and a dv for each:

    Attributes:
        others: dk, dv of the second source, the third ...
        offsets: [n] int64 on the device: where each source's dk is, as kernels read it: less the
            first one's address and `span` rows for each source before it, in units of 4 numbers.
            dv are as far from each other as dk.
    """

    dk: Tensor
    dv: Tensor
    add: bool
    others: tuple[tuple[Tensor, Tensor], ...] = ()
    offsets: Tensor | None = None


class TargetOnRequest(NamedTuple):
    """Gives a step's target when called, once. `late`: that waits for sums on their way here."""

    ask: Callable[[], GradTarget]
    late: bool

    def __call__(self) -> GradTarget:
        return self.ask()


class Backend(Protocol):
    """Computes steps. Holds no state: a step's results live in tensors that the caller owns.

    Attributes:
        reads_documents: whether it takes every DocumentsStep. Of another backend
            `backends.needs_lengths` says why it gets blocks of rows instead, for which the lengths
            of packed documents have been read on the host.
        merges: whether it takes steps over several sources, whose keys lie in one tensor.
    """

    name: str
    reads_documents: bool
    merges: bool

    def unsupported(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> list[str]:
        """Return every reason why this backend cannot run these inputs; empty if it can."""
        ...

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
        """Fold one source's K, V into the state (out, lse).

        Args:
            q: [B, L, H, D], read. k, v: [B, Lk, Hk, D] of the source, read. Any strides.
            out: [B, L, H, D] state dtype, normalised; lse: [B, H, L] state dtype. Written, not
                read, on the rows that blocks touch if `step_plan.first`; else read and written.
                `out` is None if this is the only step, which finishes all that it touches.
            result: [B, L, H, D] in q's dtype, may be `out`: where the rows of
                `step_plan.finished` go instead of `out`. None: they stay in `out`.
        """
        ...

    def prepare_backward(
        self, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None
    ) -> Saved:
        """Prepare what every step's backward reads. Called once, before the first step."""
        ...

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
        """Fold one source's share into dq, and hand its dk, dv to `dkv_target`.

        Args:
            dq: [B, L, H, D] state dtype; stored, not read, on touched rows if `step_plan.first`,
                else added to. None, and `result`: as for `out` in `forward`.
            dkv_target: called once, as late as possible unless it is a TargetOnRequest that says
                otherwise: it may wait for a travelling accumulator.
        """
        ...


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that out, lse, dq, dk, dv accumulate and travel in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
