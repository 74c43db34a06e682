"""Sum what other ranks have handed in of this rank's dk, dv, in one pass over memory."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.plan import Interval
from .fold import has_triton

_ROWS, _COLUMNS = 4, 1024  # of a program


class Shares(NamedTuple):
    """Shares of dk, dv, and where they hold numbers.

    Attributes:
        landed: [n, 2, B, L, Hk, D], contiguous, n at least the number of parts; None: there are
            none.
        parts: where each does: rows [begin, end), or units of each document; None: nowhere.
        units: equal parts of a document.
        cu_seqlens: [N + 1] int32, on the device, rows of the documents; None: parts are rows.
    """

    landed: Tensor | None
    parts: tuple[Interval | None, ...] = ()
    units: int = 0
    cu_seqlens: Tensor | None = None


def sum_shares(result: Tensor, own: Tensor, shares: Shares) -> None:
    """Set result to own plus the shares, added in their order and then rounded to its dtype.

    Of documents with several units, a row before the first or left over of one, as of an odd length
    in two units, becomes NaN: nobody has computed it.

    Args:
        result, own: [2, B, L, Hk, D], contiguous; they may be one.
    """
    adds = shares.landed is not None and any(shares.parts)
    marked = None if shares.units < 2 else shares.cu_seqlens
    if (adds or marked is not None) and result.is_cuda and has_triton():
        sum_in_one_pass(result, own, shares)
        return
    total, length = own, own.shape[2]
    if shares.landed is not None:
        total = own.clone()
        for share, part in zip(shares.landed, shares.parts, strict=False):
            if part is not None:
                rows = _rows(shares, part, length)
                total[:, :, rows] += share[:, :, rows]
    result.copy_(total)
    if marked is not None:
        covered = _rows(shares, (0, shares.units), length)
        behind = torch.arange(length, device=covered.device) >= marked[-1]
        result.masked_fill_(~(covered | behind)[:, None, None], torch.nan)


def sum_in_one_pass(result: Tensor, own: Tensor, shares: Shares) -> None:
    """As `sum_shares`, by a kernel."""
    parts = () if shares.landed is None else shares.parts
    start, on, programs, columns = _launch(own.shape, parts, shares.units)
    given = {
        "result_ptr": result,
        "own_ptr": own,
        "landed_ptr": shares.landed,
        "cu_ptr": shares.cu_seqlens,
        "n_docs": 0 if shares.cu_seqlens is None else len(shares.cu_seqlens) - 1,
    }
    with on(own.device):
        start(programs, given, rows=columns)


@lru_cache(maxsize=256)
def _launch(shape: tuple[int, ...], parts: tuple[Interval | None, ...], units: int) -> Any:
    """Return the launch for shares of this shape [2, B, L, Hk, D], `launch.on`, and the grid."""
    from ..kernels.shares import _sum_kernel  # needs Triton, which other backends do not
    from .launch import ADDRESS, NUMBER, Launch, on

    both, batch, length, heads, head_dim = shape
    rows, row = both * batch * length, heads * head_dim
    arguments = {
        "result_ptr": ADDRESS,
        "own_ptr": ADDRESS,
        "landed_ptr": ADDRESS if parts else None,
        "cu_ptr": ADDRESS if units else None,
        "n_docs": NUMBER,
        "n_rows": rows,
        "length": length,
        # One more than there are shares: a kernel takes no empty tuple.
        "begins": (*(0 if part is None else part[0] for part in parts), 0),
        "ends": (*(0 if part is None else part[1] for part in parts), 0),
        "UNITS": units,
        "SHARES": len(parts),
        "ROW": row,
        "ROWS": _ROWS,
        "COLUMNS": _COLUMNS,
    }
    return Launch(_sum_kernel, arguments), on, -(-rows // _ROWS), -(-row // _COLUMNS)


def _rows(shares: Shares, part: Interval, length: int) -> Tensor:
    """Return which of the rows a part covers, [length] bool."""
    cu_seqlens = shares.cu_seqlens
    # On the device of cu_seqlens: bringing it there would make the host wait.
    rows = torch.arange(length, device=None if cu_seqlens is None else cu_seqlens.device)
    if cu_seqlens is None:
        return (rows >= part[0]) & (rows < part[1])
    document = torch.searchsorted(cu_seqlens, rows, right=True, out_int32=True) - 1
    inside = (document >= 0) & (document < len(cu_seqlens) - 1)
    document = document.clamp(0, len(cu_seqlens) - 2)
    begin = cu_seqlens[document]
    unit = (cu_seqlens[document + 1] - begin) // shares.units
    return inside & (rows >= begin + part[0] * unit) & (rows < begin + part[1] * unit)
