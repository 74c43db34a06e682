"""What a call of the Triton ring costs the host, by pass, exchange and packing, in microseconds.

    torchrun --nproc_per_node 4 benchmark/host_time.py --csv benchmark/results/host.csv
    python benchmark/host_time.py --stand-in 4 8        # one GPU, the other ranks a stand-in
    taskset -c 2 python benchmark/host_time.py --stand-in 4

The clock runs from a call until it returns, on an idle GPU, without a wait, with warm caches: the
Python, torch and driver time of a pass. `per step` is a pass over its steps, one for each rank's
keys. `per hop` is what another rank adds: the pass, less that of the same shape on one rank, over
P - 1. The slowest rank counts.

`queued` is a pass behind others, while the GPU has work to do, as in training: there the host's
caches are warm. `driver` is what of that lies inside the CUDA driver, measured in calls by
themselves, and `Python` what is left a hop. --stand-in: see stand_in.py. Threads wake each other
slowly on virtual machines, and autograd's backward is one of its own: pinned to one CPU (taskset)
a pass takes what its Python takes. On a CPU it runs the reference backend over gloo, where the host
computes and waits: the same rows, no measure of anything.
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import rows
import stand_in
import timing
import torch
import torch.distributed as dist
from driver_clock import driver_clock
from packing import BATCH, STATED, pack
from rank_timing import over_ranks
from stand_in import TRANSPORT
from torch import Tensor

from comparison import Place, join
from ring_flash_attn import packed_attention, ring_attention

EXCHANGES = ("ring", "copy-engine")
PASSES = ("fwd", "bwd")
WARMUP = 5
TURN = 5  # calls of a case before the next one's turn
BUSY_CLOCKS = 60_000_000  # of a GPU's sleep, some 30 ms: more than a turn takes the host
Case = tuple[str, str, int]  # exchange, packing, ranks


def parse(arguments: list[str] | None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--exchanges", nargs="+", choices=EXCHANGES, help="all that run here if unset")
    add("--packed", nargs="+", choices=(BATCH, STATED), default=[BATCH, STATED])
    add("--local-len", type=int, default=2048 if on_gpu else 32)
    add("--heads", type=int, default=32 if on_gpu else 4)
    add("--kv-heads", type=int, default=8 if on_gpu else 2)
    add("--head-dim", type=int, default=128 if on_gpu else 16)
    add("--repeats", type=int, default=100 if on_gpu else 5, help="calls of each case")
    add("--stand-in", type=int, nargs="+", default=[], help="one of so many ranks, on one GPU")
    add("--csv", type=Path, help="append the rows to this file")
    add("--run-id", "--run", dest="run", default=timing.new_run(), help="column run")
    add("--tree", help="hash of ring_flash_attn/, where git is absent")
    add("--commit", help="hash of the commit, where git is absent")
    options = parser.parse_args(arguments)
    if options.stand_in and options.exchanges not in (None, ["copy-engine"]):
        parser.error("--stand-in takes no messages: --exchanges must be copy-engine, if given")
    if options.exchanges is None:
        options.exchanges = list(EXCHANGES) if on_gpu else ["ring"]
    if options.stand_in:
        options.exchanges = ["copy-engine"]
    return options


def attend(case: Case, o: argparse.Namespace, place: Place, group) -> Callable[..., Tensor]:
    """Return q, k, v -> out, causal zigzag, on the ranks of `group`; packed ones [T, H, D]."""
    exchange, packing, _ = case
    backend = "triton" if place.device.type == "cuda" else "reference"
    options = {"layout": "zigzag", "causal": True, "backend": backend, "group": group}
    options["exchange"] = exchange
    if packing == BATCH:
        return lambda q, k, v: ring_attention(q, k, v, **options)[0]
    lengths = [n // place.world_size for n in pack(packing, o.local_len, place.world_size).lengths]
    edges = [0, *itertools.accumulate(lengths)]
    cu_seqlens = torch.tensor(edges, dtype=torch.int32, device=place.device)
    given = cu_seqlens, max(lengths)
    return lambda q, k, v: packed_attention(q, k, v, *given, **options)[0]


def pass_times(run: Callable[..., Tensor], tensors: list[Tensor], calls: int) -> list[list[float]]:
    """Return [forward, backward] of each call in microseconds of the host, the GPU idle before.

    tensors: q, k, v, which require a gradient, and dout.
    """
    *leaves, dout = tensors
    times = []
    for _ in range(calls):
        _drain()
        begin = time.perf_counter()
        out = run(*leaves)
        middle = time.perf_counter()
        _drain()
        again = time.perf_counter()
        torch.autograd.grad(out, leaves, dout)
        end = time.perf_counter()
        times.append([1e6 * (middle - begin), 1e6 * (end - again)])
    return times


def queued_times(
    run: Callable[..., Tensor], tensors: list[Tensor], calls: int, clock: Callable[[], float]
) -> list[list[float]]:
    """Return [forward, backward] of each call in microseconds of a clock, while the GPU is busy."""
    *leaves, dout = tensors
    times = []
    for _ in range(calls):
        if len(times) % TURN == 0:
            _drain()
            _occupy()
        begin = clock()
        out = run(*leaves)
        middle = clock()
        torch.autograd.grad(out, leaves, dout)
        times.append([middle - begin, clock() - middle])
    return times


def _occupy() -> None:
    if torch.cuda.is_available():
        torch.cuda._sleep(BUSY_CLOCKS)


def _drain() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Host(NamedTuple):
    """Microseconds of the host: of a pass, the slowest rank's; in the driver, the quickest's."""

    whole: timing.Quantiles
    queued: float
    driver: float


def measure(o: argparse.Namespace, place: Place) -> dict[tuple[Case, str], Host]:
    """Return the host's microseconds by case and pass, the cases in turn."""
    alone = [dist.new_group([rank]) for rank in range(place.world_size)][place.rank]
    torch.manual_seed(place.rank)
    drawn = [
        torch.randn(1, o.local_len, heads, o.head_dim, device=place.device, dtype=torch.bfloat16)
        for heads in (o.heads, o.kv_heads, o.kv_heads, o.heads)
    ]
    # Leaves of their own: a view between would have a gradient to make, of all rows.
    packings = {BATCH: drawn, STATED: [x[0].clone() for x in drawn]}
    for x in (x for packing in packings.values() for x in packing[:3]):
        x.requires_grad_()
    cases = list(itertools.product(o.exchanges, o.packed, sorted({1, place.world_size})))
    runs = {case: attend(case, o, place, None if case[2] > 1 else alone) for case in cases}
    given = {case: (run, packings[case[1]]) for case, run in runs.items()}
    for run in given.values():
        pass_times(*run, WARMUP)
    dist.barrier()
    turns = -(-o.repeats // TURN)
    times = timing.interleaved(given, turns, lambda run: pass_times(*run, TURN))
    found = {}
    for case, pairs in times.items():
        run, tensors = given[case]
        queued = queued_times(run, tensors, o.repeats, lambda: 1e6 * time.perf_counter())
        with driver_clock() as clock:
            inside = queued_times(run, tensors, o.repeats, lambda clock=clock: clock.us)
        for i, pass_ in enumerate(PASSES):
            own = [*_of_pass(pairs, i), _of_pass(queued, i).p50]
            *whole, behind = over_ranks(own, dist.ReduceOp.MAX, place)
            driver = over_ranks([_of_pass(inside, i).p50], dist.ReduceOp.MIN, place)
            found[case, pass_] = Host(timing.Quantiles(*whole), behind, *driver)
    return found


def _of_pass(times: list[list[float]], index: int) -> timing.Quantiles:
    return timing.quantiles([us[index] for us in times])


def table(o: argparse.Namespace, place: Place, found: dict[tuple[Case, str], Host]) -> list[dict]:
    """Return the rows of the cases on all ranks."""
    source = timing.origin(o.run, o.commit, o.tree) | {"cpu": _cpu()}
    source |= {"cpus": len(os.sched_getaffinity(0)), "stand_in": place.transport == TRANSPORT}
    shape = {"dtype": "bf16", "local_len": o.local_len, "heads": o.heads}
    shape |= {"kv_heads": o.kv_heads, "head_dim": o.head_dim, "world_size": place.world_size}
    made = []
    for ((exchange, packing, ranks), pass_), (us, queued, driver) in found.items():
        if ranks < place.world_size:
            continue
        alone = found[(exchange, packing, 1), pass_]
        one = alone.whole.p50
        hops, python = us.p50 - one, queued - driver - (alone.queued - alone.driver)
        made.append(
            source
            | shape
            | {"exchange": exchange, "packing": packing, "pass": pass_, "us_one_rank": one}
            | {"us_p20": us.p20, "us_p50": us.p50, "us_p80": us.p80, "us_per_step": us.p50 / ranks}
            | {"us_per_hop": hops / (ranks - 1) if ranks > 1 else None}
            | {"us_queued": queued, "us_driver": driver}
            | {"us_python_per_hop": python / (ranks - 1) if ranks > 1 else None}
        )
    return made


def _cpu() -> str:
    """Return the model of the CPU, "" where nobody says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    for join_group in [partial(stand_in.join, size) for size in options.stand_in] or [join]:
        place = join_group()
        try:
            for row in table(options, place, measure(options, place)):
                if place.rank == 0 or row["stand_in"]:
                    _tell(options, row)
        finally:
            dist.destroy_process_group()
    return 0


def _tell(o: argparse.Namespace, row: dict) -> None:
    hop = "" if row["us_per_hop"] is None else f"{row['us_per_hop']:.1f}"
    python = row["us_python_per_hop"]
    hop += "" if python is None else f" (Python {python:.1f})"
    print(
        f"{row['world_size']} ranks {row['exchange']:11} {row['packing']:6} "
        f"{row['pass']}: {row['us_p50']:.0f} us ({row['us_p20']:.0f}-"
        f"{row['us_p80']:.0f}), per step {row['us_per_step']:.1f}, per hop {hop}, "
        f"one rank {row['us_one_rank']:.0f}, queued {row['us_queued']:.0f}, "
        f"driver {row['us_driver']:.0f}",
        flush=True,
    )
    if o.csv:
        rows.append(o.csv, rows.HOST, row)


if __name__ == "__main__":
    sys.exit(main())
