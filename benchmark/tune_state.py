"""What tuning has found so far, a JSON object a line, and whether a row is still the best."""

import json
import math
from pathlib import Path
from typing import NamedTuple

from candidates import Target
from launch_search import Compiled
from timing import Quantiles

ORIGIN = ("gpu", "tree", "torch", "triton")


class Case(NamedTuple):
    """What is computed: B,S,H/Hk, the mask, and whether forward continues a state."""

    shape: str
    mask: str
    folds: bool

    def __str__(self) -> str:
        return f"{self.shape} {self.mask}{' + state' if self.folds else ''}"


class Verdict(NamedTuple):
    """The best candidate beside the row.

    Attributes:
        gain: the row's median time over the candidate's, geometric mean over the cases.
        better: whether that is more than the spread.
        tflops: of the candidate, by case.
    """

    candidate: str
    gain: float
    better: bool
    tflops: dict[str, float]


class State:
    """The records of one GPU, one tree of the library and one version of its compilers.

    All have kernel, head_dim, candidate. Compiling adds dropped, spills, shared, serialized; timing
    case, row, final, and ms, row_ms, tflops, or dropped.
    """

    def __init__(self, path: Path | None, origin: dict) -> None:
        """Read the file, if there is one; what is added is appended to it.

        Args:
            origin: columns of every record, of which ORIGIN must be the same to be read.
        """
        self._path, self._origin = path, origin
        wanted = {name: origin[name] for name in ORIGIN}
        self._records = [x for x in read(path) if wanted.items() <= x.items()]

    def add(self, **record: object) -> None:
        """Append a record, whole or, if this is interrupted, so that `read` passes over it."""
        full = {**self._origin, **record}
        self._records.append(full)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(full) + "\n")

    def compiled(self, of: Target) -> dict[str, Compiled]:
        """Return what the compiler said, by candidate."""
        return {
            x["candidate"]: Compiled(*(x[name] for name in Compiled._fields))
            for x in self._of(of)
            if "case" not in x
        }

    def timed(self, of: Target, case: Case, final: bool = False) -> dict[str, dict]:
        """Return the timing records beside the checked-in row, by candidate."""
        return {
            x["candidate"]: x
            for x in self._of(of)
            if x.get("case") == str(case) and x["row"] == of.row.text and x["final"] == final
        }

    def dropped(self, of: Target) -> dict[str, str]:
        """Return why candidates are out, whatever the case, as long as the row is what it is."""
        return {
            x["candidate"]: x["dropped"]
            for x in self._of(of)
            if x.get("dropped") and x.get("row", of.row.text) == of.row.text
        }

    def _of(self, of: Target) -> list[dict]:
        key = of.kernel, of.head_dim
        return [x for x in self._records if (x["kernel"], x["head_dim"]) == key]


def read(path: Path | None) -> list[dict]:
    """Return the records of a file, none if it is missing; lines cut short are passed over."""
    if path is None or not path.exists():
        return []
    found = []
    text = path.read_text(encoding="utf-8")
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    if text and not text.endswith("\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")
    return found


def ranked(state: State, of: Target, cases: list[Case], final: bool) -> list[Verdict]:
    """Return a verdict on every candidate timed in all cases, most gain first."""
    tables = [state.timed(of, case, final) for case in cases]
    out = state.dropped(of)
    names = [x for x in tables[0] if x not in out and all(x in table for table in tables)]
    found = [
        verdict(name, {c: t[name] for c, t in zip(cases, tables, strict=True)}) for name in names
    ]
    return sorted(found, key=lambda x: -x.gain)


def verdict(name: str, records: dict[Case, dict]) -> Verdict:
    """Judge one candidate by its times and the row's, taken in turn, in every case.

    It is better if, in the geometric mean over the cases, its median is below the row's 20th
    percentile and its 80th percentile below the row's median, and in no case is its median above
    the row's 80th percentile. Its 20th percentile below the row's median would be true of a tie.
    """
    ms = [Quantiles(*x["ms"]) for x in records.values()]
    row = [Quantiles(*x["row_ms"]) for x in records.values()]

    def mean(values) -> float:
        return math.exp(sum(map(math.log, values)) / len(ms))

    mine, theirs = (Quantiles(*map(mean, zip(*x, strict=True))) for x in (ms, row))
    better = mine.p50 < theirs.p20 and mine.p80 < theirs.p50
    better = better and all(x.p50 <= y.p80 for x, y in zip(ms, row, strict=True))
    speeds = {case.mask: x["tflops"] for case, x in records.items()}
    return Verdict(name, theirs.p50 / mine.p50, better, speeds)
