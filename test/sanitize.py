"""Run the Triton kernels under compute-sanitizer, small, and judge what it reports.

    python test/sanitize.py                               # memcheck, then racecheck
    python test/sanitize.py --tools racecheck --head-dims 128
    python test/sanitize.py --reports race.txt            # judge what it wrote before

memcheck must find nothing. racecheck reports hand-overs between partitions that are in order; these
pairs are KNOWN, each with why it is right and what else would see it go wrong. A known pair is
excused only if racecheck also reports the same hand-over where it is right beyond doubt, and sees
it where it is wrong (sanitize_controls.py): else its word would be worth more, or nothing. Exit
status 0: nothing but known pairs.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "ring_flash_attn" / "kernels"
TOOLS = ("memcheck", "racecheck")
HEAD_DIMS = (64, 128, 256)
LENGTH, DOCUMENTS = 200, (130, 2, 68)
DONE = "all kernels have run"
SECONDS = 300


class Known(NamedTuple):
    """Why a pair of functions that racecheck reports is in order.

    Attributes:
        control: the pair of sanitize_controls._right_kernel that is handed over alike.
    """

    control: frozenset[str]
    why: str


HANDED = frozenset(("_write", "_read"))
STARTED = frozenset(("_right_kernel",))
MBARRIER = (
    "All threads of the writing partition store, meet, and one of them arrives at `full` "
    "(release); every reading thread waits for that phase (acquire). Readers meet before one of "
    "them arrives at `empty`, or each warp arrives at a named barrier, and the writer waits for "
    "all of them before it fills the slot again. test_aot.py checks that threads meet right "
    "before each such arrival, planted bugs in test_hopper_*.py that waits are there."
)
DISPATCH = (
    "Triton starts the partitions so: the first warpgroup stores which one runs and with what "
    "arguments, and all threads of the program meet at `barrier.sync 1` before they are read, "
    "after that, and before they are stored anew."
)
# By the functions that access shared memory. Seen on an H200 with compute-sanitizer of CUDA 13,
# 2026-11-28, but for the wide kernels (head dim 256), which hand over in the same way.
KNOWN = {
    frozenset(("_publish", "_field")): Known(HANDED, f"The numbers of a tile. {MBARRIER}"),
    frozenset(("produce", "_step")): Known(HANDED, f"lse and delta of a block. {MBARRIER}"),
    frozenset(("produce", "_consume_p")): Known(HANDED, f"lse of a block. {MBARRIER}"),
    frozenset(("produce", "_consume_ds")): Known(HANDED, f"delta of a block. {MBARRIER}"),
    frozenset(("_consume_p", "_consume_ds")): Known(HANDED, f"p of a block. {MBARRIER}"),
    frozenset(("_hopper_fwd_kernel",)): Known(STARTED, DISPATCH),
    frozenset(("_hopper_fwd_kernel", "meet")): Known(
        STARTED,
        f"{DISPATCH} The store that ends the partitions follows the last `meet` of the first "
        "warpgroup and bears its line; a named barrier itself stores nothing.",
    ),
    frozenset(("_hopper_bwd_kernel",)): Known(STARTED, DISPATCH),
    frozenset(("_hopper_dq_kernel",)): Known(STARTED, DISPATCH),
    frozenset(("_hopper_dkv_kernel",)): Known(STARTED, DISPATCH),
}
RIGHT, WRONG = "_right_kernel", "_wrong_kernel"


class Pair(NamedTuple):
    """Two functions whose accesses to shared memory racecheck does not see ordered."""

    kernel: str
    functions: frozenset[str]

    def __str__(self) -> str:
        return f"{self.kernel}: {' and '.join(sorted(self.functions))}"


_ACCESS = re.compile(r"(Read|Write) access at (\w+)\+0x[0-9a-f]+ in ([\w.]+):(\d+)")


def pairs(report: str) -> dict[Pair, int]:
    """Return what racecheck reports, and how often.

    Raises:
        ValueError: a report of a race that is written in another way.
    """
    found: dict[Pair, int] = {}
    first = None
    for line in report.splitlines():
        access = _ACCESS.search(line)
        if "Race reported" in line or "hazard detected" in line:
            first = access
            if first is None:
                raise ValueError(f"no access with its place in {line.strip()!r}")
        elif access and first:
            functions = frozenset(function_at(*x.group(2, 3, 4)) for x in (first, access))
            pair = Pair(access[2], functions)
            hazards = re.search(r"\[(\d+) hazards?\]", line)
            found[pair] = found.get(pair, 0) + (int(hazards[1]) if hazards else 1)
    return found


def function_at(kernel: str, file: str, line: str) -> str:
    """Return the function that a line lies in, FILE:LINE if none does."""
    folders = [SOURCES, ROOT / "test"]
    if kernel.startswith("_hopper"):
        folders.insert(0, SOURCES / "hopper")
    for folder in folders:
        if (folder / file).exists():
            inside = [x for x in _functions(folder / file) if x[0] <= int(line) <= x[1]]
            return max(inside)[2] if inside else f"{file}:{line}"
    return f"{file}:{line}"


@cache
def _functions(path: Path) -> list[tuple[int, int, str]]:
    """Return first line, decorators included, last line and name of every function of a file."""
    nodes = [x for x in ast.walk(ast.parse(path.read_text())) if isinstance(x, ast.FunctionDef)]
    return [
        (
            min([node.lineno, *(x.lineno for x in node.decorator_list)]),
            node.end_lineno or 0,
            node.name,
        )
        for node in nodes
    ]


def judge(report: str) -> list[str]:
    """Return what speaks against the kernels, or against the report itself; empty if nothing."""
    reasons = [] if DONE in report else ["the kernels did not run to their end"]
    if "RACECHECK SUMMARY" in report:
        return reasons + _judge_races(report)
    errors = re.search(r"ERROR SUMMARY: (\d+) errors?", report)
    if errors is None:
        return [*reasons, "no summary in the report"]
    return reasons + ([f"memcheck reports {errors[1]} errors"] if int(errors[1]) else [])


def _judge_races(report: str) -> list[str]:
    found = pairs(report)
    reasons = []
    if Pair(WRONG, HANDED) not in found:
        reasons.append(
            "racecheck misses a hand-over that nobody waits for: it says nothing of ours"
        )
    for pair in found:
        if pair.kernel in (RIGHT, WRONG):
            continue
        known = KNOWN.get(pair.functions)
        if known is None:
            reasons.append(f"not known: {pair}")
        elif Pair(RIGHT, known.control) not in found:
            reasons.append(f"known, but racecheck follows the like where it is right: {pair}")
    return reasons


def run_kernels(head_dims: tuple[int, ...]) -> None:
    """Run every Hopper kernel forward and backward, storing and adding, batched and packed."""
    import torch

    sys.path[:0] = [str(ROOT), str(ROOT / "benchmark"), str(ROOT / "test")]
    import kernels
    from packing import Packing

    import sanitize_controls
    from ring_flash_attn.backends.triton import TritonBackend
    from ring_flash_attn.core.attention import Attention
    from ring_flash_attn.kernels.hopper.configs import backward_config

    sanitize_controls.run(torch.device("cuda"))
    for head_dim in head_dims:
        # The given row runs also where the portable kernels are faster.
        backend = TritonBackend(hopper_backward=backward_config(head_dim) or False)
        attention = Attention(head_dim**-0.5, True)
        inputs = kernels.draw(1, LENGTH, 4, 2, head_dim, torch.bfloat16, attention)
        for packing in (None, Packing("stated", DOCUMENTS)):
            for kernel in kernels.triton_kernels(inputs, packing, backend=backend):
                assert all(x.isfinite().all() for x in kernel.result()), (head_dim, kernel[:3])
    torch.cuda.synchronize()
    print(DONE, flush=True)


def sanitized(tool: str, head_dims: tuple[int, ...]) -> str:
    """Return what compute-sanitizer writes of the kernels.

    Raises:
        FileNotFoundError: there is no compute-sanitizer. subprocess.TimeoutExpired: it took longer.
    """
    program = compute_sanitizer()
    if program is None:
        raise FileNotFoundError("compute-sanitizer, a part of the CUDA toolkit, is not on PATH")
    command = [program, "--tool", tool, "--print-limit", "0", sys.executable, __file__, "--run"]
    command += ["--head-dims", *map(str, head_dims)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS
    )
    return done.stdout


def compute_sanitizer() -> str | None:
    """Return where compute-sanitizer is."""
    usual = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(usual))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--head-dims", nargs="+", type=int, default=HEAD_DIMS)
    parser.add_argument("--reports", nargs="+", type=Path, help="judge these, run nothing")
    parser.add_argument("--to", type=Path, help="folder for what the tools write")
    parser.add_argument("--run", action="store_true", help="run the kernels, without a tool")
    options = parser.parse_args(arguments)
    if options.run:
        run_kernels(tuple(options.head_dims))
        return 0
    if not options.reports and compute_sanitizer() is None:
        print("compute-sanitizer, a part of the CUDA toolkit, is not on PATH: nothing was run")
        return 2
    if options.reports:
        reports = {str(path): path.read_text() for path in options.reports}
    else:
        reports = {tool: sanitized(tool, tuple(options.head_dims)) for tool in options.tools}
    status = 0
    for name, report in reports.items():
        if options.to:
            options.to.mkdir(parents=True, exist_ok=True)
            (options.to / f"{name}.txt").write_text(report)
        for pair, hazards in pairs(report).items():
            print(f"{name}: {hazards} hazards in {pair}")
        reasons = judge(report)
        for reason in reasons:
            print(f"{name}: {reason}")
        print(f"{name}: {'not in order' if reasons else 'in order'}")
        status = status or int(bool(reasons))
    return status


if __name__ == "__main__":
    sys.exit(main())
