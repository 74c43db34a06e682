"""Write the performance part of COMPARISON_GUIDE.md: `python benchmark/guide.py`.

Replaces everything between <!-- results --> and <!-- /results --> by the newest run of each CSV
file. With --check it writes nothing and exits with 1 if the guide is not current.
"""

import argparse
import sys
from pathlib import Path

import rows
from predict import RUNS, predicted_table, predictions
from report import (
    best_peers,
    case_name,
    case_of,
    kernel_mask_name,
    kernel_name,
    layout_name,
    mask_name,
    of_ceiling,
    times_as_fast,
)

GUIDE = Path(__file__).resolve().parent.parent / "COMPARISON_GUIDE.md"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
Row = dict[str, str]

RERUN = """### How to rerun

```bash
python benchmark/benchmark_kernels.py --csv benchmark/results/kernels.csv   # one GPU
python benchmark/benchmark_kernels.py --preset coverage --csv benchmark/results/kernels.csv
torchrun --nproc_per_node 4 benchmark/benchmark_comparison.py --csv benchmark/results/ring.csv \\
    --exchanges ring copy-engine --graphs   # --packed batch one stated: documents
python benchmark/plot.py && python benchmark/guide.py   # the pictures, and this part of the guide
```

`--help` lists every option: lengths, heads, masks, layouts, implementations. What is not installed
is skipped with its reason. ring-flash-attn 0.1.8 and FlashAttention-3 are looked for in the folder
that `PEERS` names. Where the machine has no git, pass `--commit` and `--tree` (`git rev-parse
HEAD:ring_flash_attn`); a `tree` of 64 digits is `benchmark/tree_hash.py` of uncommitted changes.

### How it is measured

FLOPs are 4 B H D x (query-key pairs that the mask shows; S^2 / 2 if causal), backward 2.5 times
that. Kernels: all implementations in turn, launches queued ahead, cold L2. Rings: all
implementations in turn, the host waiting for each call, slowest rank. Share of kernel: the same
kernel's time on one GPU for the local length, times P, over the ring's time. Errors: relative,
against dense attention in float64. `triton`: what the library runs on this GPU; `triton-portable`:
what it runs on others. `+ state`: the kernel continues a float32 state or adds to float32
gradients, as every step of a ring after the first does.
"""
COVERAGE = """Share: of the speed of a matrix product of 8192^3 in bfloat16, timed by the same
process. Best other: the fastest of FlashAttention-2, FlashAttention-3 and cuDNN; the last has
neither windows nor packed documents here. `stated`: documents of 128 to 16384 tokens in one varlen
call; tables of documents are filled before. Errors of long cases are those of their first rows.
"""
PACKED = """`one` is one document of P x L tokens; `stated` as many tokens in documents of 128 to
16384 tokens: log-uniform, seed 0, multiples of 2P. FLOPs are those of each document's own pairs.
`llama3` gathers K and V; the other layouts send them round the ring.
"""
PREDICTED = """No host with 8 GPUs has run this yet. At a fixed length a rank each further rank
adds a hop to causal zigzag: as many pairs as any other hop and as large a message, over links that
every GPU has for itself. So the time is a line in P, and the rows of 2 and of 4 GPUs give it:
t(8) = t(4) + 2 (t(4) - t(2)), each a median over the runs {runs}. "4 from 1 and 2" is what such a
line through one GPU's kernel and 2 GPUs says of 4, which are measured. Of the kernel: the kernel on
one GPU, for 8 times the work, over the prediction. `benchmark/predict.py` computes it. To measure
it: `torchrun --nproc_per_node 8 benchmark/benchmark_comparison.py --exchanges ring copy-engine
--local-lengths 8192 32768 --csv benchmark/results/ring.csv`; for documents the same with `--packed
batch one stated`.
"""
TROUBLE = {
    "everything is slower by the same factor": (
        "Another GPU, or one that throttles. Compare ratios within a run, never times across runs; "
        "`benchmark_kernels.py` prints the matmul ceiling first"
    ),
    "the ring's share of the kernel falls with the local length": (
        "As it must: the work of a hop grows with the square of the length, its message with the "
        "length. Short shards wait for the link"
    ),
    "contiguous causal is far slower than zigzag and stripe": (
        "As it must: the last rank works in every step while the first works in one. Use zigzag or "
        "stripe"
    ),
    "`gpu` says (shared)": (
        "More ranks than GPUs, messages through host memory: no measure of speed"
    ),
    "an implementation is missing": "The run printed `skipped ...` with the reason",
    "`share_of_kernel` is empty": (
        "Under a window: P times the local work is not a rank's share of the global work"
    ),
    "the error columns are empty": (
        "A global length beyond 16384, where float64 dense attention is not run"
    ),
}


RING_RUNS = 2  # that the guide shows: one over few cases leaves the one before in sight


def render(kernel_rows: list[Row], ring_rows: list[Row], pictures: str) -> str:
    """Return the part as Markdown. `pictures`: folder of the plots, relative to the guide."""
    kernels, covered = (rows.newest_run(x) for x in rows.by_packing(kernel_rows))
    batches, packed = rows.by_packing(ring_rows)
    rings, packed = rows.last_runs(batches, RING_RUNS), rows.newest_run(packed)
    parts = []
    if not kernels and not covered and not rings and not packed:
        parts.append("Nothing is measured yet: `benchmark/results` holds no rows.\n")
    if kernels:
        parts += [f"### One GPU\n\n{_origin(kernels)}\n", _kernels_table(kernels)]
        names = "triton", "triton + state"
        parts += [_ratios(kernels, name, f"fa{n}") for n in (3, 2) for name in names]
        parts.append(_ratios(kernels, "triton-portable", "fa2"))
        parts.append(f"![TFLOP/s of one GPU]({pictures}/kernels.svg)\n")
    if covered:
        parts += [f"### One GPU, all kinds of cases\n\n{_origin(covered)}\n", COVERAGE]
        parts.append(_coverage_table(covered))
        parts.append(f"![TFLOP/s of one GPU over lengths]({pictures}/coverage.svg)\n")
    if rings:
        parts.append("### Rings\n")
        for run in rings:
            parts += [f"{_origin(run)}\n", *_rings(run)]
        parts.append(f"![TFLOP/s per GPU of the rings]({pictures}/ring.svg)\n")
    predicted = predictions(ring_rows)
    if predicted:
        parts.append(f"### Eight GPUs, predicted\n\n{PREDICTED.format(runs=', '.join(RUNS))}")
        parts.append(_markdown(*predicted_table(predicted)))
    if packed:
        parts += [f"### Packed\n\n{_origin(packed)}\n", PACKED, *_rings(packed)]
        parts.append(f"![TFLOP/s per GPU of packed documents]({pictures}/packed.svg)\n")
    trouble = _markdown(["symptom", "cause and what to do"], [list(x) for x in TROUBLE.items()])
    parts += [RERUN, "### Where numbers look wrong\n", trouble]
    return "\n".join(part for part in parts if part)


def _origin(found: list[Row]) -> str:
    """Say where rows come from; every value that occurs, should a run have several."""

    def every(column: str) -> str:
        return " and ".join(dict.fromkeys(row[column] for row in found))

    trees = dict.fromkeys(
        f"commit {row['commit'][:12]}" if row["commit"] else f"uncommitted tree {row['tree'][:12]}"
        for row in found
    )
    return (
        f"Run {every('run')}, {every('date')}: {every('gpu')}, torch {every('torch')}, "
        f"triton {every('triton')}, {' and '.join(trees)}."
    )


def _kernels_table(found: list[Row]) -> str:
    lines: dict[tuple, dict[str, Row]] = {}
    for row in found:
        key = (case_name(row), row["dtype"], mask_name(row), kernel_name(row))
        lines.setdefault(key, {})[row["pass"]] = row
    table = []
    for key, passes in lines.items():
        line = list(key)
        for pass_ in ("fwd", "bwd"):
            row = passes.get(pass_)
            line += [_ms(row), _number(row, "tflops", "{:.0f}"), _number(row, "rel_err", "{:.1e}")]
        table.append(line)
    columns = ["B,S,H/Hk,D", "dtype", "mask", "kernels"]
    for pass_ in ("forward", "backward"):
        columns += [f"{pass_} ms p50 (p20-p80)", "TFLOP/s", "error"]
    return _markdown(columns, table)


def _coverage_table(found: list[Row]) -> str:
    """Return one line a case: what the library does, and its ratio to the best of the others."""
    best = best_peers(found)
    lines: dict[tuple, dict[tuple, Row]] = {}
    for row in found:
        if row["impl"] == "triton":
            key = (case_name(row), row["dtype"], kernel_mask_name(row))
            lines.setdefault(key, {})[row["pass"], row["state"]] = row
    table = []
    for key, of_case in lines.items():
        line = list(key)
        for pass_ in ("fwd", "bwd"):
            row, again = (of_case.get((pass_, state)) for state in ("0", "1"))
            rival = best.get(case_of(row)) if row else None
            line += [_ms(row), _number(row, "tflops", "{:.0f}"), of_ceiling(row) if row else ""]
            line.append(f"{times_as_fast(row, rival)} {rival['impl']}" if rival else "")
            line += [_number(again, "tflops", "{:.0f}"), _number(row, "rel_err", "{:.1e}")]
        table.append(line)
    columns = ["B,S,H/Hk,D", "dtype", "mask"]
    for pass_ in ("forward", "backward"):
        columns += [f"{pass_} ms p50 (p20-p80)", "TFLOP/s", "share", "x best other"]
        columns += ["+ state", "error"]
    return _markdown(columns, table)


def _rings(found: list[Row]) -> list[str]:
    """Return the table and the ratios of rows; nothing of none."""
    if not found:
        return []
    ratios = [
        _ratios(found, ours, f"upstream-fa{n}")
        for ours in ("triton", "triton, copy engine")
        for n in (2, 3)
    ]
    ratios += [_ratios(found, f"native-fa{n}", f"upstream-fa{n}") for n in (2, 3)]
    return [_rings_table(found), *ratios]


def _rings_table(found: list[Row]) -> str:
    lines: dict[tuple, dict[str, Row]] = {}
    for row in found:
        key = (row["world_size"], case_name(row), row["dtype"], mask_name(row), layout_name(row))
        lines.setdefault((*key, kernel_name(row)), {})[row["pass"]] = row
    table = []
    for key, passes in lines.items():
        line = list(key)
        for pass_ in ("fwd", "fwd_bwd"):
            row = passes.get(pass_)
            line += [_ms(row), _number(row, "tflops_per_gpu", "{:.0f}")]
            line.append(_number(row, "share_of_kernel", "{:.0%}"))
        row = passes.get("fwd_bwd") or passes.get("fwd")
        line.append(_number(row, "peak_gib", "{:.2f}"))
        errors = [_number(row, f"err_{name}", "{:.1e}") for name in ("out", "dq", "dk", "dv")]
        table.append([*line, " ".join(x for x in errors if x)])
    columns = ["P", "B,L,H/Hk,D", "dtype", "mask", "layout", "kernels"]
    for pass_ in ("forward", "forward+backward"):
        columns += [f"{pass_} ms p50 (p20-p80)", "TFLOP/s a GPU", "of kernel"]
    return _markdown([*columns, "peak GiB", "errors out dq dk dv"], table)


def _ratios(found: list[Row], ours: str, rival: str) -> str:
    """Say how many times as fast as `rival` is `ours`, pass by pass; "" if not both ran."""
    times: dict[tuple, dict[str, float]] = {}
    for row in found:
        layout = layout_name(row) if "layout" in row else ""
        key = (row["pass"], layout, case_name(row), mask_name(row), row["dtype"])
        key += (row.get("world_size", ""), row["gpu"])
        times.setdefault(key, {})[kernel_name(row)] = float(row["ms_p50"])
    groups: dict[tuple[str, str], list[float]] = {}
    for key, of in times.items():
        if ours in of and rival in of:
            groups.setdefault(key[:2], []).append(of[rival] / of[ours])
    said = [
        f"{layout}{' ' if layout else ''}{pass_} {_range(x)}"
        for (pass_, layout), x in groups.items()
    ]
    if not said:
        return ""
    return f"Expect {ours} to be this many times as fast as {rival}: {'; '.join(said)}.\n"


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def _markdown(columns: list[str], table: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *table]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _ms(row: Row | None) -> str:
    if row is None:
        return ""
    p20, p50, p80 = (float(row[column]) for column in ("ms_p20", "ms_p50", "ms_p80"))
    return f"{p50:.2f} ({p20:.2f}-{p80:.2f})"


def _number(row: Row | None, column: str, form: str) -> str:
    return form.format(float(row[column])) if row is not None and row[column] else ""


def updated(text: str, part: str) -> str:
    """Return the guide with its part replaced; a guide with only the first marker gets the second.

    Raises:
        ValueError: the guide has no first marker.
    """
    before, begin, rest = text.partition(BEGIN)
    if not begin:
        raise ValueError(f"the guide has no line {BEGIN}")
    _, end, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{part}\n{END}{after if end else rest}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--guide", type=Path, default=GUIDE)
    parser.add_argument("--kernels", type=Path, default=rows.KERNELS_CSV)
    parser.add_argument("--ring", type=Path, default=rows.RING_CSV)
    options = parser.parse_args(arguments)
    kernel_rows = rows.read(options.kernels, rows.KERNELS)
    ring_rows = rows.read(options.ring, rows.RING)
    text = options.guide.read_text(encoding="utf-8")
    wanted = updated(text, render(kernel_rows, ring_rows, "benchmark/results"))
    if text == wanted:
        print(f"{options.guide.name} is current")
        return 0
    if options.check:
        print(f"{options.guide.name} is not current: run python benchmark/guide.py")
        return 1
    options.guide.write_text(wanted, encoding="utf-8")
    print(f"wrote {options.guide.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
