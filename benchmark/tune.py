"""Search the launch tables' rows offline, rewrite those that are beaten, or check that none is.

    python benchmark/tune.py --state tune.jsonl            # compile, time, say what is best
    python benchmark/tune.py --state tune.jsonl --write    # the same, and rewrite the rows
    python benchmark/tune.py --check --kernels hopper-forward --head-dims 128
    python benchmark/tune.py --kernels dkv --config dkv:block_m=32/64,num_warps=4/8
    python benchmark/tune.py --dry-run --arch 90 --kernels dq           # needs no GPU
    python benchmark/tune.py --offline --state tune.jsonl --write       # measured elsewhere

Every configuration compiles in a process of its own first. Those that fail, that spill more than
the checked-in row or that want more shared memory than there is are not run, those that compute
something else or are far slower are not timed. The rest are timed in turn with the row, with a cold
L2, and the best once more. A row is beaten if the other's median time is below the row's 20th
percentile, and its 80th percentile below the row's median (tune_state.verdict says all of it).

Exit code: 0; 1 with --check if a row is beaten; 2 without a GPU; 3 if --budget-s was too short, run
it again with the same --state.
"""

import argparse
import sys
import time
from pathlib import Path

import timing
import torch
import tune_search
from candidates import HEAD_DIMS, KERNELS, Target, grid, parsed, target
from launch_table import write
from tabulate import tabulate
from tree_hash import tree_hash
from tune_search import Options
from tune_state import ORIGIN, Case, State, Verdict, ranked, read

from ring_flash_attn.kernels.configs import PASSES

SHAPE = "1,16384,16/16"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument(
        "--head-dims", nargs="+", type=int, choices=HEAD_DIMS, default=[64, 128, 256]
    )
    parser.add_argument(
        "--masks", nargs="+", choices=("causal", "full", "window"), default=["full", "causal"]
    )
    parser.add_argument("--window", type=int, default=1024, help="left tokens of mask window")
    parser.add_argument("--shape", default=SHAPE, help="B,S,H/Hk; bfloat16")
    parser.add_argument("--folds", action="store_true", help="forward continues a float32 state")
    parser.add_argument("--config", action="append", default=[], help="kernel:field=value/value,..")
    parser.add_argument("--configs", type=Path, help="a file of such lines, in place of the grids")
    parser.add_argument("--state", type=Path, help="file of results to go on from and append to")
    parser.add_argument("--write", action="store_true", help="rewrite the rows that are beaten")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a row is beaten")
    parser.add_argument("--offline", action="store_true", help="judge by --state, measure nothing")
    parser.add_argument("--dry-run", action="store_true", help="compile ahead of time for --arch")
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--calls", type=int, default=5, help="timed calls a round")
    parser.add_argument("--compile-s", type=float, default=120.0, help="of one configuration")
    parser.add_argument("--budget-s", type=float, default=1e9, help="start nothing after that")
    parser.add_argument("--run-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    portable = not set(PASSES).isdisjoint(options.kernels)
    if options.offline and not options.state:
        parser.error("--offline needs --state")
    if options.write and portable and (options.shape != SHAPE or "causal" not in options.masks):
        parser.error(f"--write records the causal speed of {SHAPE}: leave --shape, --masks causal")
    if options.write and options.folds:
        parser.error("--write records the speed of storing: leave --folds")
    if options.configs:
        options.config += options.configs.read_text(encoding="utf-8").splitlines()
    return options


def targets(options: argparse.Namespace, arch: int) -> list[Target]:
    """Return the rows asked for; say why others are passed over."""
    found = []
    for kernel in options.kernels:
        for head_dim in options.head_dims:
            try:
                found.append(target(kernel, head_dim, arch))
            except ValueError as error:
                print(f"skipped: {error}")
    if not options.config:
        return found
    asked = [x for x in found if len(parsed(x, options.config)) > 1]
    if not asked:
        raise ValueError(f"--config: {options.config} asks for nothing beside the rows of {found}")
    return asked


def origin_here(arch: int) -> dict:
    """Return the columns of records made here; a commit would not tell of uncommitted changes."""
    return {**timing.origin(timing.new_run(), None, None), "tree": tree_hash(), "arch": arch}


def origin_of(path: Path) -> dict:
    """Return the columns of the last measurement of this tree.

    Raises:
        ValueError: there is none.
    """
    tree = tree_hash()
    found = [x for x in read(path) if x["tree"] == tree and "ms" in x]
    if not found:
        raise ValueError(f"{path}: no measurement of this tree of ring_flash_attn, {tree}")
    return {name: found[-1][name] for name in (*ORIGIN, "arch", "date")}


def dry_run(options: argparse.Namespace) -> int:
    """Compile every candidate for --arch and print what each uses."""
    origin = {**origin_here(options.arch), "gpu": f"none, compiled for sm_{options.arch}"}
    state = State(options.state, origin)
    how = _search_options(options, on_gpu=False)
    for of in targets(options, options.arch):
        found = parsed(of, options.config) if options.config else grid(of)
        whole = tune_search.compile_candidates(of, found, [], state, how)
        said = state.compiled(of)
        lines = [
            (x.text, said[x.text].spills, said[x.text].shared, said[x.text].against(row) or "fits")
            for row in (said[of.row.text],)
            for x in found
            if x.text in said
        ]
        print(f"\n{of.name}, sm_{of.arch}, the checked-in row first:")
        columns = ("configuration", "spills", "shared", "verdict")
        print(tabulate(lines, headers=columns), flush=True)
        if not whole:
            return 3
    return 0


def verdicts(
    found: list[Target], cases: list[Case], state: State
) -> list[tuple[Target, Verdict | None]]:
    """Return the best candidate beside each row, None where none came near, and print them."""
    result = []
    for of in found:
        finals = ranked(state, of, cases, final=True)
        best = next((x for x in finals if x.better), finals[0] if finals else None)
        result.append((of, best))
        if best is None:
            faster = any(x.gain > 1 for x in ranked(state, of, cases, final=False))
            how = "not finished" if faster else f"the row {of.row.text} stands"
            print(f"{of.name}: {how}")
            continue
        how = "BEATEN" if best.better else "the row stands, within the spread"
        print(f"{of.name}: {how}: {best.candidate} takes 1/{best.gain:.3f} of its time")
        print(f"    row {of.row.text}; TFLOP/s {_speeds(best)}")
    return result


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.dry_run:
        return dry_run(options)
    cases = [Case(options.shape, _mask(options, x), options.folds) for x in options.masks]
    whole = True
    if options.offline:
        origin = origin_of(options.state)
        state, found = State(options.state, origin), targets(options, origin["arch"])
        missing = [x for x in found if not state.compiled(x)]
        found = [x for x in found if x not in missing]
        for of in missing:
            print(f"not measured: {of.name}")
    elif not torch.cuda.is_available():
        print("tune.py needs an NVIDIA GPU, and torch sees none: see --dry-run and --offline")
        return 2
    else:
        major, minor = torch.cuda.get_device_capability()
        found = targets(options, 10 * major + minor)
        if options.run_only:
            for of in found:
                tune_search.run_once(of, parsed(of, options.config)[-1], cases)
            return 0
        origin = origin_here(10 * major + minor)
        state, how = State(options.state, origin), _search_options(options, on_gpu=True)
        print(*(f"{key} {value}" for key, value in origin.items()), sep=", ")
        for of in found:
            tried = parsed(of, options.config) if options.config else grid(of)
            whole = tune_search.search(of, tried, cases, state, how) and whole
    results = verdicts(found, cases, state)
    beaten = [(of, x) for of, x in results if x is not None and x.better]
    if options.write and whole:  # a changed row would begin the search anew
        for of, best in beaten:
            spills = state.compiled(of)[best.candidate].spills
            path = write(of, best, spills, options.shape, origin["gpu"], origin["date"])
            print(f"rewrote {of.name} in {path}")
        if beaten:
            print("read the prose beside the rows; `python test/test_aot.py` renews the budgets")
    if not whole:
        print("not finished: run again with the same --state")
    if options.check and beaten:
        return 1
    return 0 if whole else 3


def _search_options(options: argparse.Namespace, on_gpu: bool) -> Options:
    deadline = time.monotonic() + options.budget_s
    command = [sys.executable, str(Path(__file__).resolve()), "--run-only"]
    command += ["--masks", *options.masks, "--window", str(options.window)]
    command += ["--shape", options.shape, *(["--folds"] if options.folds else [])]
    return Options(options.rounds, options.calls, options.compile_s, deadline, on_gpu, command)


def _mask(options: argparse.Namespace, mask: str) -> str:
    return f"window {options.window}" if mask == "window" else mask


def _speeds(best: Verdict) -> str:
    return ", ".join(f"{mask} {speed:.0f}" for mask, speed in best.tflops.items())


if __name__ == "__main__":
    sys.exit(main())
