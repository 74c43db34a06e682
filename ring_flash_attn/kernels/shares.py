"""The kernel that adds up shares of dk, dv from several ranks."""

import triton
import triton.language as tl

from .tile import cast


@triton.jit
def _document_of(cu_ptr, row, n_docs):
    """Return the last document that begins at or before each row, -1 if none does.

    Halving; cu_seqlens must not fall. The last number in it begins none, but counts as one here.
    """
    first = row * 0 - 1
    last = row * 0 + n_docs + 1
    left = n_docs + 1
    while left > 0:
        middle = (first + last) // 2
        inside = middle > first
        begins = tl.load(cu_ptr + middle, mask=inside, other=0) <= row
        first = tl.where(inside & begins, middle, first)
        last = tl.where(inside & (begins == 0), middle, last)
        left = left // 2
    return first


@triton.jit(do_not_specialize=["n_docs", "n_rows", "length"])
def _sum_kernel(
    result_ptr,
    own_ptr,
    landed_ptr,
    cu_ptr,
    n_docs,
    n_rows,
    length,
    begins,
    ends,
    UNITS: tl.constexpr,
    SHARES: tl.constexpr,
    ROW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """result = own + the SHARES in landed, each where it holds numbers, in their order.

    Share n does so in rows [begins[n], ends[n]) of the length, or with UNITS in those units of
    every document, which has UNITS equal ones. A row before the first document or left over of one,
    as of an odd length in two units, is NaN then: nobody has computed it.
    Grid: ceil(n_rows / ROWS), ceil(ROW / COLUMNS). own, result: [n_rows, ROW]; landed: [SHARES,
    n_rows, ROW]; n_rows is a multiple of `length`; cu [n_docs + 1] int32. Writes result.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exist = rows < n_rows
    inside = (columns < ROW)[None, :]
    offsets = rows.to(tl.int64)[:, None] * ROW + columns[None, :]
    row = rows % length
    if UNITS > 0:
        document = _document_of(cu_ptr, row, n_docs)
        exists = (document >= 0) & (document < n_docs)
        first_row = tl.load(cu_ptr + document, mask=exists, other=0)
        unit = (tl.load(cu_ptr + document + 1, mask=exists, other=0) - first_row) // UNITS
        exists = exists & exist
    else:
        first_row, unit, exists = 0, 1, exist
    total = tl.load(own_ptr + offsets, mask=exist[:, None] & inside, other=0.0)
    for share in tl.static_range(SHARES):
        begin, end = first_row + begins[share] * unit, first_row + ends[share] * unit
        holds = exists & (row >= begin) & (row < end)
        share_ptr = landed_ptr + tl.cast(n_rows, tl.int64) * ROW * share
        total += tl.load(share_ptr + offsets, mask=holds[:, None] & inside, other=0.0)
    if UNITS > 1:
        left_over = (document < 0) | (exists & (row >= first_row + unit * UNITS))
        total = tl.where(left_over[:, None], float("nan"), total)
    number = cast(total, result_ptr.dtype.element_ty)
    tl.store(result_ptr + offsets, number, mask=exist[:, None] & inside)
