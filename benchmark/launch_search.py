"""Compile and time configurations of one kernel against the checked-in row.

Each compiles in a process of its own first, ahead of time and then on the GPU into Triton's cache
on disk, so that one that fails, hangs or breaks its process is dropped and the rest go on.
"""

import subprocess
from collections.abc import Callable
from typing import NamedTuple

import timing
import torch
from candidates import Candidate, Target, jobs
from kernels import Inputs
from timing import Mark, Quantiles
from torch import Tensor

from aot import Report, compile_all, run_group
from ring_flash_attn.backends.base import GradTarget
from ring_flash_attn.kernels.configs import SHARED_MEMORY, Choice, LaunchConfig, launch_config
from ring_flash_attn.kernels.hopper.configs import ForwardConfig

WRONG = 2e-2  # relative difference from the checked-in row's result that no rounding explains
SLOW = 1.3  # times the row's time in one call: not worth the rounds
# The work of a kernel over the forward's, whose matrix products are two.
WORK = {"forward": 1, "dq": 1.5, "dkv": 2, "hopper-forward": 1, "hopper-backward": 2.5}


class Launch(NamedTuple):
    """A call that marks where the timed kernel begins and ends, and the tensors it writes."""

    run: Callable[[Mark, Mark], None]
    result: tuple[Tensor, ...]

    def once(self) -> tuple[Tensor, ...]:
        """Run without timing and return what was written."""
        self.run(lambda: None, lambda: None)
        return self.result


class Compiled(NamedTuple):
    """What the compiler made of a candidate, the worst of its forms.

    Attributes:
        dropped: why it is out by itself, "" if it is not.
        spills: bytes. shared: bytes. serialized: wgmmas that ptxas could not overlap.
    """

    dropped: str
    spills: int = 0
    shared: int = 0
    serialized: int = 0

    def against(self, row: "Compiled") -> str:
        """Return why it is out beside the checked-in row, "" if it is not."""
        if self.dropped:
            return self.dropped
        if self.spills > row.spills:
            return f"spills {self.spills} bytes, the row {row.spills}"
        if self.serialized > row.serialized:
            return f"{self.serialized} serialized wgmmas, the row {row.serialized}"
        return ""


def compile_ahead(of: Target, candidate: Candidate, seconds: float) -> Compiled:
    """Compile every form of a candidate for an arch that need not be here."""
    try:
        return judged(of.arch, compile_all(jobs(of, candidate), seconds))
    except subprocess.TimeoutExpired:
        return Compiled(f"does not compile within {seconds:g} s")
    except RuntimeError as error:
        return Compiled(f"breaks the compiler: {_last_line(str(error))}")


def judged(arch: int, reports: list[Report]) -> Compiled:
    """Return the worst of the reports on a candidate's forms."""
    failed = next((report.error for report in reports if report.error), "")
    if failed:
        return Compiled(f"does not compile: {_first_line(failed)}")
    shared = max(report.shared for report in reports)
    limit = SHARED_MEMORY.get(arch, 101376)
    return Compiled(
        f"wants {shared} bytes of shared memory, there are {limit}" if shared > limit else "",
        max(report.spills for report in reports),
        shared,
        max(len(report.serialized) for report in reports),
    )


def run_apart(command: list[str], seconds: float) -> str:
    """Run a candidate in a process of its own; return why it is out, "" if it ran."""
    try:
        status, output, errors = run_group(command, "", seconds)
    except subprocess.TimeoutExpired:
        return f"does not run within {seconds:g} s"
    return f"does not run: {_last_line(errors or output)}" if status else ""


def launch(candidate: Candidate, inputs: Inputs, folds: bool) -> Launch:
    """Return one kernel with a candidate's configuration; the others take the checked-in row's.

    Args:
        folds: forward continues an fp32 state instead of storing in the input's dtype.
    """
    from ring_flash_attn.backends.triton import TritonBackend

    backend, kernel = _backend(candidate), candidate.kernel
    attention, plan = inputs.attention, inputs.plan
    q, k, v, dout, _ = inputs
    out = torch.empty_like(q, dtype=torch.float32 if folds else q.dtype)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], device=q.device)
    TritonBackend().forward(attention, plan, q, k, v, out, lse)
    if kernel.endswith("forward"):
        step = plan._replace(step=1) if folds else plan

        def forward(begin: Mark, end: Mark) -> None:
            begin()
            backend.forward(attention, step, q, k, v, out, lse)
            end()

        return Launch(forward, (out,))
    out = out.to(q.dtype)
    saved = backend.prepare_backward(dout, out, lse, None)
    dq, dk, dv = (torch.empty_like(x, dtype=torch.float32) for x in (q, k, v))

    def backward(begin: Mark, end: Mark) -> None:
        def target() -> GradTarget:  # asked for between the launches of dQ and of dKV
            (end if kernel == "dq" else begin)()
            return GradTarget(dk, dv, False)

        if kernel == "dq":
            begin()
        backend.backward(attention, plan, saved, q, k, v, dq, target)
        if kernel == "dkv":
            end()

    if kernel in ("dq", "dkv"):
        return Launch(backward, (dq,) if kernel == "dq" else (dk, dv))
    rounded = torch.empty_like(q)

    def whole(begin: Mark, end: Mark) -> None:
        begin()
        now = backend.prepare_backward(dout, out, lse, None)
        target = GradTarget(dk, dv, False)
        backend.backward(attention, plan, now, q, k, v, None, lambda: target, rounded)
        end()

    return Launch(whole, (rounded, dk, dv))


def tflops(kernel: str, inputs: Inputs, ms: float) -> float:
    """Return the TFLOP/s of one call."""
    batch, length, heads, head_dim = inputs.q.shape
    attention = inputs.attention
    sizes = (batch, length, heads, head_dim, attention.causal, attention.window)
    return WORK[kernel] * timing.flops(*sizes, "fwd") / ms / 1e9


def timed(
    row: Candidate,
    others: list[Candidate],
    inputs: Inputs,
    folds: bool,
    rounds: int,
    calls: int,
    flush: Tensor,
) -> tuple[dict[Candidate, Quantiles], dict[Candidate, str]]:
    """Time the row and others in turn; return their times, and why others were dropped.

    Those whose result differs from the row's are wrong, and those that are far slower in one call
    are not timed again.
    """
    made = launch(row, inputs, folds)
    want = [x.float().clone() for x in made.once()]
    alone = min(timing.queued_spans(made.run, 3, flush))
    runs, dropped = {row: made.run}, {}
    for candidate in others:
        try:
            made = launch(candidate, inputs, folds)
            got = [x.float() for x in made.once()]
            off = [float((x - y).norm() / y.norm()) for x, y in zip(got, want, strict=True)]
            if not all(x < WRONG for x in off):  # NaN is not
                dropped[candidate] = f"differs from the row's result by {max(off):.1e}"
                continue
            ratio = min(timing.queued_spans(made.run, 2, flush)) / alone
            if ratio > SLOW:
                dropped[candidate] = f"takes {ratio:.2f} times the row's time"
                continue
            runs[candidate] = made.run
        # Out of memory, say: the reason why this one is out.
        except Exception as error:
            dropped[candidate] = _first_line(f"{type(error).__name__}: {error}")
    times = timing.interleaved(runs, rounds, lambda run: timing.queued_spans(run, calls, flush))
    return {candidate: timing.quantiles(ms) for candidate, ms in times.items()}, dropped


def _backend(candidate: Candidate):
    from ring_flash_attn.backends.triton import TritonBackend

    config = candidate.config
    if isinstance(config, ForwardConfig):
        return TritonBackend(hopper_forward=config)
    if not isinstance(config, LaunchConfig):
        return TritonBackend(hopper_backward=config)

    def lookup(arch: int, head_dim: int, dtype: str, pass_: str, documents: bool) -> Choice:
        if pass_ == candidate.kernel:
            return Choice(config, arch, "")
        return launch_config(arch, head_dim, dtype, pass_, documents)

    return TritonBackend(lookup, hopper_forward=False, hopper_backward=False)


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0][:200]


def _last_line(text: str) -> str:
    return text.strip().split("\n")[-1][:200]
