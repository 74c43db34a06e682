"""Packed documents in one call of a varlen kernel a step; their lengths stay on the device.

A varlen kernel takes sequences that lie end to end. Where a step's block is a part of every
document, the rest is handed over too, as sequences with queries and no keys or with keys and no
queries. So nothing is gathered, and what the kernel writes for the rest is never read.
"""

import os
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.packed import (
    FAR,
    DocumentBlock,
    Documents,
    DocumentsStep,
    Line,
    PackedPlan,
)

# Until these calls have passed the tests on a GPU, documents run one by one unless asked otherwise.
WANTED = os.environ.get("RING_FLASH_ATTN_VARLEN", "1") != "0"
_MOST_SEQUENCES = 65535  # the second axis of a CUDA grid, which counts sequences


class Part(NamedTuple):
    """Query rows and key rows of every document, under one bottom-right window.

    Attributes:
        q_begin, q_end, k_begin, k_end: as lines of a document's unit.
        left, right: tokens, equal in all documents; -1 is open.
        skipped: first query rows of the part that see no key.
    """

    q_begin: Line
    q_end: Line
    k_begin: Line
    k_end: Line
    left: int
    right: int
    skipped: int

    def rest(self, units: int) -> tuple[bool, bool, bool, bool]:
        """Return whether rows lie before q_begin, before k_begin, behind q_end, behind k_end."""
        start, stop = Line(0, 0), Line(units, 0)
        return (
            self.q_begin != start,
            self.k_begin != start,
            self.q_end != stop,
            self.k_end != stop,
        )


class Varlen(NamedTuple):
    """One call of a varlen kernel, over all rows of q and of k, v.

    Attributes:
        sequences: cu_seqlens_q, cu_seqlens_k [M + 1] int32, max_seqlen_q, max_seqlen_k, as
            flash-attn names them.
        left, right: the bottom-right window in tokens, -1 is open.
        sees: [T] bool, query rows that see a key. seen: [Tk] bool, key rows of the part. Results
            for other rows mean nothing, and may be whatever the memory held.
    """

    sequences: dict
    left: int
    right: int
    sees: Tensor
    seen: Tensor


class _Edges(NamedTuple):
    """A call's documents, from numbers that nobody has read.

    Attributes:
        cu_q, cu_k: [N + 1] int32 within the rows there are.
        last: [N] int64, the last query row of each document.
        wrong: [N], NaN where a document is not as the caller promised, else 0.
    """

    cu_q: Tensor
    cu_k: Tensor
    last: Tensor
    wrong: Tensor


def inexpressible(plan: PackedPlan, documents: Documents) -> list[str]:
    """Return every reason why a call's steps are not one call of a varlen kernel each."""
    reasons = [] if WANTED else ["RING_FLASH_ATTN_VARLEN is 0"]
    reasons += _inexpressible(plan)
    if not reasons and _cut_keys(plan, documents) is None:
        reasons.append("the last key is not the last query's row, which shifts one window")
    pieces = [1 + sum(part.rest(plan.units)) for part in _parts(plan) if part is not None]
    if len(documents) * max(pieces, default=1) > _MOST_SEQUENCES:
        reasons.append(f"{len(documents)} documents are too many for one call")
    return reasons


@lru_cache(maxsize=512)
def _inexpressible(plan: PackedPlan) -> tuple[str, ...]:
    reasons = []
    for step in plan.steps:
        if len(step.blocks) > 1:
            reasons.append(f"step {step.step} has {len(step.blocks)} blocks, which may share rows")
        elif any(part_of(block, plan) is None for block in step.blocks):
            reasons.append(f"step {step.step} has a window that differs with a document's length")
    return tuple(reasons)


@lru_cache(maxsize=512)
def _parts(plan: PackedPlan) -> tuple[Part | None, ...]:
    return tuple(part_of(block, plan) for step in plan.steps for block in step.blocks)


def part_of(block: DocumentBlock, plan: PackedPlan) -> Part | None:
    """Return a block as a part under one window; None if the window is not one number.

    With the ends of a document's queries and keys `end` rows apart, left = end - lo and
    right = hi - end. A side below 0 hides whole rows at the end, which are cut off: then the
    ends lie otherwise, and that side is 0.
    """
    end = Line(block.k_end - block.q_end, plan.distance)
    corners = Line(block.k_begin - block.q_end, 1), Line(block.k_end - block.q_begin, -1)
    left, right = -FAR, -FAR  # open
    if abs(block.lo.rows) != FAR and not _reaches(corners[0], block.lo):
        if block.lo.per_unit != end.per_unit:
            return None
        left = end.rows - block.lo.rows
    if abs(block.hi.rows) != FAR and not _reaches(block.hi, corners[1]):
        if block.hi.per_unit != end.per_unit:
            return None
        right = block.hi.rows - end.rows
    q_cut, k_cut = (-x if -FAR < x < 0 else 0 for x in (left, right))
    return Part(
        Line(block.q_begin, 0),
        Line(block.q_end, -q_cut),
        Line(block.k_begin, 0),
        Line(block.k_end, -k_cut),
        -1 if left == -FAR else left + q_cut - k_cut,
        -1 if right == -FAR else right + k_cut - q_cut,
        skipped=k_cut,
    )


def _reaches(a: Line, b: Line) -> bool:
    """Whether a >= b for every unit of at least one row."""
    return a.per_unit >= b.per_unit and a.at(1) >= b.at(1)


def _cut_keys(plan: PackedPlan, documents: Documents) -> bool | None:
    """Return whether keys behind a document's last query are to be cut off; None if a window is
    there that neither way puts right.

    That is the last document's alone, where gathered keys go on behind this rank's queries.
    """
    more = documents.k_len - plan.distance - documents.q_len
    windows = [(part.left, part.right) for part in _parts(plan) if part is not None]
    if more == 0 or all(window == (-1, -1) for window in windows):
        return False
    return True if more > 0 and all(right == 0 for _, right in windows) else None


def varlen_of(step: DocumentsStep) -> Varlen:
    """Return the kernel call of a step, of which `inexpressible` said nothing.

    Computed on the device, once a call for all steps of the same shape, forward and backward.
    """
    plan, documents = step.plan, step.documents
    [block] = plan.steps[step.index].blocks
    part = part_of(block, plan)
    assert part is not None, "this plan's documents must be read on the host"
    if part not in documents.tables:
        documents.tables[part] = _varlen(part, plan, documents)
    return documents.tables[part]


def poison_wrong(step: DocumentsStep, x: Tensor, dim: int) -> None:
    """Put NaN in the last row of documents that break a promise that nobody has checked.

    Args:
        x: rows along `dim`, added to: 0 where a document is as promised.
    """
    edges = _edges(step.plan, step.documents)
    shape = [1] * x.ndim
    shape[dim] = -1
    wrong = edges.wrong.to(x.dtype).view(shape)
    target = [*x.shape]
    target[dim] = wrong.shape[dim]
    x.index_add_(dim, edges.last, wrong.expand(target))


def _edges(plan: PackedPlan, documents: Documents) -> _Edges:
    if "edges" not in documents.tables:
        documents.tables["edges"] = _find_edges(plan, documents)
    return documents.tables["edges"]


def _find_edges(plan: PackedPlan, documents: Documents) -> _Edges:
    cu_q = documents.cu_q.clamp(0, documents.q_len)
    length = cu_q.diff()
    wrong = (length < 0) | (length > documents.max_q) | (cu_q != documents.cu_q)[1:]
    wrong |= (documents.cu_q != 0)[:1]
    if plan.units > 1:
        wrong |= length % plan.units != 0
    cu_k = cu_q
    if documents.cu_k is not documents.cu_q:
        cu_k = documents.cu_k.clamp(0, documents.k_len)
        cut, end = _cut_keys(plan, documents), (cu_q + plan.distance)[1:]
        wrong |= (cu_k != documents.cu_k)[1:] | (documents.cu_k != 0)[:1] | (cu_k.diff() < 0)
        if cut:
            # A document that others follow must end as it is, or they would begin elsewhere.
            wrong |= (cu_k[1:] > end) & (cu_q[1:] < cu_q[-1:])
            cu_k = torch.cat([cu_k[:1], torch.minimum(cu_k[1:], end)])
        if _windowed(plan):
            wrong |= (cu_k[1:] != end) & (length > 0)
        wrong |= cu_k.diff() > documents.max_k
    nan = torch.where(wrong, torch.nan, 0.0)
    return _Edges(cu_q, cu_k, (cu_q[1:] - 1).clamp(min=0).long(), nan)


def _windowed(plan: PackedPlan) -> bool:
    return any(part is not None and (part.left, part.right) != (-1, -1) for part in _parts(plan))


def _varlen(part: Part, plan: PackedPlan, documents: Documents) -> Varlen:
    edges, units = _edges(plan, documents), plan.units
    q_start, q_begin, q_end, q_stop = _rows(edges.cu_q, part.q_begin, part.q_end, units)
    k_start, k_begin, k_end, _ = _rows(edges.cu_k, part.k_begin, part.k_end, units)
    q_before, k_before, q_behind, k_behind = part.rest(units)
    # Where sequences begin in every document; the last ends where the next document begins.
    begins = [(q_start, k_start)]
    if q_before:
        begins.append((q_begin, k_start))
    if k_before:
        begins.append((q_begin, k_begin))
    if q_behind or k_behind:
        begins.append((q_end, k_end))
    if q_behind and k_behind:
        begins.append((q_stop, k_end))
    cu_q, cu_k = edges.cu_q, edges.cu_k
    if len(begins) > 1:
        cu_q, cu_k = (
            torch.cat([torch.stack(side, 1).flatten(), cu[-1:]])
            for side, cu in zip(zip(*begins, strict=True), (cu_q, cu_k), strict=True)
        )
    max_q, max_k = documents.max_q, documents.max_k
    # A side that hides nothing is open: kernels are slower with a window.
    left = -1 if part.left >= max_k - 1 else part.left
    right = -1 if part.right >= max_q - 1 else part.right
    if part.skipped:
        q_begin = q_begin + part.skipped
    sees = _inside(edges.cu_q, q_begin, q_end, documents.q_len)
    seen = _inside(edges.cu_k, k_begin, k_end, documents.k_len)
    sequences = {
        "cu_seqlens_q": cu_q,
        "cu_seqlens_k": cu_k,
        # FlashAttention-2 takes 1 for decoding, with exactly one query in every sequence.
        "max_seqlen_q": max(2, max_q),
        "max_seqlen_k": max_k,
    }
    return Varlen(sequences, left, right, sees, seen)


def _rows(cu: Tensor, begin: Line, end: Line, units: int) -> tuple[Tensor, ...]:
    """Return each document's first row, the part's begin and end, and the document's end, [N]."""
    start, stop = cu[:-1], cu[1:]
    unit = (stop - start) // units if units > 1 else stop - start
    first = start + begin.per_unit * unit + begin.rows if begin != Line(0, 0) else start
    last = stop
    if end != Line(units, 0):
        last = torch.maximum(first, start + end.per_unit * unit + end.rows)
    return start, first, last, stop


def _inside(cu: Tensor, begin: Tensor, end: Tensor, rows: int) -> Tensor:
    """Return [rows] bool: whether a row lies in [begin, end) of its document."""
    row = torch.arange(rows, dtype=torch.int32, device=cu.device)
    document = torch.searchsorted(cu[1:], row, right=True).clamp_(max=cu.shape[0] - 2)
    return (row >= begin[document]) & (row < end[document])
