"""What the ranks of a benchmark find together: reductions, times, peak memory, a failure."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import timing  # makes the library and the oracle importable
import torch
import torch.distributed as dist
from torch import Tensor

from comparison import Place

CALLS = 3  # timed calls of an implementation before the next one's turn
Made = TypeVar("Made")


def over_ranks(values: list, operation: dist.ReduceOp.RedOpType, place: Place) -> list:
    """Reduce a (nested) list of numbers over the ranks."""
    on = place.device if place.transport == "nccl" else torch.device("cpu")
    total = torch.tensor(values, dtype=torch.float64, device=on)
    dist.all_reduce(total, op=operation)
    return total.tolist()


def attempt(make: Callable[[], Made], place: Place) -> tuple[Made | None, str]:
    """Return what `make` returns and "", or on every rank None and a reason if any rank fails."""
    made, reason = None, ""
    # An implementation that raises, whatever it raises, must not end the others' run.
    try:
        made = make()
        if place.device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        kind = "" if isinstance(error, NotImplementedError) else f"{type(error).__name__}: "
        reason = " ".join(f"{kind}{error}".split())[:400]
    [failed] = over_ranks([float(bool(reason))], dist.ReduceOp.MAX, place)
    return (None, reason or "another rank failed") if failed else (made, "")


def slowest_times(runs: dict, repeats: int, place: Place, queued: int = 0) -> dict:
    """Return quantiles of `repeats` calls by name: the runs in turn, the slowest rank's.

    Args:
        queued: calls that the host issues without waiting, one of the `repeats`; 0: it waits for
            each.
    """
    cuda = place.device.type == "cuda"
    for run in runs.values():
        timing.call_times(run, 0, timing.WARMUP if cuda else 1)

    def turn(run: timing.Run) -> list[float]:
        dist.barrier()
        if queued:
            return [timing.row_of_calls(run, queued)]
        return timing.call_times(run, min(CALLS, repeats), int(cuda))

    times = timing.interleaved(runs, repeats if queued else -(-repeats // CALLS), turn)
    return {
        name: timing.Quantiles(
            *over_ranks([*timing.quantiles(ms[:repeats])], dist.ReduceOp.MAX, place)
        )
        for name, ms in times.items()
    }


def peak_gib(run: timing.Run, leaves: Sequence[Tensor], place: Place) -> float | None:
    """Return the most GiB that a call holds beyond what is there, on any rank; None on a CPU.

    Args:
        leaves: whose gradients the call makes anew; dropped here.
    """
    if place.device.type != "cuda":
        return None
    for x in leaves:
        x.grad = None
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    gib = (torch.cuda.max_memory_allocated() - before) / 2**30
    return over_ranks([gib], dist.ReduceOp.MAX, place)[0]
