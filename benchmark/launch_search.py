"""Time launch configurations of the Triton kernels against the checked-in row, best first.

Configurations compile in processes beside each other first, into Triton's cache on disk, so that
one that fails, hangs or breaks its process is dropped and the rest compile in parallel.
"""

import argparse
import itertools
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import timing
import torch
from kernels import Inputs, draw
from tabulate import tabulate
from timing import Mark
from torch import Tensor

from ring_flash_attn.backends.base import GradTarget
from ring_flash_attn.kernels.configs import PASSES, Choice, LaunchConfig, launch_config

TABLE = "table"
WRONG = 2e-2  # relative difference from the checked-in row's result that no rounding explains
MATRIX_PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4}


class Candidate(NamedTuple):
    """A configuration of one pass; None stands for the checked-in row."""

    pass_: str
    config: LaunchConfig | None

    @property
    def text(self) -> str:
        c = self.config
        if c is None:
            return f"{self.pass_}:{TABLE}"
        sizes = f"{c.block_m},{c.block_n},{c.num_warps},{c.num_stages}"
        return f"{self.pass_}:{sizes}{',tma' if c.tma else ''}"


class Launch(NamedTuple):
    """A call that marks where the timed pass begins and ends, and the tensors it writes."""

    run: Callable[[Mark, Mark], None]
    result: tuple[Tensor, ...]

    def once(self) -> tuple[Tensor, ...]:
        """Run without timing and return what was written."""
        self.run(lambda: None, lambda: None)
        return self.result


def candidates(lines: list[str]) -> list[Candidate]:
    """Parse lines pass:BLOCK_M,BLOCK_N,warps,stages[,tma]; slashes list values, # comments.

    Raises:
        ValueError: a line that is not of this form.
    """
    found: dict[Candidate, None] = {}
    for line in lines:
        text = line.partition("#")[0].strip()
        if not text:
            continue
        pass_, _, fields = text.partition(":")
        *sizes, last = fields.split(",")
        tma = last == "tma"
        numbers = sizes if tma else [*sizes, last]
        if pass_ not in PASSES or len(numbers) != 4:
            raise ValueError(f"configuration: got {line!r}, expected pass:BM,BN,warps,stages[,tma]")
        for values in itertools.product(*(x.split("/") for x in numbers)):
            found[Candidate(pass_, LaunchConfig(*map(int, values), tma=tma))] = None
    return list(found)


def launch(candidate: Candidate, inputs: Inputs, folds: bool) -> Launch:
    """Return one pass with a candidate's configuration; the other passes take the checked-in row's.

    Args:
        folds: forward continues an fp32 state instead of storing in the input's dtype.
    """
    from ring_flash_attn.backends.triton import TritonBackend

    def lookup(arch: int, head_dim: int, dtype: str, pass_: str, documents: bool) -> Choice:
        if pass_ == candidate.pass_ and candidate.config is not None:
            return Choice(candidate.config, arch, "")
        return launch_config(arch, head_dim, dtype, pass_, documents)

    backend = TritonBackend(lookup, hopper_forward=False, hopper_backward=False)
    attention, plan = inputs.attention, inputs.plan
    q, k, v, dout, _ = inputs
    out = torch.empty_like(q, dtype=torch.float32 if folds else q.dtype)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], device=q.device)
    TritonBackend().forward(attention, plan, q, k, v, out, lse)
    if candidate.pass_ == "forward":
        step = plan._replace(step=1) if folds else plan

        def forward(begin: Mark, end: Mark) -> None:
            begin()
            backend.forward(attention, step, q, k, v, out, lse)
            end()

        return Launch(forward, (out,))
    saved = backend.prepare_backward(dout, out.to(q.dtype), lse, None)
    dq, dk, dv = (torch.empty_like(x, dtype=torch.float32) for x in (q, k, v))
    times_dq = candidate.pass_ == "dq"

    def backward(begin: Mark, end: Mark) -> None:
        def target() -> GradTarget:  # asked for between the launches of dQ and of dKV
            (end if times_dq else begin)()
            return GradTarget(dk, dv, False)

        if times_dq:
            begin()
        backend.backward(attention, plan, saved, q, k, v, dq, target)
        if not times_dq:
            end()

    return Launch(backward, (dq,) if times_dq else (dk, dv))


def compile_only(found: list[Candidate], cases: list[tuple[str, tuple]], folds: bool) -> None:
    """Run every candidate once and print `OK candidate` or `FAILED candidate: reason`."""
    for candidate in found:
        try:
            for _, sizes in cases:
                launch(candidate, draw(*sizes), folds).once()
            torch.cuda.synchronize()
            print(f"OK {candidate.text}", flush=True)
        # Out of shared memory, a crash of the compiler: the reason why this one is out.
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".split("\n")[0][:200]
            print(f"FAILED {candidate.text}: {reason}", flush=True)


def compiled(found: list[Candidate], options: argparse.Namespace, seconds: float) -> list:
    """Compile in parallel processes; return the candidates that ran in time."""
    workers = max(1, min(len(found), (os.cpu_count() or 2) - 1))
    command = [sys.executable, sys.argv[0], "--compile-only", "--dtype", options.dtype]
    command += ["--window", str(options.window), *(["--state"] if options.state else [])]
    command += ["--masks", *options.masks, "--shapes"]
    command += [f"{b},{s},{h}/{hk},{d}" for b, s, h, hk, d in options.shapes]
    processes = []
    for i in range(workers):
        lines = [part for x in found[i::workers] for part in ("--config", x.text)]
        processes.append(
            subprocess.Popen(
                [*command, *lines], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    deadline, reports = time.monotonic() + seconds, []
    for process in processes:
        try:
            output, _ = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        reports += output.splitlines()
        if process.returncode:
            print(f"a compiling process ended with {process.returncode}: {output[-400:]}")
    said = {line.removeprefix("FAILED ") for line in reports if line.startswith("FAILED ")}
    good = {line.removeprefix("OK ") for line in reports if line.startswith("OK ")}
    for line in sorted(said):
        print(f"dropped {line}")
    silent = [x.text for x in found if x.text not in good and not _reported(x.text, said)]
    if silent:
        print(f"dropped, no answer within {seconds:.0f} s or its process broke: {' '.join(silent)}")
    return [x for x in found if x.text in good]


def search(
    found: list[Candidate], cases: list[tuple[str, tuple]], options: argparse.Namespace
) -> None:
    """Time the candidates of every pass in turn, case by case, and print tables best first."""
    begin = time.monotonic()
    print(f"{len(found)} configurations, {len(cases)} cases: compiling", flush=True)
    found = compiled(found, options, options.budget_s / 2)
    print(f"{time.monotonic() - begin:.0f} s: {len(found)} compiled", flush=True)
    flush, speeds = timing.flush_buffer(), {}
    for name, sizes in cases:
        inputs = draw(*sizes)
        for pass_ in PASSES:
            mine = [Candidate(pass_, None), *(x for x in found if x.pass_ == pass_)]
            if len(mine) == 1:
                continue
            if time.monotonic() - begin > options.budget_s:
                print(f"skipped {name} {pass_}: past --budget-s {options.budget_s:g}")
                continue
            print(f"\n{time.monotonic() - begin:.0f} s: {pass_} {name}", flush=True)
            for text, tflops in _timed(mine, inputs, options, flush).items():
                speeds.setdefault((inputs.q.shape[3], pass_, text), []).append(tflops)
        torch.cuda.empty_cache()
    print("\ngeometric mean over the cases of a head dim, those that ran in every case:")
    means = [
        (*key, math.prod(x) ** (1 / len(x)))
        for key, x in speeds.items()
        if len(x) == max(len(y) for other, y in speeds.items() if other[:2] == key[:2])
    ]
    means.sort(key=lambda line: (line[0], line[1], -line[3]))
    print(tabulate(means, headers=("D", "pass", "configuration", "TFLOP/s"), floatfmt=".1f"))


def _timed(
    mine: list[Candidate], inputs: Inputs, options: argparse.Namespace, flush: Tensor
) -> dict[str, float]:
    """Print one table and return TFLOP/s by configuration; wrong results are dropped."""
    runs, want = {}, None
    for candidate in mine:
        try:
            made = launch(candidate, inputs, options.state)
            got = [x.float() for x in made.once()]
            want = want or [x.clone() for x in got]
            off = max(float((x - y).norm() / y.norm()) for x, y in zip(got, want, strict=True))
            if not off < WRONG:
                print(f"dropped {candidate.text}: differs from the table's result by {off:.1e}")
                continue
            timing.queued_spans(made.run, 1, flush)
            runs[candidate.text] = made.run
        except Exception as error:
            print(f"dropped {candidate.text}: {type(error).__name__}: {error}"[:300])
    rounds = options.rounds if len(runs) <= 10 else max(3, options.rounds // 2)
    times = timing.interleaved(
        runs, rounds, lambda run: timing.queued_spans(run, options.calls, flush)
    )
    batch, length, heads, head_dim = inputs.q.shape
    attention, share = inputs.attention, MATRIX_PRODUCTS[mine[0].pass_] / 2
    sizes = (batch, length, heads, head_dim, attention.causal, attention.window)
    work = share * timing.flops(*sizes, "fwd")
    lines = [(text, *timing.quantiles(ms)) for text, ms in times.items()]
    table = [(text, a, b, c, work / b / 1e9) for text, a, b, c in lines]
    table.sort(key=lambda line: line[2])
    columns = ("configuration", "p20 ms", "p50", "p80", "TFLOP/s")
    print(tabulate(table, headers=columns, floatfmt=".3f"), flush=True)
    return {text: tflops for text, *_, tflops in table}


def _reported(text: str, said: set[str]) -> bool:
    return any(line.startswith(f"{text}:") for line in said)
