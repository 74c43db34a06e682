"""Flash attention on one GPU, the native ring, the Triton ring and ring-flash-attn 0.1.8, timed.

    torchrun --nproc_per_node 4 benchmark/benchmark_comparison.py --csv benchmark/results/ring.csv
    torchrun --nproc_per_node 2 benchmark/benchmark_comparison.py --local-lengths 2048 8192 32768
    python benchmark/benchmark_comparison.py             # a ring of one

Every implementation is timed in turn, the host waiting for each call: p20, p50, p80 of the slowest
rank. Share of kernel: the same kernel's time on one GPU for the local length, times the ranks, over
the ring's time; `triton` against this library's kernels, the others against their flash kernel. Up
to a global length of 16384 errors are taken against dense attention in float64.

ring-flash-attn 0.1.8 and FlashAttention-3 come from the folder that $PEERS names (.peers); what is
not available is skipped with its reason. Upstream over FlashAttention-2 and over FlashAttention-3
are timed in one process. Several processes can share one --run-id. On a CPU it runs small, over
gloo and Triton's interpreter: right, but no measure of speed.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path

import rows
import timing
import torch
import torch.distributed as dist
from kernels import Inputs, draw, kernels, truth, use_peers
from report import rings_table
from rings import KERNELS, STEMS, Ring, forward_only, over_ranks, ring, ring_errors, step

from comparison import Place, join
from ring_flash_attn.core.attention import Attention

LONGEST_TRUTH = 16384
CALLS = 5  # timed calls of an implementation before the next one's turn
ONE_GPU = "one GPU"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--layouts", nargs="+", choices=STEMS, default=list(STEMS))
    add("--local-lengths", nargs="+", type=int, default=[8192] if on_gpu else [32])
    add("--masks", nargs="+", choices=("causal", "full", "window"), default=["causal"])
    add("--window", type=int, help="left tokens of mask window; a quarter of the sequence if unset")
    add("--batch", type=int, default=1)
    add("--heads", type=int, default=32 if on_gpu else 4)
    add("--kv-heads", type=int, default=8 if on_gpu else 2)
    add("--head-dim", type=int, default=128 if on_gpu else 16)
    add("--dtype", choices=timing.DTYPES, default="bf16")
    add("--implementations", nargs="+", choices=KERNELS, default=list(KERNELS))
    add("--passes", nargs="+", choices=("fwd", "fwd_bwd"), default=["fwd", "fwd_bwd"])
    add("--repeats", type=int, default=15 if on_gpu else 2)
    add("--no-errors", action="store_true")
    add("--csv", type=Path, help="append the rows to this file")
    # torchrun reads --run as the beginning of its own --run-path, so there only --run-id works.
    add("--run-id", "--run", dest="run", default=timing.new_run(), help="column run")
    add("--tree", help="hash of ring_flash_attn/, where git is absent")
    add("--commit", help="hash of the commit, where git is absent")
    add("--allow-shared-gpus", action="store_true", help="time more ranks than GPUs")
    options = parser.parse_args(arguments)
    if "zigzag" in options.layouts and any(n % 2 for n in options.local_lengths):
        parser.error(f"--local-lengths: zigzag needs even ones, got {options.local_lengths}")
    return options


class Comparison:
    """One invocation: its options, this rank's place, and the rows so far."""

    def __init__(self, options: argparse.Namespace, place: Place) -> None:
        shared = place.device.type == "cuda" and place.transport != "nccl"
        self.options, self.place = options, place
        self.source = timing.origin(options.run, options.commit, options.tree, shared)
        self.measured: list[dict] = []
        self._skipped: set[str] = set()

    def say(self, *words: str) -> None:
        if self.place.rank == 0:
            print(*words, flush=True)

    def run(self) -> None:
        """Measure every case, write its rows as they come, and print the table."""
        o, begin = self.options, time.monotonic()
        self.say(", ".join(f"{key} {value}" for key, value in self.source.items()))
        cases = list(itertools.product(o.local_lengths, o.masks))
        for number, (length, mask) in enumerate(cases, 1):
            attention = self._attention(length, mask)
            inputs = self._draw(length, attention, 1 + self.place.rank)
            self._progress(begin, number, len(cases), length, mask, ONE_GPU)
            alone = self._kernel_times(inputs)
            whole, want = None, None
            if not o.no_errors and length * self.place.world_size <= LONGEST_TRUTH:
                whole = self._draw(length * self.place.world_size, attention, 0)
                want = truth(whole)
            for layout in o.layouts:
                self._progress(begin, number, len(cases), length, mask, layout)
                rings = self._rings(layout, inputs)
                errors = {}
                if whole is not None and want is not None:
                    errors = {
                        impl: ring_errors(run, layout, whole, want, self.place)._asdict()
                        for impl, run in rings.items()
                    }
                self._measure(layout, inputs, rings, alone, errors)
        self.say("\n" + rings_table(self.measured))

    def _progress(self, begin: float, number: int, cases: int, *words: object) -> None:
        elapsed = time.monotonic() - begin
        self.say(f"[{number}/{cases}] {elapsed:.0f} s: local length", *map(str, words))

    def _attention(self, length: int, mask: str) -> Attention:
        left = self.options.window or length * self.place.world_size // 4
        window = (left, 0) if mask == "window" else (-1, -1)
        return Attention(self.options.head_dim**-0.5, mask != "full", window)

    def _draw(self, length: int, attention: Attention, seed: int) -> Inputs:
        o = self.options
        sizes = (o.batch, length, o.heads, o.kv_heads, o.head_dim)
        return draw(*sizes, timing.DTYPES[o.dtype], attention, seed)

    def _try(self, name: str, make: Callable[[], object]) -> object | None:
        """Return what `make` returns, or None on every rank if it raises on any."""
        made, reason = None, ""
        # An implementation that raises, whatever it raises, must not end the others' run.
        try:
            made = make()
            if self.place.device.type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            kind = "" if isinstance(error, NotImplementedError) else f"{type(error).__name__}: "
            reason = " ".join(f"{kind}{error}".split())[:400]
        [failed] = over_ranks([float(bool(reason))], dist.ReduceOp.MAX, self.place)
        if not failed:
            return made
        line = f"skipped {name}: {reason or 'another rank failed'}"
        if line not in self._skipped:
            self.say(line)
        self._skipped.add(line)
        return None

    def _rings(self, layout: str, inputs: Inputs) -> dict[str, Ring]:
        """Return the implementations that ran forward and backward once."""

        def made(impl: str) -> Ring:
            found = ring(impl, layout, inputs)
            step(found, inputs)()
            return found

        tried = {
            impl: self._try(impl, lambda impl=impl: made(impl))
            for impl in self.options.implementations
        }
        return {impl: found for impl, found in tried.items() if found is not None}

    def _kernel_times(self, inputs: Inputs) -> dict[tuple[str, str], float]:
        """Return the median ms of the kernels that the implementations share, by kernel and pass.

        Also puts them into the table, as rows of one GPU.
        """
        runs = {}
        for name in dict.fromkeys(KERNELS[impl] for impl in self.options.implementations):
            found = self._try(f"one-GPU {name}", lambda name=name: kernels(name, inputs))
            runs |= {(x.impl, x.pass_): x.run for x in found or () if not x.state}
        times = self._timed(runs)
        for (impl, pass_), ms in times.items():
            self.measured.append(self._row(ONE_GPU, inputs, impl, pass_, ms, 1))
        return {key: ms.p50 for key, ms in times.items()}

    def _measure(
        self,
        layout: str,
        inputs: Inputs,
        rings: dict[str, Ring],
        alone: dict[tuple[str, str], float],
        errors: dict[str, dict[str, float]],
    ) -> None:
        """Time the rings of one layout and keep and write their rows."""
        for pass_ in self.options.passes:
            make = forward_only if pass_ == "fwd" else step
            runs = {impl: make(found, inputs) for impl, found in rings.items()}
            times = self._timed(runs)
            for impl, ms in times.items():
                row = self._row(layout, inputs, impl, pass_, ms, self.place.world_size)
                row["share_of_kernel"] = self._share(inputs, impl, pass_, ms.p50, alone)
                row["peak_gib"] = self._peak(runs[impl], inputs)
                for name, error in errors.get(impl, {}).items():
                    if name == "out" or pass_ == "fwd_bwd":
                        row[f"err_{name}"] = error
                self.measured.append(row)
                if self.options.csv and self.place.rank == 0:
                    rows.append(self.options.csv, rows.RING, row)

    def _timed(self, runs: dict) -> dict:
        """Return quantiles by name: in turn, the slowest rank's."""
        repeats, cuda = self.options.repeats, self.place.device.type == "cuda"
        for run in runs.values():
            timing.call_times(run, 0, timing.WARMUP if cuda else 1)

        def turn(run: timing.Run) -> list[float]:
            dist.barrier()
            return timing.call_times(run, min(CALLS, repeats), int(cuda))

        times = timing.interleaved(runs, -(-repeats // CALLS), turn)
        return {
            name: timing.Quantiles(
                *over_ranks([*timing.quantiles(ms[:repeats])], dist.ReduceOp.MAX, self.place)
            )
            for name, ms in times.items()
        }

    def _peak(self, run: timing.Run, inputs: Inputs) -> float | None:
        """Return the most GiB that a call holds beyond what is there, on any rank."""
        if self.place.device.type != "cuda":
            return None
        for x in inputs[:3]:
            x.grad = None
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        gib = (torch.cuda.max_memory_allocated() - before) / 2**30
        return over_ranks([gib], dist.ReduceOp.MAX, self.place)[0]

    def _share(
        self,
        inputs: Inputs,
        impl: str,
        pass_: str,
        ms: float,
        alone: dict[tuple[str, str], float],
    ) -> float | None:
        """Return the share of the kernel; None under a window, where local work is no measure."""
        passes = ("fwd", "bwd") if pass_ == "fwd_bwd" else ("fwd",)
        known = [alone.get((KERNELS[impl], x)) for x in passes]
        if None in known or inputs.attention.window != (-1, -1):
            return None
        return sum(known) * self.place.world_size / ms

    def _row(
        self, layout: str, inputs: Inputs, impl: str, pass_: str, ms: timing.Quantiles, ranks: int
    ) -> dict:
        """Return a row without share, peak and errors. `ranks` share the sequence."""
        o, attention = self.options, inputs.attention
        local, mask = inputs.q.shape[1], (attention.causal, attention.window)
        work = timing.flops(o.batch, local * ranks, o.heads, o.head_dim, *mask, pass_) / ranks
        given = {
            **self.source,
            **{"world_size": ranks, "impl": impl, "exchange": "ring", "layout": layout},
            **{"packing": "batch", "pass": pass_, "dtype": o.dtype, "batch": o.batch},
            **{"local_len": local, "heads": o.heads, "kv_heads": o.kv_heads},
            **{"head_dim": o.head_dim, "causal": mask[0], "window": timing.window_text(mask[1])},
            **{"graph": 0, "ms_p20": ms.p20, "ms_p50": ms.p50, "ms_p80": ms.p80},
            "tflops_per_gpu": work / ms.p50 / 1e9,
        }
        return {**dict.fromkeys(rows.RING), **given}


def heading(place: Place) -> str:
    ranks = f"{place.world_size} rank{'s' if place.world_size > 1 else ''}, {place.transport}"
    if place.device.type == "cpu":
        return (
            f"{ranks}; no GPU: CPU tensors and Triton's interpreter, right but no measure of "
            "speed; rows are written only with --csv"
        )
    return ranks if place.transport == "nccl" else f"{ranks}: shared GPUs, no measure of speed"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    place = join()
    try:
        comparison = Comparison(options, place)
        comparison.say(heading(place))
        shared = place.device.type == "cuda" and place.transport != "nccl"
        if shared and not options.allow_shared_gpus:
            comparison.say("more ranks than GPUs: nothing timed without --allow-shared-gpus")
            return 2
        use_peers()
        comparison.run()
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
