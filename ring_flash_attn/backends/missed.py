"""Mark the rows of packed documents that a length which nobody has checked leaves out."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..core.packed import DocumentsPlan
from ..kernels.configs import block_d
from .fold import has_triton

_ROWS = 64


def mark_missed(plan: DocumentsPlan, rows: Tensor, lse: Tensor | None = None) -> None:
    """Put NaN, not whatever the memory held, into rows that no step will write.

    Args:
        rows: [1, T, H, D], lse: [1, H, T], not yet written.
    """
    if rows.is_cuda and has_triton():
        mark_in_one_pass(plan, rows, lse)
        return
    for x in (rows, lse):
        if x is not None:
            x.fill_(torch.nan)


def mark_in_one_pass(plan: DocumentsPlan, rows: Tensor, lse: Tensor | None = None) -> None:
    """As `mark_missed`, but write to no other row: the tensors are large."""
    from .descriptors import like
    from .launch import on

    step = plan.steps[0]
    documents = step.documents
    given = {"cu_ptr": documents.cu_q, "rows_ptr": rows, "lse_ptr": lse, "n_docs": len(documents)}
    start = _launch(like(rows), None if lse is None else lse.stride(), step.plan.units)
    with on(rows.device):
        start(-(-rows.shape[1] // _ROWS), given)


@lru_cache(maxsize=256)
def _launch(rows: Any, lse_strides: tuple[int, ...] | None, units: int) -> Any:
    """Return the launch for rows like these."""
    from ..kernels.missed import _missed_kernel  # needs Triton, which other backends do not
    from .launch import ADDRESS, NUMBER, Launch, strides

    _, length, heads, head_dim = rows.shape
    assert lse_strides is None or lse_strides[2] == 1, "the rows of lse must be contiguous"
    arguments = {
        "cu_ptr": ADDRESS,
        "rows_ptr": ADDRESS,
        "lse_ptr": None if lse_strides is None else ADDRESS,
        "row_strides": strides(rows),
        "lse_stride_head": 0 if lse_strides is None else lse_strides[1],
        "n_docs": NUMBER,
        "length": length,
        "units": units,
        "heads": heads,
        "HEAD_DIM": head_dim,
        "BLOCK": _ROWS,
        "BLOCK_D": block_d(head_dim),
    }
    return Launch(_missed_kernel, arguments)
