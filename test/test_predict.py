"""The time of a ring on more GPUs, predicted from rows of fewer."""

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmark"
sys.path.insert(0, str(FOLDER))

import guide  # noqa: E402
import predict  # noqa: E402
import rows  # noqa: E402

CASE = {"impl": "triton", "exchange": "copy-engine", "layout": "zigzag", "pass": "fwd_bwd"}
SIZES = {"batch": 1, "heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": "bf16", "local_len": 64}


def row(ranks: int, ms: float, run: str = "r17", **changes) -> dict[str, str]:
    """Return a row whose kernel takes 3 ms on one GPU."""
    found = dict.fromkeys(rows.RING, "") | CASE | SIZES | predict.GIVEN
    found |= {"run": run, "gpu": "NVIDIA H200", "world_size": ranks}
    found |= {"ms_p20": ms, "ms_p50": ms, "ms_p80": ms, "tflops_per_gpu": 1.0}
    found |= {"share_of_kernel": 3.0 * ranks / ms} | changes
    return {name: str(value) for name, value in found.items()}


def test_a_line_is_continued():
    (found,) = predict.predictions([row(2, 7.0), row(4, 13.0)], 8)
    assert found.more == pytest.approx(25.0)
    assert found.checked == pytest.approx(15.0)  # through 3 at P = 1
    assert found.share == pytest.approx(24 / 25)
    columns, lines = predict.predicted_table([found])
    assert len(lines) == 1 and len(columns) == len(lines[0])
    told = ["64", "triton, copy engine, zigzag", "forward + backward", "7.00", "13.00", "15.00"]
    assert lines[0] == [*told, "25.00", "40.0", "96%"]
    assert "8 GPUs ms, predicted" in columns


def test_times_are_medians_of_the_runs_asked_for():
    several = [
        row(2, 7.0),
        *(row(4, ms, f"r{n}") for n, ms in ((17, 13.0), (18, 90.0), (19, 12.0))),
    ]
    (found,) = predict.predictions([*several, row(4, 1000.0, "r3")], 8)
    assert found.four == 13.0
    assert predict.predictions(several, 8, runs=["r18"]) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"layout": "contiguous"},
        {"packing": "one"},
        {"graph": "1"},
        {"queued": "16"},
        {"causal": "0"},
        {"window": "4096:0"},
        {"gpu": "NVIDIA H200 (shared)"},
        {"share_of_kernel": ""},
        {"head_dim": "32"},
    ],
    ids=str,
)
def test_rows_of_other_cases_say_nothing(changes):
    assert predict.predictions([row(2, 7.0), row(4, 13.0, **changes)]) == []


def test_the_guide_has_what_can_be_predicted():
    assert "predicted" not in guide.render([], [row(2, 7.0)], "pictures")
    told = guide.render([], [row(2, 7.0), row(4, 13.0)], "pictures")
    assert "### Eight GPUs, predicted" in told and "| 25.00 |" in told


def test_the_command_prints_the_table_or_that_there_is_none(tmp_path, capsys):
    assert predict.main(["--runs", "r0"]) == 1
    assert predict.main(["--ranks", "16"]) == 0
    assert "16 GPUs ms, predicted" in capsys.readouterr().out
