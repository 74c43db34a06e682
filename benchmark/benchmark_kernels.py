"""One GPU: this library's Triton kernels beside FlashAttention-2, cuDNN and FlashAttention-3.

    python benchmark/benchmark_kernels.py --csv benchmark/results/kernels.csv
    python benchmark/benchmark_kernels.py --shapes 1,8192,32/8,128 --masks causal --passes bwd
    python benchmark/benchmark_kernels.py --preset coverage --csv benchmark/results/kernels.csv

All are timed in turn, round by round, with a cold L2 and the launches queued ahead. Forward writes
the input's dtype (state 0) or folds into the float32 state (state 1); backward of ours is delta, dQ
and dKV with float32 gradients, stored (state 0) or added (state 1). Errors are against dense
attention in float64. Launch configurations of the Triton kernels are timed by `tune.py`.

`--preset coverage` is every head dim, mask, length from 1k to 64k, head ratio and packing, in about
two minutes. Several GPUs share it out: `--part 1/4` on the first, under one `--run-id`, each with a
file of its own, which `rows.py` puts together.

FlashAttention-3 comes from the folder that $PEERS names (.peers).
"""

import argparse
import math
import sys
import time
from pathlib import Path

import rows
import timing
import torch
from coverage import COVERED_WINDOW, MASKS, Case, asked, covering, part, part_of, shape
from kernels import (
    IMPLEMENTATIONS,
    Inputs,
    Kernel,
    draw,
    kernels,
    relative_error,
    shortened,
    truth,
    use_peers,
)
from packed_rings import packed_truth
from packing import BATCH, ONE, STATED, Packing, pack
from report import kernels_table

from ring_flash_attn.core.attention import Attention

SHAPES = (
    *("1,16384,16/16,128", "1,8192,32/8,128", "1,32768,32/8,128"),
    *("4,4096,32/32,64", "1,8192,16/16,256"),
)
# Dense float64 attention of this length takes about a second on an H100; beyond it, the errors are
# those of the first SHORT rows.
LONGEST_TRUTH, SHORT = 16384, 1024
WARMUP = 3
# With --preset coverage, the like of LONGEST_TRUTH, and for about how long a kernel is timed.
COVERED_TRUTH, KERNEL_S = 4096, 0.4


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--preset",
        choices=("coverage",),
        help="cases in place of shapes, masks and packings, 3 rounds, without triton-portable",
    )
    parser.add_argument("--part", type=part, default=(1, 1), help="i/n: the i-th part of the cases")
    parser.add_argument("--shapes", nargs="+", type=shape)
    parser.add_argument("--masks", nargs="+", choices=MASKS)
    parser.add_argument("--packed", nargs="+", choices=(BATCH, ONE, STATED))
    parser.add_argument("--window", type=int, help="left tokens of mask window, 1024")
    parser.add_argument("--dtype", choices=timing.DTYPES, default="bf16")
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS)
    parser.add_argument("--passes", nargs="+", choices=("fwd", "bwd"), default=("fwd", "bwd"))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--calls", type=int, default=5, help="timed calls a round, at most")
    parser.add_argument("--no-errors", action="store_true")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument(
        "--run-id", "--run", dest="run", default=timing.new_run(), help="column run"
    )
    parser.add_argument("--tree", help="hash of ring_flash_attn/, where git is absent")
    parser.add_argument("--commit", help="hash of the commit, where git is absent")
    parser.add_argument("--budget-s", type=float, default=540.0, help="start nothing after that")
    options = parser.parse_args(arguments)
    covers = options.preset == "coverage"
    if covers and (options.shapes or options.masks or options.packed):
        parser.error("--preset has its own shapes, masks and packings")
    if set(options.packed or ()) - {BATCH} and any(x.length % 2 for x in options.shapes or ()):
        parser.error("--packed needs even lengths")
    options.window = options.window or (COVERED_WINDOW if covers else 1024)
    options.rounds = options.rounds or (3 if covers else 8)
    few = [impl for impl in IMPLEMENTATIONS if impl != "triton-portable"]
    options.implementations = options.implementations or (few if covers else IMPLEMENTATIONS)
    options.longest_truth = COVERED_TRUTH if covers else LONGEST_TRUTH
    options.kernel_s = KERNEL_S if covers else math.inf
    options.cases = covering() if covers else _asked(options)
    options.cases = part_of(options.cases, options.part, options.window)
    return options


def _asked(options: argparse.Namespace) -> list[Case]:
    shapes = options.shapes or [shape(x) for x in SHAPES]
    return asked(shapes, options.masks or ["full", "causal"], options.packed or [BATCH])


def attention_of(options: argparse.Namespace, case: Case) -> Attention:
    scale = case.shape.head_dim**-0.5
    return Attention(scale, case.mask != "full", case.window(options.window))


def available(
    options: argparse.Namespace, inputs: Inputs, packing: Packing, skipped: set[str]
) -> list[Kernel]:
    """Return the kernels that run on these inputs, each called once; say once why others do not."""
    found = []
    for impl in options.implementations:
        reason = ""
        # Whatever one kernel library raises, the others are still to be measured.
        try:
            for kernel in kernels(impl, inputs, packing):
                if kernel.pass_ in options.passes:
                    reason = f" {kernel.pass_}"
                    kernel.run()
                    torch.cuda.synchronize()
                    found.append(kernel)
        except Exception as error:
            reason = f"skipped {impl}{reason}: {_first_line(error)}"
            if reason not in skipped:
                print(reason, flush=True)
            skipped.add(reason)
    return found


def errors_of(
    inputs: Inputs, packing: Packing, found: list[Kernel], longest: int
) -> dict[tuple, float]:
    """Return every kernel's relative error, NaN where it could not be had.

    Of more rows than `longest` it is that of the first: SHORT behind what a window first hides.
    """
    if inputs.q.shape[1] > longest:
        short = SHORT + max(0, inputs.attention.window[0])
        inputs, packing = shortened(inputs, short), pack(packing.name, short, 1)
        impls = dict.fromkeys(kernel.impl for kernel in found)
        found = [kernel for impl in impls for kernel in kernels(impl, inputs, packing)]
    want = truth(inputs) if packing.name == BATCH else packed_truth(inputs, packing)
    result = {}
    for kernel in found:
        try:
            result[kernel[:3]] = relative_error(kernel.result(), want)
        except Exception as error:
            print(f"no error of {kernel[:3]}: {_first_line(error)}", flush=True)
            result[kernel[:3]] = float("nan")
    return result


def measure(
    options: argparse.Namespace, case: Case, flush: torch.Tensor, skipped: set[str]
) -> list[dict]:
    """Return the rows of one case, without the columns of their origin."""
    attention, packing = attention_of(options, case), case.packing
    inputs = draw(*case.shape, timing.DTYPES[options.dtype], attention)
    found = available(options, inputs, packing, skipped)
    errors = {} if options.no_errors else errors_of(inputs, packing, found, options.longest_truth)
    torch.cuda.empty_cache()
    result = []
    for pass_ in options.passes:
        runs = {kernel[:3]: kernel.run for kernel in found if kernel.pass_ == pass_}
        calls = {name: _calls(options, run, flush) for name, run in runs.items()}
        times = timing.interleaved(
            {name: (run, calls[name]) for name, run in runs.items()},
            options.rounds,
            lambda timed: timing.queued_times(*timed, flush),
        )
        work = case.flops(options.window, pass_)
        for (impl, _, state), ms in times.items():
            p20, p50, p80 = timing.quantiles(ms)
            batch, length, heads, key_heads, head_dim = case.shape
            result.append(
                {
                    **{"impl": impl, "pass": pass_, "dtype": options.dtype, "batch": batch},
                    **{"seqlen": length, "heads": heads, "kv_heads": key_heads},
                    **{"head_dim": head_dim, "causal": attention.causal},
                    **{"window": timing.window_text(attention.window), "state": state},
                    **{"ms_p20": p20, "ms_p50": p50, "ms_p80": p80},
                    **{"tflops": work / p50 / 1e9, "rel_err": errors.get((impl, pass_, state))},
                    "packing": case.packed,
                }
            )
    return result


def _calls(options: argparse.Namespace, run: timing.Run, flush: torch.Tensor) -> int:
    """Warm up, and return how many calls of a round take no longer than they should."""
    [ms] = timing.queued_times(run, 1, flush)
    at_most = options.kernel_s * 1e3 / options.rounds / ms
    if at_most > WARMUP:
        timing.queued_times(run, WARMUP - 1, flush)
    return max(1, int(min(options.calls, at_most)))


def ceiling(flush: torch.Tensor) -> float:
    """Return the TFLOP/s of a bfloat16 matrix product of 8192^3."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    timing.queued_times(lambda: a @ b, WARMUP, flush)
    ms = timing.quantiles(timing.queued_times(lambda: a @ b, 20, flush)).p50
    return 2 * 8192**3 / ms / 1e9


def benchmark(options: argparse.Namespace) -> None:
    begin = time.monotonic()
    source = timing.origin(options.run, options.commit, options.tree)
    print(*(f"{key} {value}" for key, value in source.items()), sep=", ")
    flush, cases = timing.flush_buffer(), options.cases
    highest = ceiling(flush)
    print(f"matmul 8192^3 bf16: {highest:.0f} TFLOP/s", flush=True)
    measured, skipped = [], set()
    for number, case in enumerate(cases, 1):
        elapsed = time.monotonic() - begin
        if elapsed > options.budget_s:
            print(f"skipped {len(cases) - number + 1} cases: past --budget-s {options.budget_s:g}")
            break
        print(f"[{number}/{len(cases)}] {elapsed:.0f} s: {case}", flush=True)
        try:
            found = [{**row, "ceiling": highest} for row in measure(options, case, flush, skipped)]
        # Out of memory, say: the other cases are still to be measured.
        except Exception as error:
            print(f"skipped {case}: {_first_line(error)}", flush=True)
            continue
        measured += found
        print(kernels_table(found), flush=True)
        if options.csv:
            for row in found:
                rows.append(options.csv, rows.KERNELS, {**source, **row})
    print("\n" + kernels_table(measured))


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if not torch.cuda.is_available():
        print("benchmark_kernels.py needs an NVIDIA GPU, and torch sees none: nothing measured")
        return 2
    use_peers()
    benchmark(options)
    return 0


def _first_line(error: Exception) -> str:
    kind = "" if isinstance(error, NotImplementedError) else f"{type(error).__name__}: "
    return f"{kind}{error}".split("\n")[0][:300]


if __name__ == "__main__":
    sys.exit(main())
