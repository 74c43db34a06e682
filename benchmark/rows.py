"""The CSV files of benchmark/results: their columns, and how rows are added, read and chosen.

    python benchmark/rows.py benchmark/results/kernels.csv part1.csv part2.csv

adds the rows of the later files to the first.
"""

import argparse
import csv
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
KERNELS_CSV, RING_CSV = RESULTS / "kernels.csv", RESULTS / "ring.csv"

# Windows are written left:right, -1 for open; causal, state and graph are 0 or 1. ceiling is the
# TFLOP/s of a matrix product, timed by the process that timed the row. queued: so many calls that
# the host issued without waiting were timed as one; 0: it waited for each.
KERNELS = (
    *("run", "date", "commit", "tree", "gpu", "torch", "triton", "impl", "pass", "dtype", "batch"),
    *("seqlen", "heads", "kv_heads", "head_dim", "causal", "window", "state"),
    *("ms_p20", "ms_p50", "ms_p80", "tflops", "rel_err", "packing", "ceiling"),
)
RING = (
    *("run", "date", "commit", "tree", "gpu", "torch", "triton", "world_size", "impl", "exchange"),
    *("layout", "packing", "pass", "dtype", "batch", "local_len", "heads", "kv_heads", "head_dim"),
    *("causal", "window", "graph", "ms_p20", "ms_p50", "ms_p80", "tflops_per_gpu"),
    *("share_of_kernel", "peak_gib", "err_out", "err_dq", "err_dk", "err_dv", "queued"),
)
# Microseconds of the host; per step and per hop as host_time.py says. cpus: how many it may
# run on. stand_in: 1 where the other ranks were one, see stand_in.py.
HOST = (
    *("run", "date", "commit", "tree", "gpu", "cpu", "torch", "triton", "world_size", "exchange"),
    *("packing", "pass", "dtype", "local_len", "heads", "kv_heads", "head_dim"),
    *("us_p20", "us_p50", "us_p80", "us_one_rank", "us_per_step", "us_per_hop"),
    *("us_queued", "us_driver", "us_python_per_hop", "cpus", "stand_in"),
)
# Columns that came later, and what the rows before them have there.
LATER = {
    KERNELS: {"packing": "batch", "ceiling": ""},
    RING: {"queued": "0"},
    HOST: dict.fromkeys(("us_queued", "us_driver", "us_python_per_hop", "cpus"), "")
    | {"stand_in": "0"},
}


def append(path: Path, columns: tuple[str, ...], row: dict) -> None:
    """Add one row to a CSV file, with the header first if the file is new or empty.

    Floats are written with 6 digits, None as an empty field. A file without columns that came later
    gets them.

    Raises:
        ValueError: the row's keys or the file's header are not `columns`.
    """
    if set(row) != set(columns):
        raise ValueError(f"row: got columns {sorted(row)}, expected {sorted(columns)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists() or not path.stat().st_size
    if not is_new and _header(path, columns) != columns:
        before = read(path, columns)
        path.unlink()
        for old in before:
            append(path, columns, old)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(columns)
        writer.writerow([text(row[column]) for column in columns])


def read(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """Return the rows of a CSV file as text, oldest first; none if the file is missing or empty.

    Raises:
        ValueError: the header is not `columns`.
    """
    if not path.exists() or not path.stat().st_size:
        return []
    _header(path, columns)
    with path.open(newline="", encoding="utf-8") as file:
        return [LATER.get(columns, {}) | row for row in csv.DictReader(file)]


def newest_run(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the rows of the run that the last row belongs to; none if there are none."""
    return [row for row in rows if row["run"] == rows[-1]["run"]]


def last_runs(rows: list[dict[str, str]], count: int) -> list[list[dict[str, str]]]:
    """Return the rows of so many runs, the newest first."""
    names = list(dict.fromkeys(row["run"] for row in reversed(rows)))[:count]
    return [[row for row in rows if row["run"] == name] for name in names]


def by_packing(rows: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return the rows of runs over batches alone, and those of runs with packed documents."""
    packed = {row["run"] for row in rows if row["packing"] != "batch"}
    return (
        [row for row in rows if row["run"] not in packed],
        [row for row in rows if row["run"] in packed],
    )


def _header(path: Path, columns: tuple[str, ...]) -> tuple[str, ...]:
    """Return a file's header, which is `columns`, or those that were there at first."""
    with path.open(newline="", encoding="utf-8") as file:
        header = tuple(next(csv.reader(file)))
    if header not in (columns, tuple(x for x in columns if x not in LATER.get(columns, ()))):
        raise ValueError(f"{path}: got header {','.join(header)}, expected {','.join(columns)}")
    return header


def text(value: object) -> str:
    """Return a value as the files hold it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("into", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--ring", action="store_true", help="they are rows of rings")
    options = parser.parse_args(arguments)
    columns = RING if options.ring else KERNELS
    found = [row for path in options.files for row in read(path, columns)]
    for row in found:
        append(options.into, columns, row)
    print(f"{options.into}: {len(found)} rows more")
    return 0


if __name__ == "__main__":
    sys.exit(main())
