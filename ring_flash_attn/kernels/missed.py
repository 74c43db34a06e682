"""The kernel that marks rows of packed documents that no tile covers."""

import triton
import triton.language as tl

from .fill import _document
from .tile import cast, row_pointers


@triton.jit(do_not_specialize=["n_docs", "length", "units", "heads", "lse_stride_head"])
def _missed_kernel(
    cu_ptr,
    rows_ptr,
    lse_ptr,
    row_strides,
    lse_stride_head,
    n_docs,
    length,
    units,
    heads,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """rows[0, i], and lse[0, :, i] unless lse_ptr is None, = NaN where no document covers row i.

    A document covers `units` equal parts of its rows, so of an odd length in two parts not the
    last one. Rows behind the last document are covered.
    Grid: ceil(length / BLOCK). rows: [1, length, H, D], any float dtype, strides (batch, head,
    row). Writes rows and lse [1, H, length].
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    covered = row >= tl.maximum(tl.load(cu_ptr + n_docs), 0)
    for first_doc in range(0, n_docs, BLOCK):
        docs = first_doc + tl.arange(0, BLOCK)
        begin, end = _document(cu_ptr, docs, n_docs, length)
        end = begin + (end - begin) // units * units
        met = (row[:, None] >= begin[None, :]) & (row[:, None] < end[None, :])
        covered = covered | (tl.sum(met.to(tl.int32), 1) > 0)
    missed = (row < length) & (covered == 0)
    if tl.sum(missed.to(tl.int32), 0) > 0:
        offs_d = tl.arange(0, BLOCK_D)
        mask = missed[:, None] & (offs_d < HEAD_DIM)[None, :]
        nan = tl.full([BLOCK, BLOCK_D], float("nan"), tl.float32)
        nans = tl.full([BLOCK], float("nan"), tl.float32)
        batch = tl.program_id(0) * 0
        for i in range(heads):
            head = batch + i
            rows = row_pointers(rows_ptr, row_strides, batch, head, row)
            number = cast(nan, rows_ptr.dtype.element_ty)
            tl.store(rows[:, None] + offs_d[None, :], number, mask=mask)
            if lse_ptr is not None:
                tl.store(lse_ptr + head * lse_stride_head + row, nans, mask=missed)
