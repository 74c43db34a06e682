"""Tuning the launch tables: what is tried, what a state file keeps, the verdict, the rewriting."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import oracle

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmark"))

import kernels
import launch_search
import launch_table
import timing
import tune
import tune_search
from candidates import KERNELS, Candidate, grid, jobs, parsed, target
from launch_search import Compiled
from tree_hash import tree_hash
from tune_state import Case, State, ranked, read, verdict

from aot import Report
from ring_flash_attn.core.attention import Attention
from ring_flash_attn.kernels import configs
from ring_flash_attn.kernels.configs import LaunchConfig
from ring_flash_attn.kernels.hopper import configs as hopper_configs

ON_GPU = torch.cuda.is_available()
# Triton 3.6's interpreter reads loop bounds so.
loop_bounds = "ignore:Conversion of an array with ndim > 0:DeprecationWarning"
TARGETS = [
    *((kernel, head_dim, 90) for kernel in KERNELS for head_dim in (64, 128, 256)),
    *((kernel, 128, arch) for kernel in configs.PASSES for arch in (80, 86, 100)),
]
ORIGIN = {"gpu": "NVIDIA H100 80GB HBM3", "tree": "t1", "torch": "2.0", "triton": "3.6"}
SHORT = Case("1,40,2/1", "causal", False)
CASE = Case(tune.SHAPE, "causal", False)


@pytest.mark.parametrize(("kernel", "head_dim", "arch"), TARGETS)
def test_grids_begin_with_the_checked_in_row(kernel: str, head_dim: int, arch: int):
    of = target(kernel, head_dim, arch)
    found = grid(of)
    assert found[0] == of.row and len(found) > 2
    assert len({x.text for x in found}) == len(found)
    for candidate in found:
        assert parsed(of, [candidate.text])[-1].text == candidate.text
        assert getattr(candidate.config, "tma", True) == (arch >= 90)


@pytest.mark.parametrize(("kernel", "head_dim", "arch"), TARGETS)
def test_what_is_compiled_of_a_row_has_a_budget(kernel: str, head_dim: int, arch: int):
    budget = Path(__file__).with_name("aot_budget.csv").read_text()
    of = target(kernel, head_dim, arch)
    assert all(f"{job}," in budget for job in jobs(of, of.row) if arch == 90)


def test_rows_that_are_not_there_are_errors():
    for kernel, head_dim, arch in (("hopper-forward", 32, 90), ("hopper-backward", 128, 100)):
        with pytest.raises(ValueError, match=r"32|sm_100"):
            target(kernel, head_dim, arch)


def test_configurations_change_the_row_in_the_fields_they_name():
    of = target("dkv", 128, 90)
    row = of.row.config
    found = parsed(of, ["# no", "dkv:block_m=32/64,num_stages=2  # two", "dq:tma=0", ""])
    cleared = replace(row, tflops=None, gpu=None, date=None, num_stages=2)
    assert found == [of.row, *(Candidate("dkv", replace(cleared, block_m=x)) for x in (32, 64))]
    wide = target("hopper-backward", 256, 90)
    assert parsed(wide, ["hopper-backward:rotate=1"]) == [wide.row]
    for line in ("fwd:tma=1", "dq:tma", "dq:consumers=2", "dq:block_m=a"):
        with pytest.raises(ValueError, match="configuration: got"):
            parsed(of, [line])


@pytest.mark.filterwarnings(loop_bounds)
@pytest.mark.kernel
@pytest.mark.parametrize("kernel", KERNELS)
def test_candidates_compute_attention(kernel: str):
    """Where the part has no Hopper kernels, the portable ones run in their place."""
    inputs = kernels.draw(1, 40, 2, 1, 64, torch.bfloat16, Attention(0.125, True))
    row = target(kernel, 64, 90).row
    if isinstance(row.config, LaunchConfig):
        row = Candidate(kernel, LaunchConfig(16, 32, 4, 1))
    got, want = launch_search.launch(row, inputs, False).once(), kernels.truth(inputs)
    wanted = {"dq": (want.dq,), "dkv": (want.dk, want.dv)}
    wanted["hopper-backward"] = want.dq, want.dk, want.dv
    for x, y in zip(got, wanted.get(kernel, (want.out,)), strict=True):
        assert oracle.errors(x, y).relative < 6e-3  # bfloat16 rounds to 2e-3


@pytest.mark.parametrize(
    ("reports", "says"),
    [
        ([Report(spills=8, shared=100), Report(spills=4, shared=200)], ""),
        ([Report(), Report(error="OutOfResources: x\nmore")], "does not compile: OutOfResources"),
        ([Report(spills=9)], "spills 9 bytes, the row 8"),
        ([Report(shared=232449)], "232449 bytes of shared memory, there are 232448"),
        ([Report(serialized=("C7510",))], "1 serialized"),
    ],
)
def test_candidates_that_the_compiler_speaks_against_are_out(reports: list[Report], says: str):
    why = launch_search.judged(90, reports).against(Compiled("", 8))
    assert (says in why) if says else not why


def test_what_breaks_or_hangs_is_out():
    python = [sys.executable, "-c"]
    assert launch_search.run_apart([*python, "print(1)"], 60) == ""
    assert "ValueError: x" in launch_search.run_apart([*python, "raise ValueError('x')"], 60)
    hangs = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while 1: pass'])"
    assert "within 0.5 s" in launch_search.run_apart([*python, hangs], 0.5)


@pytest.fixture
def timers(monkeypatch):
    """Let candidates be timed on the CPU: each call takes 1 ms, with block_m 16 half of it."""
    calls = []

    def spans(run, repeats, flush):
        run(lambda: None, lambda: None)
        calls.append(run.config)
        return [0.5 if run.config.block_m == 16 else 1.0] * repeats

    def launch(candidate, inputs, folds):
        made = real(candidate, inputs, folds)

        def run(begin, end):
            made.run(begin, end)
            if candidate.config.num_warps == 2:
                made.result[0].mul_(1.1)

        run.config = candidate.config
        return launch_search.Launch(run, made.result)

    real = launch_search.launch
    monkeypatch.setattr(launch_search, "launch", launch)
    monkeypatch.setattr(timing, "queued_spans", spans)
    monkeypatch.setattr(timing, "flush_buffer", lambda: torch.empty(0))
    monkeypatch.setattr(
        tune_search, "compile_ahead", lambda of, x, _: Compiled("", 8 * (x.config.block_n == 64))
    )
    return calls


@pytest.mark.filterwarnings(loop_bounds)
@pytest.mark.kernel
@pytest.mark.skipif(ON_GPU, reason="the row under test is the interpreter's")
def test_a_search_goes_on_where_it_stopped(timers, tmp_path: Path):
    of = target("forward", 16, 90)
    of = of._replace(row=Candidate("forward", LaunchConfig(32, 16, 4, 1)))
    found = parsed(of, ["forward:block_m=16", "forward:num_warps=2", "forward:block_n=64/32"])
    run = "import sys; sys.exit('block_n=32' in sys.argv[-1] and 'it crashed')"
    how = tune_search.Options(1, 1, 60.0, 1e12, True, [sys.executable, "-c", run])
    path = tmp_path / "state.jsonl"
    over = how._replace(deadline=0.0)
    assert not tune_search.search(of, found, [SHORT], State(path, ORIGIN), over)
    assert not timers and [x["candidate"] for x in read(path)] == [of.row.text]
    assert tune_search.search(of, found[:2], [SHORT], State(path, ORIGIN), how)
    timed = len(timers)
    with path.open("a") as file:
        file.write('{"cut sho')
    assert tune_search.search(of, found, [SHORT], State(path, ORIGIN), how)
    assert len(timers) > timed and found[1].config not in timers[timed:]
    assert not {found[3].config, found[4].config} & {*timers}  # spills, crashes
    timed, lines = len(timers), path.read_text()
    state = State(path, ORIGIN)
    assert tune_search.search(of, found, [SHORT], state, how)
    assert len(timers) == timed and path.read_text() == lines
    assert "differs from the row's result" in state.dropped(of)[found[2].text]
    assert state.dropped(of)[found[4].text] == "does not run: it crashed"
    (best,) = ranked(state, of, [SHORT], final=True)
    assert (best.candidate, best.gain, best.better) == (found[1].text, 2.0, True)
    # Another GPU, another tree and another row are another search.
    for name in ("gpu", "tree", "triton"):
        assert not State(path, {**ORIGIN, name: "other"}).timed(of, SHORT)
    assert not state.timed(of._replace(row=found[1]), SHORT)


@pytest.mark.parametrize(
    ("ms", "row_ms", "better"),
    [
        ([(0.9, 0.91, 0.92)], [(0.99, 1.0, 1.01)], True),
        ([(0.99, 1.0, 1.01)], [(0.99, 1.0, 1.01)], False),  # p20 is below the row's median
        ([(0.97, 0.98, 1.02)], [(0.99, 1.0, 1.01)], False),
        ([(0.9, 0.995, 0.999)], [(0.99, 1.0, 1.01)], False),
        # Faster in the mean, slower in one case.
        ([(0.5, 0.5, 0.5), (1.1, 1.1, 1.1)], [(1.0, 1.0, 1.0)] * 2, False),
        ([(0.5, 0.5, 0.5), (1.0, 1.0, 1.0)], [(0.9, 1.0, 1.1)] * 2, True),
    ],
)
def test_a_row_is_beaten_by_more_than_the_spread(ms, row_ms, better: bool):
    cases = [CASE, CASE._replace(mask="full")]
    records = {
        case: {"ms": x, "row_ms": y, "tflops": 1.0}
        for case, x, y in zip(cases, ms, row_ms, strict=False)
    }
    assert verdict("x", records).better == better


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """A state file in which dq of D 64 is beaten and the Hopper forward of D 128 is not."""
    path = tmp_path / "state.jsonl"
    origin = {**ORIGIN, "tree": tree_hash(), "arch": 90, "date": "2026-12-01"}
    state = State(path, origin)
    for kernel, head_dim, ms in (("dq", 64, 0.8), ("hopper-forward", 128, 1.0)):
        of = target(kernel, head_dim, 90)
        other = grid(of)[1].text
        key = {"kernel": kernel, "head_dim": head_dim, "candidate": other}
        state.add(**key, **Compiled("")._asdict())
        for mask in ("full", "causal"):
            record = {**key, "case": str(CASE._replace(mask=mask)), "row": of.row.text}
            times = {"ms": (ms, ms, ms), "row_ms": (0.9, 1.0, 1.1), "tflops": 500.4}
            state.add(**record, **times, final=True)
    return path


def test_check_fails_where_a_row_is_beaten(measured: Path, capsys):
    given = ["--offline", "--check", "--state", str(measured)]
    assert tune.main([*given, "--kernels", "dq", "--head-dims", "64"]) == 1
    printed = capsys.readouterr().out
    assert "dq D 64: BEATEN" in printed and "1/1.250 of its time" in printed
    assert tune.main([*given, "--kernels", "hopper-forward"]) == 0
    printed = capsys.readouterr().out
    assert "within the spread" in printed and "not measured: hopper-forward D 64" in printed


def test_what_another_tree_measured_says_nothing(measured: Path):
    measured.write_text(measured.read_text().replace(tree_hash(), "other"))
    with pytest.raises(ValueError, match="no measurement of this tree"):
        tune.main(["--offline", "--check", "--state", str(measured)])


def test_write_puts_the_winner_in_its_place(measured: Path, tmp_path: Path, monkeypatch):
    files = {}
    for module in (configs, hopper_configs):
        path = files[module] = tmp_path / module.__name__
        path.write_text(Path(module.__file__).read_text())
    monkeypatch.setattr(
        launch_table,
        "file_of",
        lambda x: files[configs if isinstance(x, LaunchConfig) else hopper_configs],
    )
    assert tune.main(["--offline", "--write", "--state", str(measured), "--head-dims", "64"]) == 0
    best = grid(target("dq", 64, 90))[1].config
    want = replace(best, tflops=500, gpu="H100", date="2026-12-01")
    source = Path(configs.__file__).read_text()
    key = 90, 64, "bfloat16", "dq"
    assert files[configs].read_text() == launch_table.rewritten(source, key, want) != source
    assert files[hopper_configs].read_text() == Path(hopper_configs.__file__).read_text()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--offline"], "needs --state"),
        (["--write", "--masks", "full"], "causal speed"),
        (["--write", "--shape", "1,64,2"], "causal speed"),
        (["--write", "--folds"], "leave --folds"),
    ],
)
def test_options_that_do_not_go_together_are_errors(given: list[str], said: str, capsys):
    with pytest.raises(SystemExit):
        tune.parse(given)
    assert said in capsys.readouterr().err


@pytest.mark.skipif(ON_GPU, reason="there is a GPU")
def test_it_says_that_it_needs_a_gpu(capsys):
    assert tune.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().out


def test_a_search_that_was_cut_short_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(tune, "origin_here", lambda arch: {**ORIGIN, "arch": arch})
    searched = []
    monkeypatch.setattr(tune_search, "search", lambda of, *_: bool(searched.append(of.name)))
    assert tune.main(["--head-dims", "64", "--kernels", "dq", "hopper-forward", "--check"]) == 3
    assert searched == ["dq D 64", "hopper-forward D 64"]
    assert "not finished" in capsys.readouterr().out


def test_a_dry_run_compiles_and_says_what_does_not_fit(tmp_path: Path, capsys):
    path = tmp_path / "state.jsonl"
    given = ["--dry-run", "--arch", "90", "--kernels", "dq", "--head-dims", "64"]
    given += ["--config", "dq:num_stages=4", "--state", str(path)]
    assert tune.main(given) == 0
    printed, lines = capsys.readouterr().out, path.read_text()
    assert "num_stages=3,tma=1         0     82944  fits" in printed
    assert "spills 8 bytes, the row 0" in printed
    assert {json.loads(x)["candidate"][:3] for x in lines.splitlines()} == {"dq:"}
    assert tune.main(given) == 0 and path.read_text() == lines
