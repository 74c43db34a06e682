"""Flash attention on one GPU, the native ring, the Triton ring and ring-flash-attn 0.1.8, timed.

    torchrun --nproc_per_node 4 benchmark/benchmark_comparison.py --csv benchmark/results/ring.csv
    torchrun --nproc_per_node 2 benchmark/benchmark_comparison.py --local-lengths 2048 8192 32768
    python benchmark/benchmark_comparison.py             # a ring of one
    torchrun --nproc_per_node 4 benchmark/benchmark_comparison.py --packed batch one stated

Every implementation is timed in turn, the host waiting for each call: p20, p50, p80 of the slowest
rank. --queued N also times N calls that the host issues without waiting, as a model's layers do.
Share of kernel: the same kernel's time on one GPU for the local length, times the ranks, over the
ring's time; `triton` against this library's kernels, the others against their flash kernel. Up to a
global length of 16384 errors are taken against dense attention in float64.

--packed measures packed documents: `one` of the whole length, or the `stated` lengths (packing.py);
FLOPs are those of each document's own pairs. `batch` is the zigzag batch, timed in turn with them.

ring-flash-attn 0.1.8 and FlashAttention-3 come from the folder that $PEERS names (.peers); what is
not available is skipped with its reason. Upstream over FlashAttention-2 and over FlashAttention-3
are timed in one process. Several processes can share one --run-id. On a CPU it runs small, over
gloo and Triton's interpreter (packed only if TRITON_INTERPRET=1): right, but no measure of speed.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import rows
import timing
import torch
import torch.distributed as dist
from graphs import replay
from kernels import Inputs, draw, kernels, use_peers
from packed_rings import LLAMA3, PACKED_LAYOUTS, packed_truth
from packing import BATCH, ONE, STATED, Packing, pack
from rank_timing import attempt, peak_gib, slowest_times
from report import rings_table
from rings import KERNELS, STEMS
from variants import Variant, variant

import oracle
from comparison import Place, join
from ring_flash_attn.core.attention import Attention

LONGEST_TRUTH = 16384
ONE_GPU = "one GPU"
EXCHANGES = ("ring", "copy-engine")
Made = TypeVar("Made")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--layouts", nargs="+", choices=PACKED_LAYOUTS, help="all if unset; llama3 is packed only")
    add("--packed", nargs="+", choices=(BATCH, ONE, STATED), help="measure packed documents")
    add("--heads-k-stride", type=int, default=1, help="key heads that llama3 gathers at a time")
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
    add("--exchanges", nargs="+", choices=EXCHANGES, default=["ring"], help="of triton")
    add("--graphs", action="store_true", help="replay Triton calls as CUDA graphs too")
    add("--queued", type=int, default=0, help="also time so many calls without a wait, as one")
    add("--repeats", type=int, default=15 if on_gpu else 2)
    add("--no-errors", action="store_true")
    add("--csv", type=Path, help="append the rows to this file")
    # torchrun reads --run as the beginning of its own --run-path, so there only --run-id works.
    add("--run-id", "--run", dest="run", default=timing.new_run(), help="column run")
    add("--tree", help="hash of ring_flash_attn/, where git is absent")
    add("--commit", help="hash of the commit, where git is absent")
    add("--allow-shared-gpus", action="store_true", help="time more ranks than GPUs")
    options = parser.parse_args(arguments)
    options.layouts = options.layouts or list(PACKED_LAYOUTS if options.packed else STEMS)
    options.packings = options.packed or [BATCH]
    complaint = _refused(options)
    if complaint:
        parser.error(complaint)
    return options


def _refused(o: argparse.Namespace) -> str:
    """Return why the options do not go together; "" if they do."""
    odd = any(n % 2 for n in o.local_lengths)
    if "zigzag" in o.layouts and odd:
        return f"--local-lengths: zigzag needs even ones, got {o.local_lengths}"
    if o.queued < 0:
        return f"--queued must be at least 0, got {o.queued}"
    if not o.packed and LLAMA3 in o.layouts:
        return "--layouts: llama3 needs --packed one or stated"
    if not o.packed:
        return "--heads-k-stride needs --packed" if o.heads_k_stride != 1 else ""
    if STATED in o.packed and odd:
        return f"--local-lengths: --packed stated needs even ones, got {o.local_lengths}"
    if BATCH in o.packed and "zigzag" not in o.layouts:
        return f"--packed batch is the zigzag batch: --layouts needs zigzag, got {o.layouts}"
    if o.batch != 1:
        return f"--batch must be 1 with --packed, got {o.batch}"
    if o.heads_k_stride < 1 or o.kv_heads % o.heads_k_stride:
        return f"--heads-k-stride must divide {o.kv_heads} key heads, got {o.heads_k_stride}"
    return ""


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
            packings = [pack(name, length, self.place.world_size) for name in o.packings]
            whole, truths = None, {}
            if not o.no_errors and length * self.place.world_size <= LONGEST_TRUTH:
                whole = self._draw(length * self.place.world_size, attention, 0)
                truths = self._truths(whole, packings)
            for layout in o.layouts:
                # Beside packed documents the batch is zigzag's only.
                all_run = layout == "zigzag" or not o.packed
                some = [x for x in packings if all_run or x.name != BATCH]
                words = [x.name for x in some] if o.packed else []
                self._progress(begin, number, len(cases), length, mask, layout, *words)
                variants = self._variants(layout, some, inputs)
                errors = {}
                if whole is not None:
                    errors = {
                        x: x.errors(whole, truths[x.packing.lengths], self.place)._asdict()
                        for x in variants
                    }
                self._measure(variants, alone, errors)
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

    def _try(self, name: str, make: Callable[[], Made]) -> Made | None:
        """Return what `make` returns, or None on every rank if it raises on any."""
        made, reason = attempt(make, self.place)
        line = f"skipped {name}: {reason}"
        if reason and line not in self._skipped:
            self.say(line)
            self._skipped.add(line)
        return made

    def _truths(
        self, whole: Inputs, packings: list[Packing]
    ) -> dict[tuple[int, ...], oracle.Result]:
        """Return what the global inputs should give, by document lengths."""
        by_lengths = {packing.lengths: packing for packing in packings}
        return {lengths: packed_truth(whole, x) for lengths, x in by_lengths.items()}

    def _variants(self, layout: str, packings: list[Packing], inputs: Inputs) -> list[Variant]:
        """Return what ran forward and backward once: every packing of every implementation."""
        stride, found = self.options.heads_k_stride, []
        for impl, packing in itertools.product(self.options.implementations, packings):
            name = impl if packing.name == BATCH else f"{impl} {packing.name} {layout}"
            given = impl, layout, packing, inputs, self.place, stride
            chosen = self.options.exchanges if impl == "triton" and layout != LLAMA3 else ["ring"]
            for exchange in chosen:
                label = name if exchange == "ring" else f"{name} over {exchange}"
                found.append(self._try(label, lambda given=given, by=exchange: variant(*given, by)))
        return [x for x in found if x is not None]

    def _kernel_times(self, inputs: Inputs) -> dict[tuple[str, str], float]:
        """Return the median ms of the kernels that the implementations share, by kernel and pass.

        Also puts them into the table, as rows of one GPU.
        """
        runs = {}
        for name in dict.fromkeys(KERNELS[impl] for impl in self.options.implementations):
            found = self._try(f"one-GPU {name}", lambda name=name: kernels(name, inputs))
            runs |= {(x.impl, x.pass_): x.run for x in found or () if not x.state}
        times = slowest_times(runs, self.options.repeats, self.place)
        here = Packing(BATCH, (inputs.q.shape[1],))
        for (impl, pass_), ms in times.items():
            self.measured.append(self._row(ONE_GPU, here, inputs, impl, pass_, ms, 1))
        return {key: ms.p50 for key, ms in times.items()}

    def _measure(
        self,
        variants: list[Variant],
        alone: dict[tuple[str, str], float],
        errors: dict[Variant, dict[str, float]],
    ) -> None:
        """Time the variants in turn and keep and write their rows."""
        for pass_, queued in itertools.product(self.options.passes, self._queues()):
            runs = {(x, 0): x.call(pass_) for x in variants}
            if self.options.graphs:
                runs |= self._replays(runs)
            repeats = -(-self.options.repeats // 3) if queued else self.options.repeats
            for (x, graph), ms in slowest_times(runs, repeats, self.place, queued).items():
                given = x.packing, x.inputs, x.impl, pass_, ms, self.place.world_size
                row = self._row(x.layout, *given) | {"exchange": x.exchange, "graph": graph}
                row["queued"] = queued
                row["share_of_kernel"] = self._share(x, pass_, ms.p50, alone)
                # A graph keeps its memory, and nobody compares its results here.
                if not graph:
                    row["peak_gib"] = peak_gib(runs[x, 0], x.inputs[:3], self.place)
                    for name, error in errors.get(x, {}).items():
                        if name == "out" or pass_ == "fwd_bwd":
                            row[f"err_{name}"] = error
                self.measured.append(row)
                if self.options.csv and self.place.rank == 0:
                    rows.append(self.options.csv, rows.RING, row)

    def _queues(self) -> list[int]:
        """Return how many calls go without a wait, by way of timing."""
        return [0, self.options.queued] if self.options.queued else [0]

    def _replays(
        self, runs: dict[tuple[Variant, int], timing.Run]
    ) -> dict[tuple[Variant, int], timing.Run]:
        """Return the replays of this library's Triton calls, which a graph can capture."""
        found = {}
        for (x, _), call in runs.items():
            if x.impl == "triton" and torch.cuda.is_available():
                name = f"graph of {x.impl} {x.packing.name} {x.layout} over {x.exchange}"
                found[x, 1] = self._try(name, lambda call=call: replay(call))
        return {key: call for key, call in found.items() if call is not None}

    def _share(
        self, x: Variant, pass_: str, ms: float, alone: dict[tuple[str, str], float]
    ) -> float | None:
        """Return the share of the kernel; None where the local work is no measure of the whole.

        That is under a window, and with several documents.
        """
        passes = ("fwd", "bwd") if pass_ == "fwd_bwd" else ("fwd",)
        known = [alone.get((KERNELS[x.impl], name)) for name in passes]
        times = [ms for ms in known if ms is not None]
        several = x.packing.name == STATED
        if len(times) < len(passes) or several or x.inputs.attention.window != (-1, -1):
            return None
        return sum(times) * self.place.world_size / ms

    def _row(
        self,
        layout: str,
        packing: Packing,
        inputs: Inputs,
        impl: str,
        pass_: str,
        ms: timing.Quantiles,
        ranks: int,
    ) -> dict:
        """Return a row without share, peak and errors. `ranks` share the sequence."""
        o, attention = self.options, inputs.attention
        mask = attention.causal, attention.window
        work = packing.flops(o.batch, o.heads, o.head_dim, *mask, pass_) / ranks
        given = {
            **self.source,
            **{"world_size": ranks, "impl": impl, "exchange": "ring", "layout": layout},
            **{"packing": packing.name, "pass": pass_, "dtype": o.dtype, "batch": o.batch},
            **{"local_len": inputs.q.shape[-3], "heads": o.heads, "kv_heads": o.kv_heads},
            **{"head_dim": o.head_dim, "causal": mask[0], "window": timing.window_text(mask[1])},
            **{"graph": 0, "queued": 0, "ms_p20": ms.p20, "ms_p50": ms.p50, "ms_p80": ms.p80},
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
