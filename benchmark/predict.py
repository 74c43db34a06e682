"""Predict a ring's time on more GPUs from rows of 2 and 4: `python benchmark/predict.py --ranks 8`.

At a fixed length a rank, each further rank adds a hop to causal zigzag or stripe: as many pairs of
queries and keys as any other hop, and as large a message, over links that every GPU has for itself.
So the time is a line in P, and two points give it:

    t(P) = t(4) + (P - 4) (t(4) - t(2)) / 2

The same line through one GPU's kernel and P = 2 says how good that is: it predicts P = 4, which is
measured. Times are medians over the runs asked for, which should be of one state of the library;
machines differ by a tenth, and what is wrong in t(4) counts three times at P = 8.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import rows
from tabulate import tabulate

Row = dict[str, str]
RESULTS = Path(__file__).resolve().parent / "results" / "ring.csv"
# One state of the library's rings. What changed in between changes less than machines differ.
RUNS = ("r17", "r18", "r19", "r20", "r21", "r22")
KNOWN = (2, 4)
PASSES = {"fwd": "forward", "fwd_bwd": "forward + backward"}
# Layouts of which every hop has the same work.
LAYOUTS = ("zigzag", "stripe")
GIVEN = {"packing": "batch", "graph": "0", "queued": "0", "causal": "1", "window": "-1:-1"}


class Prediction(NamedTuple):
    """A case's milliseconds.

    Attributes:
        name: implementation, exchange, layout.
        kernel: of the kernel on one GPU, for the local length. two, four: of 2 and 4, measured.
        more: of `ranks` GPUs, predicted. checked: of 4, as predicted from one and two.
    """

    name: tuple[str, str, str]
    pass_: str
    local_len: int
    ranks: int
    kernel: float
    two: float
    four: float

    @property
    def more(self) -> float:
        return line((2, self.two), (4, self.four), self.ranks)

    @property
    def checked(self) -> float:
        return line((1, self.kernel), (2, self.two), 4)

    @property
    def share(self) -> float:
        """The kernel's time for so many times the work, over the predicted one."""
        return self.kernel * self.ranks / self.more


def line(first: tuple[int, float], second: tuple[int, float], at: int) -> float:
    """Return the value at `at` of the line through two points."""
    (x0, y0), (x1, y1) = first, second
    return y1 + (at - x1) * (y1 - y0) / (x1 - x0)


def predictions(
    ring_rows: list[Row], ranks: int = 8, runs: Sequence[str] = RUNS
) -> list[Prediction]:
    """Return a prediction for every case that has rows of 2 and of 4 GPUs, in order of length."""
    cases: dict[tuple, dict[int, list[Row]]] = {}
    for row in ring_rows:
        if row["run"] not in runs or any((row[x] or y) != y for x, y in GIVEN.items()):
            continue
        if "shared" in row["gpu"] or not row["share_of_kernel"]:
            continue
        if row["layout"] not in LAYOUTS or row["pass"] not in PASSES:
            continue
        sizes = row["batch"], row["heads"], row["kv_heads"], row["head_dim"], row["dtype"]
        name = row["impl"], row["exchange"] or "ring", row["layout"]
        key = int(row["local_len"]), name, row["pass"], sizes
        cases.setdefault(key, {}).setdefault(int(row["world_size"]), []).append(row)
    found = []
    for (local_len, name, pass_, _), by_ranks in sorted(cases.items()):
        if not by_ranks.keys() >= set(KNOWN):
            continue
        two, four = (median(_ms(x) for x in by_ranks[n]) for n in KNOWN)
        kernel = median(
            _ms(x) * float(x["share_of_kernel"]) / n for n in KNOWN for x in by_ranks[n]
        )
        found.append(Prediction(name, pass_, local_len, ranks, kernel, two, four))
    return found


def predicted_table(found: list[Prediction]) -> tuple[list[str], list[list[str]]]:
    """Return the columns and lines of a table of at least one."""
    columns = ["L a rank", "implementation", "pass", "2 GPUs ms", "4 GPUs ms"]
    predicted = f"{found[0].ranks} GPUs ms, predicted"
    columns += ["4 from 1 and 2 ms", predicted, "calls/s", "of the kernel"]
    lines = []
    for x in found:
        impl, exchange, layout = x.name
        name = f"{impl}{', copy engine' if exchange == 'copy-engine' else ''}, {layout}"
        times = [f"{ms:.2f}" for ms in (x.two, x.four, x.checked)]
        line_ = [str(x.local_len), name, PASSES[x.pass_], *times]
        lines.append([*line_, f"{x.more:.2f}", f"{1e3 / x.more:.1f}", f"{x.share:.0%}"])
    return columns, lines


def _ms(row: Row) -> float:
    return float(row["ms_p50"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--runs", nargs="+", default=RUNS)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    found = predictions(rows.read(options.csv, rows.RING), options.ranks, options.runs)
    if not found:
        print(f"{options.csv} has no case with rows of 2 and of 4 GPUs")
        return 1
    columns, lines = predicted_table(found)
    print(tabulate(lines, headers=columns))
    return 0


if __name__ == "__main__":
    sys.exit(main())
