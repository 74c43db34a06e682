"""The cases of a benchmark of one GPU: what they cover, how they are shared out, and their rows."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import oracle

FOLDER = Path(__file__).resolve().parent.parent / "benchmark"
sys.path.append(str(FOLDER))

import benchmark_kernels  # noqa: E402
import coverage  # noqa: E402
import guide  # noqa: E402
import kernels  # noqa: E402
import packing  # noqa: E402
import plot  # noqa: E402
import report  # noqa: E402
import rows  # noqa: E402
import timing  # noqa: E402
from packed_rings import packed_truth  # noqa: E402

from ring_flash_attn.core.attention import Attention  # noqa: E402
from test_guide import kernel_row  # noqa: E402

ON_GPU = torch.cuda.is_available()
# Triton 3.6's interpreter reads loop bounds so.
loop_bounds = "ignore:Conversion of an array with ndim > 0:DeprecationWarning"
interpreted = pytest.mark.filterwarnings(loop_bounds)


def as_read(found: list[dict]) -> list[dict[str, str]]:
    return [{name: rows.text(value) for name, value in row.items()} for row in found]


def test_every_head_dim_meets_every_mask_length_ratio_and_packing():
    cases = coverage.covering()
    assert len(cases) == len(set(cases)) == 35
    for head_dim in (64, 128, 256):
        mine = [case for case in cases if case.shape.head_dim == head_dim]
        assert {case.mask for case in mine} == {"causal", "full", "window"}
        assert {1024, 4096, 16384, 65536} <= {case.shape.length for case in mine}
        assert {case.shape.heads // case.shape.key_heads for case in mine} == {1, 4}
        assert {case.packed for case in mine} == {"batch", "stated"}
    assert all(case.shape.batch == 1 for case in cases if case.packed != "batch")
    assert {case.window(4096) for case in cases} == {(-1, -1), (4096, 0)}


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8, 50])
def test_parts_are_all_cases_once_and_about_as_long(count: int):
    cases = coverage.covering()
    parts = [coverage.part_of(cases, (i, count), 4096) for i in range(1, count + 1)]
    assert Counter(case for part in parts for case in part) == Counter(cases)
    assert all(part == sorted(part, key=cases.index) for part in parts)
    longest = max(case.flops(4096, "fwd") for case in cases)
    work = [sum(case.flops(4096, "fwd") for case in part) for part in parts]
    assert max(work) - min(work) <= longest


def test_a_case_counts_the_flops_of_its_documents():
    sizes = coverage.Shape(1, 1024, 4, 2, 64)
    whole, parts = (coverage.Case(sizes, "causal", x) for x in ("batch", "stated"))
    assert whole.flops(0, "bwd") == timing.flops(1, 1024, 4, 64, True, (-1, -1), "bwd")
    squares = sum(n * n for n in packing.stated(1024, 1))
    assert parts.flops(0, "fwd") == 4 * 4 * 64 * squares / 2
    assert str(parts) == "1,1024,4/2,64 causal stated" and str(whole) == "1,1024,4/2,64 causal"


def test_the_preset_is_a_choice_of_cases_and_rounds():
    usual, covers = (benchmark_kernels.parse(x) for x in ([], ["--preset", "coverage"]))
    assert [str(case) for case in usual.cases[:2]] == [
        *("1,16384,16/16,128 full", "1,16384,16/16,128 causal")
    ]
    assert (len(usual.cases), usual.window, usual.rounds) == (10, 1024, 8)
    assert usual.implementations == kernels.IMPLEMENTATIONS
    assert (len(covers.cases), covers.window, covers.rounds) == (35, 4096, 3)
    assert "triton-portable" not in covers.implementations
    given = ["--shapes", "2,64,4/2,64", "1,64,4,64", "--packed", "batch", "stated"]
    asked = benchmark_kernels.parse([*given, "--masks", "window", "--window", "7"])
    assert [str(case) for case in asked.cases] == [
        *("2,64,4/2,64 window", "1,64,4/4,64 window", "1,64,4/4,64 window stated")
    ]


@pytest.mark.parametrize(
    "given, said",
    [
        (["--preset", "coverage", "--masks", "full"], "--preset has its own"),
        (["--packed", "stated", "--shapes", "1,63,4/2,64"], "--packed needs even lengths"),
        (["--part", "5/4"], "--part"),
    ],
)
def test_options_that_do_not_go_together_are_errors(given: list[str], said: str, capsys):
    with pytest.raises(SystemExit):
        benchmark_kernels.parse(given)
    assert said in capsys.readouterr().err


@interpreted
@pytest.mark.kernel
@pytest.mark.parametrize("window", [(-1, -1), (9, 0)], ids=["causal", "window"])
def test_timed_packed_kernels_compute_attention_within_documents(window: tuple[int, int]):
    attention, documents = Attention(0.25, True, window), packing.Packing("stated", (6, 22, 12))
    inputs = kernels.draw(1, 40, 2, 1, 16, torch.bfloat16, attention)
    want = packed_truth(inputs, documents)
    document = torch.tensor([0] * 6 + [1] * 22 + [2] * 12, device=inputs.q.device)
    seen = oracle.visible(range(40), range(40), True, window, inputs.q.device)
    seen = seen & (document[:, None] == document)
    dense = oracle.dense_in_dtype(*inputs[:3], seen, inputs.dout)
    found = kernels.kernels("triton", inputs, documents)
    assert [kernel[1:3] for kernel in found] == [
        (x, state) for x in ("fwd", "bwd") for state in (False, True)
    ]
    for impl in ("fa2", "fa3") if ON_GPU else ():
        found += kernels.kernels(impl, inputs, documents)
    for kernel in found:
        yardstick = (dense.out,) if kernel.pass_ == "fwd" else (dense.dq, dense.dk, dense.dv)
        kernel.run()  # a call before it must not change the result
        error = kernels.relative_error(kernel.result(), want)
        assert error <= 2 * kernels.relative_error(yardstick, want) + 1e-5, kernel[:3]


def test_kernels_that_take_no_documents_say_so():
    inputs = kernels.draw(1, 16, 2, 1, 16, torch.bfloat16, Attention(0.25))
    documents = packing.pack("stated", 16, 1)
    with pytest.raises(NotImplementedError, match="cuDNN attention takes no packed"):
        kernels.kernels("cudnn", inputs, documents)
    if not ON_GPU:
        with pytest.raises(NotImplementedError, match="cu_seqlens on cuda only"):
            kernels.kernels("fa2", inputs, documents)


@interpreted
@pytest.mark.kernel
def test_a_measured_case_is_a_row_for_every_kernel(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    timed = lambda run, repeats, flush: calls.append((repeats, run())) or [2.0] * repeats  # noqa: E731
    monkeypatch.setattr(timing, "queued_times", timed)
    monkeypatch.setattr(benchmark_kernels, "SHORT", 16)
    given = ["--shapes", "1,40,2/1,16", "--masks", "window", "--window", "4", "--packed", "stated"]
    options = benchmark_kernels.parse([*given, "--implementations", "triton", "cudnn"])
    options.longest_truth, options.kernel_s = 20, 0.05
    skipped: set[str] = set()
    found = benchmark_kernels.measure(options, options.cases[0], torch.empty(0), skipped)
    assert len(found) == 4 and len(skipped) == 1
    for row in found:
        assert {*row, "ceiling"} == set(rows.KERNELS[7:])
        assert [row[x] for x in ("packing", "window", "seqlen")] == ["stated", "4:0", 40]
        assert 1e-4 < row["rel_err"] < 6e-3
        assert row["tflops"] == options.cases[0].flops(4, row["pass"]) / 2.0 / 1e9
    # 50 ms for 8 rounds of a kernel of 2 ms: 3 calls a round, one call to know it, 2 to warm up.
    assert Counter(repeats for repeats, _ in calls) == {1: 4, 2: 4, 3: 4 * 8}


def test_rows_from_before_a_column_are_read_and_written_anew(tmp_path: Path):
    path, more = tmp_path / "kernels.csv", tmp_path / "part.csv"
    old = rows.KERNELS[: -len(rows.LATER[rows.KERNELS])]
    values = as_read([kernel_row()])[0]
    path.write_text(",".join(old) + "\n" + ",".join(values[x] for x in old) + "\n")
    [read] = rows.read(path, rows.KERNELS)
    assert set(read) == set(rows.KERNELS)
    assert (read["packing"], read["ceiling"], read["run"]) == ("batch", "", "r1")
    rows.append(more, rows.KERNELS, kernel_row(packing="stated", ceiling=700.0, run="r2"))
    assert rows.main([str(path), str(more)]) == 0
    lines = path.read_text().splitlines()
    assert lines[0] == ",".join(rows.KERNELS) and len(lines) == 3
    assert lines[1].endswith(",batch,") and lines[2].endswith(",stated,700")
    assert [row["run"] for row in rows.read(path, rows.KERNELS)] == ["r1", "r2"]
    path.write_text(",".join(old[:-1]) + "\n")
    with pytest.raises(ValueError, match="header"):
        rows.read(path, rows.KERNELS)


def covered_rows() -> list[dict]:
    found = []
    for packed, best in (("batch", "cudnn"), ("stated", "fa3")):
        for pass_ in ("fwd", "bwd"):
            of = {"pass": pass_, "packing": packed, "run": "c1", "ceiling": 8.0}
            found += [kernel_row(state=state, **of) for state in (0, 1)]
            found += [kernel_row(impl="fa2", ms_p50=3.0, **of)]
            found += [kernel_row(impl=best, ms_p50=1.0, tflops=8.0, **of)]
    return found


def test_tables_compare_with_the_best_rival_of_the_same_case():
    found = covered_rows()
    best = report.best_peers(found)
    assert sorted(row["impl"] for row in best.values()) == ["cudnn", "cudnn", "fa3", "fa3"]
    line = report.kernels_table(found).splitlines()[2].split()
    assert line[-4:] == ["1.50", "0.50", "50%", "1.00e-03"]
    alone = report.kernels_table([kernel_row()]).splitlines()[2].split()
    assert alone[-2:] == ["4", "1.00e-03"]
    assert "causal, stated" in report.kernels_table(found)


def test_the_guide_shows_a_covering_run_apart():
    found = as_read([kernel_row(), *covered_rows()])
    before, _, covering = guide.render(found, [], "pictures").partition("### One GPU, all kinds")
    assert before + "### " == guide.render(found[:1], [], "pictures").partition("How to")[0]
    assert "Run c1" in covering and "pictures/coverage.svg" in covering
    line = "| 2.00 (1.00-3.00) | 4 | 50% | 0.50 {} | 4 | 1.0e-03 "
    for mask, peer in (("causal", "cudnn"), ("causal, stated", "fa3")):
        half = line.format(peer)
        assert f"| 1,64,4/2,16 | bf16 | {mask} {half}{half}|" in covering


def test_the_plot_of_a_covering_run_is_the_same_every_time(tmp_path: Path):
    path = tmp_path / "kernels.csv"
    for row in [kernel_row(), *covered_rows(), kernel_row(packing="stated", head_dim=8, run="c1")]:
        rows.append(path, rows.KERNELS, row)
    for folder in ("one", "two"):
        given = ["--kernels", str(path), "--ring", str(tmp_path / "no"), "--to"]
        assert plot.main([*given, str(tmp_path / folder)]) == 0
    names = sorted(x.name for x in (tmp_path / "one").iterdir())
    assert names == ["coverage.svg", "kernels.svg"]
    pictures = [(tmp_path / x / "coverage.svg").read_bytes() for x in ("one", "two")]
    assert pictures[0] == pictures[1]
