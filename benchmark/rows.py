"""The CSV files of benchmark/results: their columns, and how rows are added, read and chosen."""

import csv
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
KERNELS_CSV, RING_CSV = RESULTS / "kernels.csv", RESULTS / "ring.csv"

# Windows are written left:right, -1 for open; causal, state and graph are 0 or 1.
KERNELS = (
    *("run", "date", "commit", "tree", "gpu", "torch", "triton", "impl", "pass", "dtype", "batch"),
    *("seqlen", "heads", "kv_heads", "head_dim", "causal", "window", "state"),
    *("ms_p20", "ms_p50", "ms_p80", "tflops", "rel_err"),
)
RING = (
    *("run", "date", "commit", "tree", "gpu", "torch", "triton", "world_size", "impl", "exchange"),
    *("layout", "packing", "pass", "dtype", "batch", "local_len", "heads", "kv_heads", "head_dim"),
    *("causal", "window", "graph", "ms_p20", "ms_p50", "ms_p80", "tflops_per_gpu"),
    *("share_of_kernel", "peak_gib", "err_out", "err_dq", "err_dk", "err_dv"),
)


def append(path: Path, columns: tuple[str, ...], row: dict) -> None:
    """Add one row to a CSV file, with the header first if the file is new or empty.

    Floats are written with 6 digits, None as an empty field.

    Raises:
        ValueError: the row's keys or the file's header are not `columns`.
    """
    if set(row) != set(columns):
        raise ValueError(f"row: got columns {sorted(row)}, expected {sorted(columns)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists() or not path.stat().st_size
    if not is_new:
        _check_header(path, columns)
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
    _check_header(path, columns)
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


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


def _check_header(path: Path, columns: tuple[str, ...]) -> None:
    with path.open(newline="", encoding="utf-8") as file:
        header = tuple(next(csv.reader(file)))
    if header != columns:
        raise ValueError(f"{path}: got header {','.join(header)}, expected {','.join(columns)}")


def text(value: object) -> str:
    """Return a value as the files hold it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
