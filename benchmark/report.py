"""The tables that the benchmarks print, from rows as they go into the CSV files."""

import rows
from tabulate import tabulate

OURS = ("triton", "triton-portable")
CASE = ("batch", "seqlen", "heads", "kv_heads", "head_dim", "causal", "window", "packing", "pass")


def kernels_table(measured: list[dict]) -> str:
    """Return a table of rows, each with its speed over that of its rivals in the same case."""
    best, flash2 = best_peers(measured), {case_of(x): x for x in measured if x["impl"] == "fa2"}
    lines = []
    for r in measured:
        ratios = (times_as_fast(r, rivals.get(case_of(r))) for rivals in (flash2, best))
        error = "" if r["rel_err"] is None else f"{r['rel_err']:.2e}"
        quantiles = (f"{r[c]:.3f}" for c in ("ms_p20", "ms_p50", "ms_p80"))
        speed = (*quantiles, f"{r['tflops']:.0f}", *ratios, of_ceiling(r), error)
        lines.append((case_name(r), kernel_mask_name(r), r["pass"], kernel_name(r), *speed))
    columns = ("B,S,H/Hk,D", "mask", "pass", "kernel", "p20 ms", "p50", "p80", "TFLOP/s", "x FA2")
    columns += ("x best", "of matmul", "rel. error")
    return tabulate(lines, headers=columns, disable_numparse=True)


def case_of(row: dict) -> tuple[str, ...]:
    """Return what two rows of a run share if one can be compared with the other."""
    return tuple(rows.text(row[column]) for column in CASE)


def best_peers(measured: list[dict]) -> dict[tuple[str, ...], dict]:
    """Return the fastest row of each case that is not the library's."""
    best: dict[tuple[str, ...], dict] = {}
    for row in measured:
        known = best.get(case_of(row))
        if row["impl"] not in OURS and (known is None or _ms(row) < _ms(known)):
            best[case_of(row)] = row
    return best


def times_as_fast(row: dict, rival: dict | None) -> str:
    """Return how many times as fast as a rival a row is, "" if there is none."""
    return f"{_ms(rival) / _ms(row):.2f}" if rival else ""


def of_ceiling(row: dict) -> str:
    """Return the share of the matrix product's speed, "" if that was not timed."""
    return f"{float(row['tflops']) / float(row['ceiling']):.0%}" if row["ceiling"] else ""


def rings_table(measured: list[dict]) -> str:
    """Return the table: the columns of the CSV, tokens/s, and speed over upstream's."""
    case_of = ("local_len", "causal", "window", "layout", "packing", "pass")
    times = {(*(r[c] for c in case_of), r["impl"]): r["ms_p50"] for r in measured}
    lines = []
    for r in measured:
        ms = r["ms_p50"]
        tokens = r["batch"] * r["local_len"] * r["world_size"] / ms * 1e3
        rivals = (times.get((*(r[c] for c in case_of), f"upstream-fa{n}")) for n in (2, 3))
        line = [r["local_len"], mask_name(r), layout_name(r), kernel_name(r), r["pass"]]
        line += [f"{r[c]:.2f}" for c in ("ms_p20", "ms_p50", "ms_p80")]
        line += [f"{tokens:,.0f}", f"{r['tflops_per_gpu']:.4g}"]
        line += [_given(r["share_of_kernel"], "{:.1%}"), _given(r["peak_gib"], "{:.2f}")]
        line += [_given(rival and rival / ms, "{:.2f}") for rival in rivals]
        line += [_given(r[f"err_{x}"], "{:.2e}") for x in ("out", "dq", "dk", "dv")]
        lines.append(line)
    columns = ("local", "mask", "layout", "kernels", "pass", "p20 ms", "p50", "p80", "tokens/s")
    columns += ("TFLOP/s/GPU", "of kernel", "peak GiB", "x upstream-fa2", "x upstream-fa3")
    columns += ("err out", "err dq", "err dk", "err dv")
    return tabulate(lines, headers=columns, stralign="left", disable_numparse=True)


def case_name(row: dict) -> str:
    """Return B,S,H/Hk,D of a row as it was measured or read; of a ring the local length."""
    length = row["seqlen"] if "seqlen" in row else row["local_len"]
    return f"{row['batch']},{length},{row['heads']}/{row['kv_heads']},{row['head_dim']}"


def kernel_name(row: dict) -> str:
    """Return the implementation, whether it continued a state, what moved K, V, and if a graph."""
    name = f"{row['impl']} + state" if int(row.get("state", 0)) else row["impl"]
    name = f"{name}, copy engine" if row.get("exchange") == "copy-engine" else name
    return f"{name}, graph" if int(row.get("graph", 0) or 0) else name


def layout_name(row: dict) -> str:
    """Return the layout, and the packing if it is not a batch."""
    return row["layout"] if row["packing"] == "batch" else f"{row['layout']} {row['packing']}"


def mask_name(row: dict) -> str:
    """Return causal, full or the window of a row as it was measured or read."""
    if row["window"] != "-1:-1":
        return f"window {row['window']}"
    return "causal" if int(row["causal"]) else "full"


def kernel_mask_name(row: dict) -> str:
    """Return the mask, and the packing if it is not a batch."""
    name = mask_name(row)
    return name if row["packing"] == "batch" else f"{name}, {row['packing']}"


def _ms(row: dict) -> float:
    return float(row["ms_p50"])


def _given(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
