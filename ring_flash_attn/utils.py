"""Communication over a process group, and the free functions that ring-flash-attn exports."""

import inspect
import warnings
from collections.abc import Callable
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from .ranks import ranks_of

__all__ = [
    "AllGatherComm",
    "RingComm",
    "flatten_varlen_lse",
    "get_default_args",
    "unflatten_varlen_lse",
    "update_out_and_lse",
]


class RingComm:
    """Send to the next rank of a group while receiving from the previous one.

    Collect pairs with `send_recv`, start them with `commit`, and make the current stream (gloo:
    the host) wait for them with `wait`. Tensors belong to the transfer until `wait` returns. On a
    group of one rank a transfer is a copy and nothing is sent.

    Args:
        process_group: the group whose ranks form the ring; None for the default group.

    Attributes:
        carries: what travels, for the error of a transfer that fails.
    """

    carries = "a message"

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        self._connect(process_group, 1)

    def _connect(self, process_group: dist.ProcessGroup | None, offset: int) -> None:
        """Send `offset` ranks ahead, receive from as many ranks behind."""
        self._process_group = process_group
        ranks = ranks_of(process_group)
        self.rank, self.world_size = ranks.rank, ranks.size
        self.send_rank = ranks.globally[(self.rank + offset) % self.world_size]
        self.recv_rank = ranks.globally[(self.rank - offset) % self.world_size]
        self._local = offset % self.world_size == 0
        self._hop = 0
        self._sends: list[Tensor] = []
        self._receives: list[Tensor] = []
        self._arrived: list[Tensor] = []  # host copies that stand in for `_receives`
        self._requests: list[dist.Work] | None = None

    def send_recv(self, to_send: Tensor, recv_tensor: Tensor | None = None) -> Tensor:
        """Add a pair to the next `commit`.

        Args:
            to_send: any shape, contiguous; equal shape and dtype on every rank.
            recv_tensor: where to receive; allocated like `to_send` if None.

        Returns:
            The tensor that will hold the previous rank's message after `wait`.
        """
        received = torch.empty_like(to_send) if recv_tensor is None else recv_tensor
        self._sends.append(to_send)
        self._receives.append(received)
        return received

    def transfer(self, sends: list[Tensor], receives: list[Tensor]) -> None:
        """Start messages of which this rank may send and receive different numbers and sizes.

        Args:
            sends: contiguous; the next rank must receive just these. receives: likewise.
        """
        self._sends += sends
        self._receives += receives
        self.commit()

    def commit(self) -> None:
        """Start all pairs collected so far, in one batch."""
        if self._requests is not None:
            raise RuntimeError("RingComm.commit called twice without a wait in between")
        self._hop += 1
        if self._local:
            for to_send, received in zip(self._sends, self._receives, strict=True):
                received.copy_(to_send)
            self._requests = []
            return
        sends, receives = self._stage()
        group = self._process_group
        operations = [dist.P2POp(dist.isend, x, self.send_rank, group) for x in sends]
        operations += [dist.P2POp(dist.irecv, x, self.recv_rank, group) for x in receives]
        try:
            self._requests = dist.batch_isend_irecv(operations) if operations else []
        except RuntimeError as error:
            raise lost(error, self._process_group, self._doing()) from error

    def wait(self) -> None:
        """Make the current stream (gloo: the host) wait for everything committed."""
        if self._requests is None:
            raise RuntimeError("RingComm.wait called before commit")
        index = 0
        try:
            for index, request in enumerate(self._requests):  # noqa: B007 (read in the handler)
                request.wait()
        except RuntimeError as error:
            raise lost(error, self._process_group, self._doing(index)) from error
        if self._arrived:
            for received, arrived in zip(self._receives, self._arrived, strict=True):
                received.copy_(arrived)
        self._requests, self._sends, self._receives, self._arrived = None, [], [], []

    def send_recv_kv(
        self,
        k: Tensor,
        v: Tensor,
        k_buffer: Tensor | None = None,
        v_buffer: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Send k and v and start the transfer; returns where the previous rank's will arrive."""
        next_k, next_v = self.send_recv(k, k_buffer), self.send_recv(v, v_buffer)
        self.commit()
        return next_k, next_v

    def _doing(self, index: int = 0) -> str:
        """Say what a request does: there is one of each message, sends first, or one of all."""
        ways = [f"sending to global rank {self.send_rank}"]
        ways += [f"receiving from global rank {self.recv_rank}"]
        messages = len(self._sends) + len(self._receives)
        if self._requests is not None and len(self._requests) == messages:
            ways = [ways[index >= len(self._sends)]]
        return f"{' and '.join(ways)} ({self.carries}, hop {self._hop})"

    def _stage(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return what to send and receive: gloo moves no CUDA tensors, host copies stand in."""
        if not any(x.is_cuda for x in (*self._sends, *self._receives)):
            return self._sends, self._receives
        if ranks_of(self._process_group).send_cuda:
            return self._sends, self._receives
        _warn_staging()
        self._arrived = [torch.empty_like(x, device="cpu") for x in self._receives]
        return [x.cpu() for x in self._sends], self._arrived


class ShiftComm(RingComm):
    """A ring whose neighbours are `offset` ranks apart; negative sends backwards."""

    def __init__(self, process_group: dist.ProcessGroup | None, offset: int) -> None:
        self._connect(process_group, offset)


class _CollectiveComm:
    """Collectives of a group, several in flight; `carries` is what they move, for errors."""

    carries = "tensors"
    _verb: str

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.handles: list[dist.Work] = []

    def _start(self, collective: Callable, output_tensor: Tensor, input_tensor: Tensor) -> None:
        try:
            handle = collective(output_tensor, input_tensor, group=self.group, async_op=True)
        except RuntimeError as error:
            raise lost(error, self.group, f"starting to {self._verb} {self.carries}") from error
        self.handles.append(handle)

    def wait(self) -> None:
        """Make the current stream (gloo: the host) wait for everything started."""
        try:
            for handle in self.handles:
                handle.wait()
        except RuntimeError as error:
            raise lost(error, self.group, f"waiting to {self._verb} {self.carries}") from error
        self.handles = []


class AllGatherComm(_CollectiveComm):
    """Gather equal shards of every rank, several in flight; None means the default group."""

    _verb = "gather"

    def all_gather(self, output_tensor: Tensor, input_tensor: Tensor) -> None:
        """Start gathering `input_tensor` [n, ...] of every rank into `output_tensor` [P n, ...]."""
        self._start(_all_gather, output_tensor, input_tensor)


class ReduceScatterComm(_CollectiveComm):
    """Sum every rank's tensor and keep one's own shard, several in flight, as AllGatherComm."""

    _verb = "sum"

    def reduce_scatter(self, output_tensor: Tensor, input_tensor: Tensor) -> None:
        """Start summing `input_tensor` [P n, ...] over the ranks into `output_tensor` [n, ...]."""
        self._start(_reduce_scatter, output_tensor, input_tensor)


def lost(error: RuntimeError, group: dist.ProcessGroup | None, doing: str) -> RuntimeError:
    """Return an error of the same type that says which rank fails while doing what.

    Args:
        error: torch.distributed's: a rank of `group` has died, or has not come in its timeout.
    """
    rank, size = dist.get_rank(), dist.get_world_size(group)
    text = f"ring attention: global rank {rank}, group of {size}, {doing}: {error}"
    try:
        return type(error)(text)
    except TypeError:  # a type that wants more than a text
        return RuntimeError(text)


def update_out_and_lse(
    out: Tensor | None,
    lse: Tensor | None,
    block_out: Tensor,
    block_lse: Tensor,
    slice_: tuple | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge a block's attention into a running result, in float32.

    Args:
        out: [B, L, H, D] float32, or None for the first block; written in place under `slice_`.
        lse: [B, L, H, 1] float32, or None for the first block; written in place under `slice_`.
        block_out: [B, n, H, D], any float dtype. block_lse: [B, H, n] natural log.
        slice_: index of the n rows of out and lse that this block updates; None for all.

    Returns:
        (out, lse). A row that saw nothing on either side stays (0, -inf).
    """
    block_out = block_out.to(torch.float32)
    block_lse = block_lse.to(torch.float32).transpose(-2, -1).unsqueeze(-1)
    if out is None or lse is None:
        if slice_ is not None:
            raise RuntimeError("the first update_out_and_lse takes no slice_")
        return block_out, block_lse
    if slice_ is not None:
        out[slice_], lse[slice_] = _merge(out[slice_], lse[slice_], block_out, block_lse)
        return out, lse
    return _merge(out, lse, block_out, block_lse)


def _merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.logaddexp(lse, block_lse)
    finite = torch.where(total == -torch.inf, 0.0, total)
    return out * torch.exp(lse - finite) + block_out * torch.exp(block_lse - finite), total


def flatten_varlen_lse(lse: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Pack an lse that is padded document by document.

    Reads cu_seqlens on the host.

    Args:
        lse: [N, H, max_seqlen], any dtype; no document is longer than max_seqlen.
        cu_seqlens: [N + 1] int32, where each of the N documents begins, then T, their rows.

    Returns:
        [H, T], contiguous, of lse's dtype.
    """
    rows = _within_documents(cu_seqlens, lse.shape[2])
    return lse.transpose(1, 2)[rows].transpose(0, 1).contiguous()


def unflatten_varlen_lse(lse: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Pad a packed lse document by document: `flatten_varlen_lse` of its result is lse transposed.

    Reads cu_seqlens on the host.

    Args:
        lse: [T, H, 1] or [T, H], any dtype.
        cu_seqlens: [N + 1] int32, where each of the N documents begins, then T, their rows.
        max_seqlen: rows a document is padded to; at least the longest document's.

    Returns:
        [N, H, max_seqlen], contiguous, of lse's dtype; 0 past the end of a document.
    """
    lse = lse.squeeze(2) if lse.ndim == 3 else lse
    rows = _within_documents(cu_seqlens, max_seqlen)
    padded = lse.new_zeros(*rows.shape, lse.shape[1])
    padded[rows] = lse
    return padded.transpose(1, 2).contiguous()


def _within_documents(cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Return [N, max_seqlen] bool: True where a padded row belongs to its document."""
    return torch.arange(max_seqlen, device=cu_seqlens.device) < cu_seqlens.diff().unsqueeze(1)


@cache
def _default_args(func: Callable) -> dict:
    parameters = inspect.signature(func).parameters.values()
    defaults = {p.name: None if p.default is p.empty else p.default for p in parameters}
    if "softcap" in defaults:
        defaults["softcap"] = 0.0
    return defaults


def get_default_args(func: Callable) -> dict:
    """Return {parameter: default} of a function or of a torch custom op, None where it has none."""
    return _default_args(func if inspect.isfunction(func) else func._init_fn)


@cache
def _warn_staging() -> None:
    warnings.warn(
        "CUDA tensors on a gloo group travel through host memory: correct, but slow. "
        "Use an nccl group where every rank has its own GPU.",
        stacklevel=2,
    )


# torch 2.13 renamed the collectives and warns about the old names; 2.11 lacks the new ones.
_all_gather = (
    dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
)
_reduce_scatter = (
    dist.reduce_scatter_single
    if hasattr(dist, "reduce_scatter_single")
    else dist.reduce_scatter_tensor
)
