"""What every Triton kernel takes for a step: its tables, on the device, and its heads."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..core.packed import DocumentsStep
from ..core.plan import Block, Interval
from ..core.tables import key_tables, query_tables
from .base import GradTarget, Step
from .descriptors import Like, key_of
from .documents import Side, Table, document_tables, most_entries
from .launch import ADDRESS, NUMBER, Launch

# Share of L2 for what the heads in flight read again and again. Gluon prototypes, H100, 2026-11-22:
# all heads at once lost 9-11 % (forward, 32768 tokens), one at a time 14 % (backward, 8192).
L2_BYTES = 32 << 20


def heads(
    softmax_scale: float, q: Like, k: Like, side: Side, with_dq: bool = False, copies: int = 1
) -> dict[str, Any]:
    """Return the arguments that every kernel takes: a place for tables, and the heads.

    Args:
        side: what the kernel cuts into tiles.
        with_dq: of a side of keys, whether the kernel also adds to a float32 dq.
        copies: of a side of keys, programs that share out the query heads of a key head.
    """
    batch, q_len, heads, head_dim = q.shape
    k_len, key_heads = k.shape[1:3]
    group = heads // key_heads
    if side.keys:
        # A key head's program reads q and dout of its group, again for every tile of keys.
        heads, group = key_heads * copies, group // copies
        sharing, rows_read = 1, 2 * group * q_len
        if with_dq:
            # Its programs are few and long: they take the group's heads about together, one by one.
            rows_read = 4 * q_len
    else:
        # The group's programs share k and v.
        sharing, rows_read = group, 2 * k_len
    in_l2 = max(1, L2_BYTES // (rows_read * head_dim * q.dtype.itemsize))
    return {
        "tiles_ptr": ADDRESS,
        "entries_ptr": ADDRESS,
        "n_tiles": NUMBER,
        "n_heads": batch * heads,
        "heads_in_flight": min(batch * heads, sharing * in_l2),
        "heads": heads,
        "group": group,
        "softmax_scale": softmax_scale,
        "HEAD_DIM": head_dim,
    }


class BackwardInputs(NamedTuple):
    """What every launch of a backward step depends on.

    Attributes:
        q, k, v, dout: [B, L, H, D]. lse_strides, delta_strides: of [B, H, L].
        documents: whether entries end inside of tensors, see `ends_inside`.
    """

    q: Like
    k: Like
    v: Like
    dout: Like
    lse_strides: tuple[int, ...]
    delta_strides: tuple[int, ...]
    softmax_scale: float
    documents: bool

    def sources(self) -> dict[str, Like]:
        """Return what the kernels read tile by tile, by parameter."""
        return {"q": self.q, "k": self.k, "v": self.v, "dout": self.dout}

    def statistics(self) -> dict[str, Any]:
        """Return the arguments for lse and delta."""
        return {
            "lse_ptr": ADDRESS,
            "delta_ptr": ADDRESS,
            "lse_stride_batch": self.lse_strides[0],
            "lse_stride_head": self.lse_strides[1],
            "delta_stride_batch": self.delta_strides[0],
            "delta_stride_head": self.delta_strides[1],
        }


class BackwardStep(Protocol):
    """A step's backward: all but the addresses, and the tables of documents."""

    def run(
        self,
        step_plan: Step,
        given: dict[str, Tensor],
        dq: Tensor | None,
        result: Tensor | None,
        dkv_target: Callable[[], GradTarget],
    ) -> None:
        """Do as Backend.backward, on the current device.

        Args:
            given: q, k, v, dout, their last dimension contiguous, lse_ptr and delta_ptr.
        """
        ...


class StepTables:
    """The tables of one step, by side: a batch's are found once, documents' are of each call.

    Args:
        sides: those of all passes of the call.
    """

    def __init__(self, sides: tuple[Side, ...], device: torch.device) -> None:
        self._sides, self.device = sides, device
        self._found: dict[Side, Table] = {}

    def of(self, step_plan: Step, side: Side) -> Table:
        """Return the table of the step, which is the same with every call but for its documents."""
        if isinstance(step_plan, DocumentsStep):
            sides = self._sides if side in self._sides else (*self._sides, side)
            return document_tables(step_plan, side, sides)
        found = self._found.get(side)
        if found is None:
            finished = () if side.keys else step_plan.finished
            found = _uploaded(step_plan.blocks, finished, side, self.device)
            self._found[side] = found
        return found


def start_on(table: Table, start: Launch, given: dict[str, Any]) -> None:
    """Launch one program for each of a table's tiles and each head."""
    given["tiles_ptr"], given["entries_ptr"], given["n_tiles"] = table
    start(table.n_tiles * start.arguments["n_heads"], given)


def identity(step_plan: Step) -> tuple[int, ...]:
    """Return what tells a step from every other, but for its documents, while `kept` is alive."""
    if isinstance(step_plan, DocumentsStep):
        documents = step_plan.documents
        lengths = documents.q_len, documents.k_len, len(documents)
        return id(step_plan.plan), step_plan.index, *lengths
    return (id(step_plan),)


def kept(step_plan: Step) -> object:
    """Return what `identity` names: it must outlive what is found by it."""
    return step_plan.plan if isinstance(step_plan, DocumentsStep) else step_plan


def ends_inside(step_plan: Step) -> bool:
    """Return whether what follows on an entry's rows must not reach a product.

    It may be another document or, between the keys of several sources, rows that nobody fetched.
    """
    return isinstance(step_plan, DocumentsStep) or step_plan.span > 0


TargetKey = tuple[tuple, tuple, bool, int]


def target_key(step_plan: Step, target: GradTarget) -> TargetKey:
    """Return what a launch depends on of where dk and dv go.

    The last is how far apart several sources' keys are, if their dk, dv are in several places.
    """
    span = 0 if target.offsets is None else step_plan.span
    return key_of(target.dk), key_of(target.dv), target.add, span


def target_likes(key: TargetKey) -> tuple[Like, Like, bool, int]:
    """Return what a `target_key` says: what dk and dv are like, `add`, and the span."""
    dk, dv, add, span = key
    return Like(*dk), Like(*dv), add, span


def target_tensors(target: GradTarget) -> dict[str, Any]:
    """Return what a launch is given of dk and dv."""
    return {"dk_ptr": target.dk, "dv_ptr": target.dv, "offsets_ptr": target.offsets}


def source_arguments(span: int) -> dict[str, Any]:
    """Return the arguments that say where dk and dv of several sources go, see GradTarget."""
    return {"offsets_ptr": ADDRESS if span else None, "span": span}


def one_entry(step_plan: Step, side: Side) -> bool:
    """Return whether no tile of queries of a step meets more than one entry."""
    if isinstance(step_plan, DocumentsStep):
        return most_entries(step_plan.plan.steps[step_plan.index], side.keys) <= 1
    return _most_entries(step_plan.blocks, step_plan.finished, side.tile_rows) <= 1


@lru_cache(maxsize=512)
def _most_entries(blocks: tuple[Block, ...], finished: tuple[Interval, ...], tile_rows: int) -> int:
    tiles = query_tables(blocks, tile_rows, finished).tiles
    return max((tile.end_entry - tile.first_entry for tile in tiles), default=0)


@lru_cache(maxsize=512)
def _uploaded(
    blocks: tuple[Block, ...], finished: tuple[Interval, ...], side: Side, device: torch.device
) -> Table:
    """Build a step's table on the host and upload it, once a plan.

    The copy blocks, so a table may be read on every stream. One that 511 younger ones have pushed
    out of the cache is freed; the kernels that read it are long done.
    """
    rows = side.tile_rows
    tables = key_tables(blocks, rows) if side.keys else query_tables(blocks, rows, finished)
    tiles, entries = (torch.tensor(x, dtype=torch.int32) for x in (tables.tiles, tables.entries))
    return Table(tiles.to(device), entries.to(device), len(tiles))
