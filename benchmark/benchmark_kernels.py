"""One GPU: this library's Triton kernels beside FlashAttention-2, cuDNN and FlashAttention-3.

    python benchmark/benchmark_kernels.py --csv benchmark/results/kernels.csv
    python benchmark/benchmark_kernels.py --shapes 1,8192,32/8,128 --masks causal --passes bwd

All are timed in turn, round by round, with a cold L2 and the launches queued ahead. Forward writes
the input's dtype (state 0) or folds into the float32 state (state 1); backward of ours is delta, dQ
and dKV with float32 gradients, stored (state 0) or added (state 1). Errors are against dense
attention in float64. Launch configurations of the Triton kernels are timed by `tune.py`.

FlashAttention-3 comes from the folder that $PEERS names (.peers).
"""

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import rows
import timing
import torch
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


class Shape(NamedTuple):
    """Sizes of one case."""

    batch: int
    length: int
    heads: int
    key_heads: int
    head_dim: int


def shape(text: str) -> Shape:
    """Parse B,S,H/Hk,D."""
    batch, length, heads, head_dim = text.split(",")
    query, _, key = heads.partition("/")
    return Shape(int(batch), int(length), int(query), int(key or query), int(head_dim))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", type=shape, default=[shape(x) for x in SHAPES])
    parser.add_argument("--masks", nargs="+", choices=("causal", "full", "window"))
    parser.add_argument("--window", type=int, default=1024, help="left tokens of mask window")
    parser.add_argument("--dtype", choices=timing.DTYPES, default="bf16")
    parser.add_argument(
        "--implementations", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS
    )
    parser.add_argument("--passes", nargs="+", choices=("fwd", "bwd"), default=("fwd", "bwd"))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--calls", type=int, default=5, help="timed calls a round")
    parser.add_argument("--no-errors", action="store_true")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument(
        "--run-id", "--run", dest="run", default=timing.new_run(), help="column run"
    )
    parser.add_argument("--tree", help="hash of ring_flash_attn/, where git is absent")
    parser.add_argument("--commit", help="hash of the commit, where git is absent")
    parser.add_argument("--budget-s", type=float, default=540.0, help="start nothing after that")
    options = parser.parse_args(arguments)
    options.masks = options.masks or ["full", "causal"]
    return options


def attention_of(options: argparse.Namespace, mask: str, head_dim: int) -> Attention:
    window = (options.window, 0) if mask == "window" else (-1, -1)
    return Attention(head_dim**-0.5, mask != "full", window)


def available(options: argparse.Namespace, inputs: Inputs, skipped: set[str]) -> list[Kernel]:
    """Return the kernels that run on these inputs, each called once; say once why others do not."""
    found = []
    for impl in options.implementations:
        reason = ""
        # Whatever one kernel library raises, the others are still to be measured.
        try:
            for kernel in kernels(impl, inputs):
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


def errors_of(inputs: Inputs, found: list[Kernel]) -> dict[tuple, float]:
    """Return every kernel's relative error, NaN where it could not be had."""
    if inputs.q.shape[1] > LONGEST_TRUTH:
        inputs = shortened(inputs, SHORT)
        impls = dict.fromkeys(kernel.impl for kernel in found)
        found = [kernel for impl in impls for kernel in kernels(impl, inputs)]
    want = truth(inputs)
    result = {}
    for kernel in found:
        try:
            result[kernel[:3]] = relative_error(kernel.result(), want)
        except Exception as error:
            print(f"no error of {kernel[:3]}: {_first_line(error)}", flush=True)
            result[kernel[:3]] = float("nan")
    return result


def measure(
    options: argparse.Namespace, case: Shape, mask: str, flush: torch.Tensor, skipped: set[str]
) -> list[dict]:
    """Return the rows of one shape and mask, without the columns of their origin."""
    attention = attention_of(options, mask, case.head_dim)
    inputs = draw(*case, timing.DTYPES[options.dtype], attention)
    found = available(options, inputs, skipped)
    errors = {} if options.no_errors else errors_of(inputs, found)
    torch.cuda.empty_cache()
    result = []
    for pass_ in options.passes:
        runs = {kernel[:3]: kernel.run for kernel in found if kernel.pass_ == pass_}
        for run in runs.values():
            timing.queued_times(run, WARMUP, flush)
        times = timing.interleaved(
            runs, options.rounds, lambda run: timing.queued_times(run, options.calls, flush)
        )
        work = timing.flops(*case[:3], case.head_dim, *attention_mask(attention), pass_)
        for (impl, _, state), ms in times.items():
            p20, p50, p80 = timing.quantiles(ms)
            result.append(
                {
                    **{"impl": impl, "pass": pass_, "dtype": options.dtype, "batch": case.batch},
                    **{"seqlen": case.length, "heads": case.heads, "kv_heads": case.key_heads},
                    **{"head_dim": case.head_dim, "causal": attention.causal},
                    **{"window": timing.window_text(attention.window), "state": state},
                    **{"ms_p20": p20, "ms_p50": p50, "ms_p80": p80},
                    **{"tflops": work / p50 / 1e9, "rel_err": errors.get((impl, pass_, state))},
                }
            )
    return result


def attention_mask(attention: Attention) -> tuple[bool, tuple[int, int]]:
    return attention.causal, attention.window


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
    flush = timing.flush_buffer()
    print(f"matmul 8192^3 bf16: {ceiling(flush):.0f} TFLOP/s", flush=True)
    cases = [(case, mask) for case in options.shapes for mask in options.masks]
    measured, skipped = [], set()
    for number, (case, mask) in enumerate(cases, 1):
        elapsed = time.monotonic() - begin
        if elapsed > options.budget_s:
            print(f"skipped {len(cases) - number + 1} cases: past --budget-s {options.budget_s:g}")
            break
        print(f"[{number}/{len(cases)}] {elapsed:.0f} s: {tuple(case)} {mask}", flush=True)
        try:
            found = measure(options, case, mask, flush, skipped)
        # Out of memory, say: the other cases are still to be measured.
        except Exception as error:
            print(f"skipped {tuple(case)} {mask}: {_first_line(error)}", flush=True)
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
