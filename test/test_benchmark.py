"""The benchmarks: what they write, and the formulas behind it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import oracle

FOLDER = Path(__file__).resolve().parent.parent / "benchmark"
sys.path.append(str(FOLDER))

import benchmark_comparison  # noqa: E402
import benchmark_kernels  # noqa: E402
import kernels  # noqa: E402
import packing  # noqa: E402
import rows  # noqa: E402
import timing  # noqa: E402

from ring_flash_attn.core.attention import Attention  # noqa: E402

ON_GPU = torch.cuda.is_available()
# Triton 3.6's interpreter reads loop bounds so.
loop_bounds = "ignore:Conversion of an array with ndim > 0:DeprecationWarning"
interpreted = pytest.mark.filterwarnings(loop_bounds)


def compare(path: Path, *given: str, ranks: int = 2) -> tuple[str, list[dict[str, str]]]:
    """Run the comparison, small; return what it printed and the rows it wrote."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={ranks}"]
    command += [str(FOLDER / "benchmark_comparison.py"), "--csv", str(path), "--run-id", "r1"]
    command += ["--tree", "t1", "--commit", "c1", "--local-lengths", "16", "--repeats", "2"]
    command += ["--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--allow-shared-gpus"]
    command += given
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout, rows.read(path, rows.RING)


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> tuple[str, list[dict[str, str]]]:
    path = tmp_path_factory.mktemp("comparison") / "ring.csv"
    implementations = "triton", "native-aten", "upstream-fa2"
    return compare(path, "--layouts", "zigzag", "--implementations", *implementations)


@pytest.fixture(scope="module")
def compared_packed(tmp_path_factory) -> tuple[str, list[dict[str, str]]]:
    path = tmp_path_factory.mktemp("packed") / "ring.csv"
    packings = "batch", "one", "stated"
    given = "--packed", *packings, "--implementations", "native-aten", "upstream-fa2"
    return compare(path, *given, "--queued", "2")


def test_comparison_writes_a_row_for_each_implementation_and_pass(compared):
    _, found = compared
    pairs = {(row["impl"], row["pass"]) for row in found}
    wanted = {(impl, x) for impl in ("triton", "native-aten") for x in ("fwd", "fwd_bwd")}
    assert wanted <= pairs and (ON_GPU or wanted == pairs)
    assert len(found) == len(pairs)
    for row in found:
        constant = ("run", "tree", "commit", "world_size", "layout", "exchange", "packing")
        assert [row[x] for x in constant] == ["r1", "t1", "c1", "2", "zigzag", "ring", "batch"]
        mask = [row[x] for x in ("causal", "window", "graph", "dtype")]
        assert mask == ["1", "-1:-1", "0", "bf16"]
        assert (row["gpu"] == "cpu") != ON_GPU
        assert (row["peak_gib"] == "") != ON_GPU


def test_comparison_takes_eight_ranks(tmp_path):
    given = "--layouts", "zigzag", "--implementations", "native-aten", "--no-errors"
    _, found = compare(tmp_path / "ring.csv", *given, ranks=8)
    assert {(row["world_size"], row["pass"]) for row in found} == {("8", "fwd"), ("8", "fwd_bwd")}


def test_comparison_writes_sane_values(compared):
    for row in compared[1]:
        p20, p50, p80 = (float(row[x]) for x in ("ms_p20", "ms_p50", "ms_p80"))
        assert 0 < p20 <= p50 <= p80
        work = 4 * 4 * 16 * 32 * 32 / 2 / 2 * (1.0 if row["pass"] == "fwd" else 3.5)
        assert float(row["tflops_per_gpu"]) == pytest.approx(work / p50 / 1e9, rel=1e-4)
        assert 0 < float(row["share_of_kernel"]) < 100
        errors = [row[x] for x in ("err_out", "err_dq", "err_dk", "err_dv")]
        assert (errors[1:] == [""] * 3) == (row["pass"] == "fwd")
        # bfloat16 rounds to 2e-3; the ring's own errors would be far larger.
        assert all(1e-4 < float(x) < 6e-3 for x in errors if x)


def test_comparison_says_what_it_skips_and_where_it_runs(compared):
    printed = compared[0]
    for word in ("local length 16 causal zigzag", "one GPU", "TFLOP/s/GPU", "of kernel", "p80"):
        assert word in printed
    if not ON_GPU:
        assert "no GPU" in printed
        assert "skipped upstream-fa2: runs on cuda, got cpu" in printed


def test_packed_comparison_writes_every_layout_and_packing(compared_packed):
    found = [row for row in compared_packed[1] if row["impl"] == "native-aten"]
    layouts = ("contiguous", "zigzag", "stripe", "llama3")
    cases = {("zigzag", "batch"), *((x, y) for x in layouts for y in ("one", "stated"))}
    passes = [(x, queued) for x in ("fwd", "fwd_bwd") for queued in ("0", "2")]
    wanted = {(*case, *pass_) for case in cases for pass_ in passes}
    got = [(row["layout"], row["packing"], row["pass"], row["queued"]) for row in found]
    assert len(got) == len(wanted) and set(got) == wanted
    for row in found:
        assert row["exchange"] == ("gather" if row["layout"] == "llama3" else "ring")
        assert [row[x] for x in ("batch", "local_len", "world_size")] == ["1", "16", "2"]
        assert (row["share_of_kernel"] == "") == (row["packing"] == "stated")


def test_packed_comparison_writes_sane_values(compared_packed):
    lengths = packing.stated(16, 2)
    assert len(lengths) > 1 and sum(lengths) == 32
    for row in compared_packed[1]:
        squares = sum(n * n for n in lengths) if row["packing"] == "stated" else 32 * 32
        work = 4 * 4 * 16 * squares / 2 / 2 * (1.0 if row["pass"] == "fwd" else 3.5)
        speed = work / float(row["ms_p50"]) / 1e9
        assert float(row["tflops_per_gpu"]) == pytest.approx(speed, rel=1e-4)
        errors = [row[x] for x in ("err_out", "err_dq", "err_dk", "err_dv")]
        assert (errors[1:] == [""] * 3) == (row["pass"] == "fwd")
        # A row that saw another document would be wrong by far more than bfloat16 rounds.
        assert all(1e-4 < float(x) < 6e-3 for x in errors if x)


def test_packed_comparison_says_what_upstream_lacks(compared_packed):
    printed = compared_packed[0]
    assert "local length 16 causal zigzag batch one stated" in printed
    assert "skipped upstream-fa2 one stripe: ring-flash-attn 0.1.8 has no packed" in printed
    if not ON_GPU:
        assert "skipped upstream-fa2 stated llama3: runs on cuda, got cpu" in printed


@pytest.mark.parametrize(
    "given, said",
    [
        (["--layouts", "llama3"], "llama3 needs --packed"),
        (["--packed", "one", "--batch", "2"], "--batch must be 1"),
        (["--packed", "stated", "--layouts", "stripe", "--local-lengths", "3"], "even ones"),
        (["--packed", "batch", "one", "--layouts", "llama3"], "--layouts needs zigzag"),
        (["--packed", "one", "--kv-heads", "2", "--heads-k-stride", "3"], "2 key heads, got 3"),
        (["--heads-k-stride", "2"], "--heads-k-stride needs --packed"),
        (["--queued", "-1"], "--queued must be at least 0, got -1"),
    ],
)
def test_options_that_do_not_go_together_are_errors(given: list[str], said: str, capsys):
    with pytest.raises(SystemExit):
        benchmark_comparison.parse(given)
    assert said in capsys.readouterr().err


@pytest.mark.skipif(ON_GPU, reason="there is a GPU")
def test_kernels_say_that_they_need_a_gpu(capsys):
    assert benchmark_kernels.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().out


@interpreted
@pytest.mark.kernel
@pytest.mark.parametrize("window", [(-1, -1), (9, 0)], ids=["causal", "window"])
def test_timed_kernels_compute_attention(window: tuple[int, int]):
    attention = Attention(0.25, True, window)
    inputs = kernels.draw(1, 40, 2, 1, 16, torch.bfloat16, attention)
    want = kernels.truth(inputs)
    seen = oracle.visible(range(40), range(40), True, window, inputs.q.device)
    dense = oracle.dense_in_dtype(*inputs[:3], seen, inputs.dout)
    found = [*kernels.kernels("triton", inputs), *kernels.kernels("fa2", inputs)]
    assert [kernel[:3] for kernel in found] == [
        *(("triton", x, state) for x in ("fwd", "bwd") for state in (False, True)),
        *(("fa2", x, False) for x in ("fwd", "bwd")),
    ]
    for kernel in found:
        yardstick = (dense.out,) if kernel.pass_ == "fwd" else (dense.dq, dense.dk, dense.dv)
        kernel.run()  # a call before it must not change the result
        error = kernels.relative_error(kernel.result(), want)
        assert error <= 2 * kernels.relative_error(yardstick, want) + 1e-5, kernel[:3]


@pytest.mark.parametrize("length", [1, 7, 24])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [(-1, -1), (5, -1), (5, 0), (0, 3), (-1, 2), (40, 40)])
def test_flops_count_the_pairs_that_the_mask_shows(length, causal, window):
    pairs = int(oracle.visible(range(length), range(length), causal, window).sum())
    if causal and window[0] < 0:
        pairs = length**2 / 2  # by convention, not n (n + 1) / 2
    forward = 4 * 2 * 3 * 8 * pairs
    for pass_, factor in (("fwd", 1), ("bwd", 2.5), ("fwd_bwd", 3.5)):
        assert timing.flops(2, length, 3, 8, causal, window, pass_) == forward * factor


LONG = (6624, 10736, 2432, 4416, 1792, 11952, 6704, 128, 8208, 144, 4416, 304, 4080)
STATED = {
    1: (2814, 474, 156, 138, 4610),
    2: (2816, 472, 156, 140, 6620, 6180),
    4: (2816, 472, 160, 136, 6624, 10728, 2432, 4408, 1792, 3200),
    8: (2816, 480, 160, 144, *LONG),
}


@pytest.mark.parametrize("world_size", STATED)
def test_the_stated_packing_is_what_is_stated(world_size: int):
    assert packing.stated(8192, world_size) == STATED[world_size]
    found = packing.pack("stated", 8192, world_size)
    assert found.cu_seqlens[:2] == (0, STATED[world_size][0])
    assert found.cu_seqlens[-1] == 8192 * world_size
    assert packing.pack("one", 8192, world_size).lengths == (8192 * world_size,)


@pytest.mark.parametrize("local_len", [2, 16, 250, 2048, 40000])
def test_the_stated_packing_fills_any_even_length(local_len: int):
    lengths = packing.stated(local_len, 4)
    assert sum(lengths) == 4 * local_len
    assert all(n > 0 and n % 8 == 0 for n in lengths)
    assert len(lengths) > 1 or local_len == 2
    with pytest.raises(ValueError, match="even"):
        packing.stated(local_len + 1, 4)


def test_flops_of_documents_count_their_own_pairs():
    documents = packing.Packing("stated", (4, 8))
    area = {
        (True, (-1, -1)): 4 * 4 / 2 + 8 * 8 / 2,
        (False, (-1, -1)): 16 + 64,
        (True, (1, 0)): (1 + 2 + 2 + 2) + (1 + 2 * 7),
    }
    for mask, pairs in area.items():
        for pass_, factor in (("fwd", 1), ("bwd", 2.5), ("fwd_bwd", 3.5)):
            assert documents.flops(1, 3, 16, *mask, pass_) == 4 * 3 * 16 * pairs * factor
    one = packing.pack("one", 8, 2).flops(1, 3, 16, True, (-1, -1), "fwd")
    assert one == timing.flops(1, 16, 3, 16, True, (-1, -1), "fwd")


@pytest.mark.parametrize("n", [1, 2, 3, 8, 15])
def test_quantiles_interpolate(n: int):
    times = torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    want = torch.quantile(times, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    assert timing.quantiles(times.tolist()) == pytest.approx(want.tolist())


def test_runs_are_timed_in_turn_and_backwards_every_other_round():
    called = []
    runs = {name: lambda name=name: called.append(name) for name in "abc"}
    times = timing.interleaved(runs, 3, lambda run: [run() or 1.0] * 3)
    assert called == list("abccbaabc")
    assert times == {name: [1.0] * 9 for name in "abc"}
