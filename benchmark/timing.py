"""What the benchmarks share: timing, quantiles, FLOPs, and the columns about a row's origin.

Importing it makes the checkout's library and test/oracle.py importable, and puts Triton into its
interpreter where there is no GPU.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "test")]
# Whether the caller wants Triton's interpreter where it takes minutes.
WANTS_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
if not torch.cuda.is_available():
    # Read when Triton is imported, which the library does on the first Triton call.
    os.environ["TRITON_INTERPRET"] = "1"

from tree_hash import tree_hash  # noqa: E402

from comparison import seen_area  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
BACKWARD = 2.5
PASS_FACTOR = {"fwd": 1.0, "bwd": BACKWARD, "fwd_bwd": 1.0 + BACKWARD}
WARMUP = 6  # torch.jit.script in upstream's merge specialises again over its first calls
FLUSH_BYTES = 256 << 20

Window = tuple[int, int]
Run = Callable[[], object]
Mark = Callable[[], None]
Name, Timed = TypeVar("Name"), TypeVar("Timed")


class Quantiles(NamedTuple):
    """Milliseconds of one call."""

    p20: float
    p50: float
    p80: float


def quantiles(times: list[float]) -> Quantiles:
    """Return the 20th, 50th and 80th percentile of at least one time."""
    if len(times) == 1:
        return Quantiles(*times * 3)
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return Quantiles(cuts[1], cuts[4], cuts[7])


def flops(
    batch: int, length: int, heads: int, head_dim: int, causal: bool, window: Window, pass_: str
) -> float:
    """Return the floating-point operations of attention over a whole sequence.

    4 B H D x (pairs that the mask shows; S^2 / 2 if plain causal), backward 2.5 times that.
    """
    area = seen_area(length, causal, window)
    return 4 * batch * heads * head_dim * area * PASS_FACTOR[pass_]


def call_times(run: Run, repeats: int, warmup: int) -> list[float]:
    """Return the milliseconds of `repeats` calls, the host waiting for each."""
    cuda = torch.cuda.is_available()
    for _ in range(warmup):
        run()
    if not cuda:
        return [_host_ms(run) for _ in range(repeats)]
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return times


def row_of_calls(run: Run, calls: int) -> float:
    """Return the milliseconds of each of `calls` calls that the host issues without waiting."""
    cuda = torch.cuda.is_available()
    run()
    if not cuda:
        return sum(_host_ms(run) for _ in range(calls)) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / calls


def queued_times(run: Run, repeats: int, flush: torch.Tensor) -> list[float]:
    """Return the GPU's milliseconds of `repeats` calls, launched ahead, each with a cold L2."""

    def whole(begin: Mark, end: Mark) -> None:
        begin()
        run()
        end()

    return queued_spans(whole, repeats, flush)


def queued_spans(
    run: Callable[[Mark, Mark], None], repeats: int, flush: torch.Tensor
) -> list[float]:
    """Return the GPU's milliseconds between the two marks that each of `repeats` calls sets.

    One call more than that goes first: it fills the queue, so that launching costs no later one.
    """
    events = []
    for _ in range(repeats + 1):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run(begin.record, end.record)
        events.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events[1:]]


def interleaved(
    runs: dict[Name, Timed], rounds: int, time_one: Callable[[Timed], list[float]]
) -> dict[Name, list[float]]:
    """Return every run's times, taken in turn round by round, so that all see the same clocks.

    Every other round goes backwards: a GPU lowers its clocks after a run that draws much power, and
    would do so for the same neighbour every time.
    """
    times: dict[Name, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for _ in range(rounds):
        for name in order:
            times[name] += time_one(runs[name])
        order.reverse()
    return times


def flush_buffer() -> torch.Tensor:
    """Return what `queued_times` overwrites to empty the L2."""
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")


def origin(run: str, commit: str | None, tree: str | None, shared_gpu: bool = False) -> dict:
    """Return the columns run, date, commit, tree, gpu, torch and triton of every row.

    Where `commit` and `tree` are None they come from git; without git, or with changes in the
    library that are not committed, commit is empty and tree is `tree_hash`.
    """
    found_commit, found_tree = _committed()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "run": run,
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "commit": found_commit if commit is None else commit,
        "tree": found_tree if tree is None else tree,
        "gpu": gpu + (" (shared)" if shared_gpu else ""),
        "torch": torch.__version__,
        "triton": _triton_version(),
    }


def new_run() -> str:
    """Return a run id from the time."""
    return f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}"


def window_text(window: Window) -> str:
    return f"{window[0]}:{window[1]}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _host_ms(run: Run) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _committed() -> tuple[str, str]:
    """Return (commit, git's tree of ring_flash_attn), or ("", tree_hash) if git cannot say."""
    try:
        if _git("status", "--porcelain", "--", "ring_flash_attn"):
            return "", tree_hash()
        return _git("rev-parse", "HEAD"), _git("rev-parse", "HEAD:ring_flash_attn")
    except (OSError, subprocess.CalledProcessError):
        return "", tree_hash()


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__
