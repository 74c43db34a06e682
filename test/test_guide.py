"""Rows of the benchmarks, and what is generated from them: the guide, plots and tables."""

import math
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmark"
sys.path.append(str(FOLDER))

import guide  # noqa: E402
import plot  # noqa: E402
import report  # noqa: E402
import rows  # noqa: E402
from tree_hash import tree_hash  # noqa: E402

ORIGIN = {
    **{"run": "r1", "date": "2026-01-02", "commit": "c" * 40, "tree": "t" * 40},
    **{"gpu": "a GPU", "torch": "2.0", "triton": "3.0"},
}
SIZES = {"dtype": "bf16", "batch": 1, "heads": 4, "kv_heads": 2, "head_dim": 16}
TIMES = {"ms_p20": 1.0, "ms_p50": 2.0, "ms_p80": 3.0}


def kernel_row(**changes) -> dict:
    row = {**ORIGIN, **SIZES, **TIMES, "impl": "triton", "pass": "fwd", "seqlen": 64}
    row |= {"causal": 1, "window": "-1:-1", "state": 0, "tflops": 4.0, "rel_err": 1e-3}
    row |= {"packing": "batch", "ceiling": None}
    return row | changes


def ring_row(**changes) -> dict:
    row = {**dict.fromkeys(rows.RING), **ORIGIN, **SIZES, **TIMES, "impl": "triton"}
    row |= {"world_size": 2, "exchange": "ring", "layout": "zigzag", "packing": "batch"}
    row |= {"pass": "fwd_bwd", "local_len": 64, "causal": 1, "window": "-1:-1", "graph": 0}
    row |= {"queued": 0}
    return row | {"tflops_per_gpu": 4.0, "share_of_kernel": 0.5} | changes


def test_rows_are_appended_under_one_header(tmp_path: Path):
    path = tmp_path / "new" / "kernels.csv"
    assert rows.read(path, rows.KERNELS) == []
    rows.append(path, rows.KERNELS, kernel_row(causal=True, tflops=1 / 3, rel_err=None))
    rows.append(path, rows.KERNELS, kernel_row(run="r2"))
    lines = path.read_text().splitlines()
    assert lines[0] == ",".join(rows.KERNELS) and len(lines) == 3
    found = rows.read(path, rows.KERNELS)
    assert [found[0][x] for x in ("causal", "tflops", "rel_err")] == ["1", "0.333333", ""]
    assert rows.newest_run(found) == found[1:]
    assert rows.last_runs(found, 1) == [found[1:]]
    assert rows.last_runs(found, 2) == rows.last_runs(found, 3) == [found[1:], found[:1]]
    with pytest.raises(ValueError, match="expected"):
        rows.append(path, rows.KERNELS, {"run": "r3"})
    with pytest.raises(ValueError, match="header"):
        rows.append(path, rows.RING, ring_row())


@pytest.mark.parametrize("path, columns", [(rows.KERNELS_CSV, "KERNELS"), (rows.RING_CSV, "RING")])
def test_committed_rows_have_the_columns(path: Path, columns: str):
    if not path.exists():
        pytest.skip(f"no {path.name} is committed")
    columns = getattr(rows, columns)
    for row in rows.read(path, columns):
        assert set(row) == set(columns)
        assert None not in row.values() and None not in row
        assert row["run"] and row["tree"] and row["gpu"] not in ("", "cpu")
        assert 0 < float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
        assert math.isfinite(float(row["tflops" if "tflops" in row else "tflops_per_gpu"]))


def test_tree_hash_names_the_content(tmp_path: Path):
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "plan.py").write_text("a = 1\n")
    (tmp_path / "ring.py").write_text("b = 2\n")
    first = tree_hash(tmp_path)
    assert len(first) == 64 and first == tree_hash(tmp_path)
    (tmp_path / "notes.txt").write_text("not a source")
    (tmp_path / "core" / "plan.pyc").write_bytes(b"cache")
    assert tree_hash(tmp_path) == first
    (tmp_path / "ring.py").write_text("b = 3\n")
    changed = tree_hash(tmp_path)
    (tmp_path / "ring.py").rename(tmp_path / "core" / "ring.py")
    assert len({first, changed, tree_hash(tmp_path)}) == 3
    assert tree_hash() == tree_hash(FOLDER.parent / "ring_flash_attn")


def test_guide_is_current_until_a_row_is_added(tmp_path: Path, capsys):
    path, kernels_csv = tmp_path / "guide.md", tmp_path / "kernels.csv"
    files = ["--guide", str(path), "--kernels", str(kernels_csv), "--ring", str(tmp_path / "no")]
    path.write_text(f"before\n\n{guide.BEGIN}\n\nafter\n")
    assert guide.main([*files, "--check"]) == 1
    assert path.read_text() == f"before\n\n{guide.BEGIN}\n\nafter\n"
    assert guide.main(files) == 0
    assert "Nothing is measured yet" in path.read_text()
    assert guide.main([*files, "--check"]) == 0
    rows.append(kernels_csv, rows.KERNELS, kernel_row(run="old", ms_p50=77.0, ms_p80=78.0))
    rows.append(kernels_csv, rows.KERNELS, kernel_row())
    rows.append(kernels_csv, rows.KERNELS, kernel_row(impl="fa2", ms_p50=3.0))
    assert guide.main([*files, "--check"]) == 1
    assert guide.main(files) == 0 and guide.main([*files, "--check"]) == 0
    text = path.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert text.count(guide.BEGIN) == text.count(guide.END) == 1
    assert "2.00 (1.00-3.00) | 4 | 1.0e-03" in text and "77" not in text
    assert "triton to be this many times as fast as fa2: fwd 1.50." in text
    assert "not current" in capsys.readouterr().out


def test_guide_without_the_marker_is_an_error():
    with pytest.raises(ValueError, match="results"):
        guide.updated("no marker", "part")


def test_guide_shows_rings():
    found = [ring_row(), ring_row(impl="upstream-fa3", ms_p50=4.0, share_of_kernel=None)]
    as_read = [{x: rows.text(y) for x, y in row.items()} for row in found]
    text = guide.render([], as_read, "pictures")
    assert "| 2 | 1,64,4/2,16 | bf16 | causal | zigzag | triton |" in text
    assert "2.00 (1.00-3.00) | 4 | 50%" in text and "pictures/ring.svg" in text
    assert "triton to be this many times as fast as upstream-fa3: zigzag fwd_bwd 2.00" in text


def test_guide_shows_packed_rows_apart():
    found = [ring_row(), ring_row(impl="upstream-fa3", ms_p50=4.0)]
    packed_run = {"run": "r2", "share_of_kernel": None}
    found += [ring_row(packing=packing, **packed_run) for packing in ("batch", "one", "stated")]
    found.append(ring_row(packing="stated", impl="upstream-fa3", ms_p50=6.0, run="r2"))
    as_read = [{x: rows.text(y) for x, y in row.items()} for row in found]
    assert "Packed" not in guide.render([], as_read[:2], "pictures")
    batches, _, packed = guide.render([], as_read, "pictures").partition("### Packed")
    assert batches == guide.render([], as_read[:2], "pictures").partition("### How")[0]
    assert "| zigzag one | triton |" in packed and "| zigzag stated | upstream-fa3 |" in packed
    assert "as fast as upstream-fa3: zigzag stated fwd_bwd 3.00." in packed
    # A run with packed rows shows the batch that was timed in turn with them.
    assert "Run r2" in packed and "| zigzag | triton |" in packed and "Run r2" not in batches
    assert "### Rings" not in guide.render([], as_read[2:], "pictures")
    cases = plot.bars(as_read[2:], rows.RING, "fwd_bwd")
    assert [case.split("\n")[1] for case in cases] == [
        *("causal, zigzag, P 2", "causal, zigzag one, P 2", "causal, zigzag stated, P 2")
    ]


def test_the_committed_guide_is_current():
    if guide.END not in guide.GUIDE.read_text(encoding="utf-8"):
        pytest.skip("benchmark/guide.py has not written into the guide yet")
    assert guide.main(["--check"]) == 0


def test_plots_draw_the_rows(tmp_path: Path):
    kernels_csv, ring_csv = tmp_path / "kernels.csv", tmp_path / "ring.csv"
    for impl, state, pass_ in (("triton", 0, "fwd"), ("triton", 1, "fwd"), ("fa2", 0, "bwd")):
        row = kernel_row(impl=impl, state=state, **{"pass": pass_})
        rows.append(kernels_csv, rows.KERNELS, row)
    files = ["--kernels", str(kernels_csv), "--ring", str(ring_csv)]
    assert plot.main([*files, "--to", str(tmp_path / "one")]) == 0
    assert [x.name for x in (tmp_path / "one").iterdir()] == ["kernels.svg"]
    rows.append(ring_csv, rows.RING, ring_row())
    assert plot.main([*files, "--to", str(tmp_path / "one")]) == 0
    assert plot.main([*files, "--to", str(tmp_path / "two"), "--format", "png"]) == 0
    again = (tmp_path / "one" / "kernels.svg").read_bytes()
    assert plot.main([*files, "--to", str(tmp_path / "three")]) == 0
    assert (tmp_path / "three" / "kernels.svg").read_bytes() == again
    assert (tmp_path / "two" / "ring.png").read_bytes().startswith(b"\x89PNG")
    found = rows.read(kernels_csv, rows.KERNELS)
    case = "1,64,4/2,16\ncausal"
    heights = {"triton": 4.0, "triton + state": 4.0}
    assert plot.bars(found, rows.KERNELS, "fwd") == {case: heights}


def test_tables_compare_with_the_rivals():
    found = [kernel_row(), kernel_row(impl="fa2", ms_p50=3.0), kernel_row(rel_err=None, state=True)]
    table = report.kernels_table(found)
    assert table.splitlines()[2].split()[-3:] == ["1.50", "1.50", "1.00e-03"]
    assert "triton + state" in table.splitlines()[4]
    rings = [ring_row(window="8:0"), ring_row(window="8:0", impl="upstream-fa2", ms_p50=5.0)]
    rings.append(ring_row(window="8:0", impl="upstream-fa2", ms_p50=9.0, packing="one"))
    line = report.rings_table(rings).splitlines()[2].split()
    assert line[:5] == ["64", "window", "8:0", "zigzag", "triton"]
    assert line[-2:] == ["50.0%", "2.50"]
