"""Every launch configuration, compiled for its part without a GPU: what it uses and issues.

aot_budget.csv holds what each used when it was last accepted; using more fails. After a change that
is worth it: `python test/test_aot.py` writes the file anew.
"""

import csv
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from aot import Job, Report, compile_all, run_group
from arrivals import early_arrivals, uncaptured_barriers
from ring_flash_attn.kernels.configs import (
    _ROWS,
    DTYPES,
    INTERPRETER,
    PASSES,
    SHARED_MEMORY,
    LaunchConfig,
    launch_config,
)
from ring_flash_attn.kernels.hopper.configs import (
    BACKWARD,
    FORWARD,
    WIDE,
    backward_config,
    forward_config,
)

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not triton.__version__.startswith("3.6."),
    reason=f"the rows were made with Triton 3.6, this is {triton.__version__}",
)


def job(
    arch: int,
    head_dim: int,
    dtype: str,
    pass_: str,
    adds: bool,
    config: LaunchConfig,
    documents: bool = False,
) -> Job:
    return Job(
        pass_,
        arch,
        head_dim,
        dtype,
        config.block_m,
        config.block_n,
        config.num_warps,
        config.num_stages,
        config.tma,
        adds,
        documents,
    )


def rows() -> list[Job]:
    """Every 16-bit row, adding and storing, and the float32 rows of two head dims."""
    return [
        job(arch, head_dim, dtype, pass_, adds, config)
        for (arch, head_dim, dtype, pass_), config in _ROWS.items()
        for adds in (True, False)
        if dtype != "float32" or (adds and head_dim in (64, 256))
    ]


def borrowed() -> list[Job]:
    """What parts without rows of their own, and head dims between the powers of two, run."""
    wanted = [(arch, 128, "bfloat16") for arch in (86, 89, 100, 120)]
    wanted += [
        (86, 256, "bfloat16"),
        (90, 80, "bfloat16"),
        (80, 72, "float16"),
        (90, 192, "bfloat16"),
        (100, 64, "bfloat16"),
        (90, 64, "float32"),
    ]
    return [
        job(*key, pass_, True, launch_config(*key, pass_).config)
        for key in wanted
        for pass_ in PASSES
    ]


def packed() -> list[Job]:
    """What packed documents run where the part has rows of its own, and in 80 and 96 wide heads."""
    return [
        job(arch, head_dim, "bfloat16", pass_, adds, config, documents=True)
        for arch in (80, 90)
        for head_dim in (16, 64, 96, 128, 256)
        for pass_ in PASSES
        for adds in ((True, False) if head_dim == 128 else (True,))
        for config in (launch_config(arch, head_dim, "bfloat16", pass_, documents=True).config,)
    ]


def hopper() -> list[Job]:
    """Every row of the Hopper forward in three of its forms, and what borrows the row of D 128."""
    forms = [
        # head_dim, dtype, adds, documents, one_entry
        *((head_dim, "bfloat16", True, False, True) for head_dim in FORWARD),
        *((head_dim, "bfloat16", False, False, True) for head_dim in FORWARD),
        *((head_dim, "bfloat16", True, True, False) for head_dim in FORWARD),
        (128, "float16", False, True, True),
        (80, "bfloat16", True, False, False),
    ]
    jobs = []
    for head_dim, dtype, adds, documents, one_entry in forms:
        config = forward_config(head_dim)
        assert config is not None
        tile = config.block_m, config.block_n, 4, config.k_stages
        jobs.append(
            Job("forward", 90, head_dim, dtype, *tile, True, adds, documents, one_entry=one_entry)
        )
    return jobs


CHOSEN = {"dq_stages": 1}, {"heads_apart": 1}, {"dq_stages": 1, "heads_apart": 1}


def hopper_backward() -> list[Job]:
    """Every row of the Hopper backward in two of its forms, and what borrows the rows.

    A row that is changed for some steps (backends/hopper_choice.py) is compiled in every way.
    """
    fused, wide = ("backward",), ("wide-dq", "wide-dkv")
    forms = [
        # passes, head_dim, dtype, adds, documents
        *((fused, head_dim, "bfloat16", False, False) for head_dim in BACKWARD),
        *((fused, head_dim, "bfloat16", True, True) for head_dim in BACKWARD),
        (fused, 128, "float16", True, False),
        (fused, 80, "bfloat16", False, True),
        (fused, 40, "float16", True, False),
        *((wide, head_dim, "bfloat16", False, False) for head_dim in WIDE),
        *((wide, head_dim, "bfloat16", True, True) for head_dim in WIDE),
        (wide, 160, "float16", True, False),
    ]
    jobs = []
    for passes, head_dim, dtype, adds, documents in forms:
        config = backward_config(head_dim)
        assert config is not None
        tile = getattr(config, "block_m", 128), config.key_rows, 4, 2
        jobs += [Job(name, 90, head_dim, dtype, *tile, True, adds, documents) for name in passes]
        if getattr(config, "one_dq_stage", False):
            whole = jobs[-1]
            jobs += [replace(whole, changes=tuple(x.items())) for x in CHOSEN]
    several = [x for x in jobs if x.documents and x.pass_ != "wide-dq" and x.head_dim != 80]
    jobs += [replace(x, adds=False, merged=True) for x in several]
    return jobs


def every_job() -> list[Job]:
    return rows() + borrowed() + packed() + hopper() + hopper_backward()


TENSOR_CORES = {80: "mma_sync", 86: "mma_sync", 90: "wgmma", 100: "tcgen05"}


@cache
def reports() -> dict[Job, Report]:
    jobs = every_job()
    return dict(zip(jobs, compile_all(jobs), strict=True))


def shared_memory(arch: int) -> int:
    return SHARED_MEMORY.get(arch, 101376)


BUDGET = Path(__file__).with_name("aot_budget.csv")
BUDGETED = ("registers", "spills", "shared")


@cache
def budget() -> dict[str, dict[str, int]]:
    with BUDGET.open(newline="") as file:
        return {
            row["kernel"]: {name: int(row[name]) for name in BUDGETED}
            for row in csv.DictReader(file)
        }


@pytest.mark.parametrize("job", every_job(), ids=str)
def test_uses_no_more_than_its_budget(job: Job):
    report, allowed = reports()[job], budget()[str(job)]
    for name in BUDGETED:
        assert getattr(report, name) <= allowed[name], name


def test_every_budget_is_of_a_kernel_that_is_compiled():
    assert set(budget()) == {str(job) for job in every_job()}


@pytest.mark.parametrize("job", rows(), ids=str)
def test_rows(job: Job):
    report = reports()[job]
    assert not report.error
    assert report.spills <= _ROWS[job.arch, job.head_dim, job.dtype, job.pass_].spills
    assert not report.serialized
    assert report.shared <= shared_memory(job.arch)
    if job.dtype != "float32":
        assert getattr(report, TENSOR_CORES[job.arch])
    assert bool(report.tma_loads) == job.tma == (job.arch >= 90 and job.dtype != "float32")


@pytest.mark.parametrize("job", borrowed() + packed(), ids=str)
def test_borrowed_rows(job: Job):
    report = reports()[job]
    assert not report.error
    assert not (job.documents and report.spills)
    assert not report.serialized
    assert report.shared <= shared_memory(job.arch)


@pytest.mark.parametrize("job", hopper(), ids=str)
def test_hopper_rows(job: Job):
    report, config = reports()[job], forward_config(job.head_dim)
    assert not report.error
    assert config is not None and not report.spills
    assert not report.serialized
    assert report.shared <= shared_memory(job.arch)
    assert report.registers == config.registers[0]
    assert report.wgmma and report.tma_loads and not report.mma_sync
    assert not report.early and not report.uncaptured


@pytest.mark.parametrize("job", hopper_backward(), ids=str)
def test_hopper_backward_rows(job: Job):
    report, config = reports()[job], backward_config(job.head_dim)
    assert not report.error
    assert config is not None and report.spills <= config.spills
    assert not report.serialized
    assert report.shared <= shared_memory(job.arch)
    assert report.registers == config.registers[0]
    assert report.wgmma and report.tma_loads and not report.mma_sync
    assert bool(report.tma_adds) == (job.pass_ == "backward")
    assert not report.early and not report.uncaptured


def test_a_barrier_that_no_other_partition_uses_is_found():
    lines = [
        "%full = ttg.local_alloc : () -> !ttg.memdesc<2x1xi64, #shared, #smem, mutable> loc(#l)",
        "%buffers = ttg.local_alloc : () -> !ttg.memdesc<4x64xf32, #shared, #smem, mutable>",
        "%full_1 = ttg.memdesc_index %full[%c0] : !ttg.memdesc<2x1xi64> -> !ttg.memdesc<1xi64>",
        "ttng.init_barrier %full_1, 2 : !ttg.memdesc<1xi64, #shared, #smem, mutable>",
        "ttng.wait_barrier %full_1, %phase",
    ]
    for end in ("ttg.warp_specialize(%buffers)", "ttg.warp_specialize() {", "tt.return %full"):
        assert uncaptured_barriers("\n".join([*lines, end])) == ("%full",)
    assert not uncaptured_barriers("\n".join([*lines, "ttg.warp_specialize(%buffers, %full)"]))


MEETS, ARRIVES = "\tbar.sync \t2, 128;", "\t@%p1 mbarrier.arrive.shared::cta.b64 _, [%r1];"


@pytest.mark.parametrize(
    ("between", "early"),
    [
        ("\tadd.s32 \t%r1, %r2, 8;", False),
        ("\tld.shared.v4.b32 \t{%r3, %r4, %r5, %r6}, [%r7];", True),
        ("\tst.shared.b32 \t[%r7], %r3;", True),
        ("\twgmma.wait_group.sync.aligned 0;", True),
        ("\t@!P1 bra.uni waitLoop;", True),
        ("$L__BB0_7:", True),
        ("\tbar.arrive %r1, 288;", True),
    ],
)
def test_an_arrival_before_all_have_met_is_found(between: str, early: bool):
    ptx = "\n".join(["\tst.shared.b32 \t[%r7], %r3;", MEETS, between, ARRIVES])
    assert early_arrivals(ptx) == ((between.strip(),) if early else ())


def test_registers_of_the_hopper_kernels_are_what_a_multiprocessor_has():
    both = [(config, config.consumers) for config in FORWARD.values()]
    both += [(config, 2) for config in (*BACKWARD.values(), *WIDE.values())]
    for config, consumers in both:
        at_launch, consumer, others = config.registers
        warpgroups = consumers + 1
        assert at_launch * warpgroups * 128 <= 65536
        # More than was launched with would wait for registers that nobody gives back.
        assert consumers * consumer + others <= at_launch * warpgroups


def test_every_pass_head_dim_and_dtype_has_a_row():
    for arch in (80, 86, 89, 90, 100, 103, 120, INTERPRETER):
        for head_dim in (8, 16, 40, 64, 96, 128, 200, 256):
            for dtype in DTYPES:
                for pass_ in PASSES:
                    assert launch_config(arch, head_dim, dtype, pass_).config.num_warps


def test_float16_has_the_rows_of_bfloat16():
    for pass_ in PASSES:
        half, brain = (launch_config(90, 128, dtype, pass_) for dtype in ("float16", "bfloat16"))
        assert half == brain


@pytest.mark.parametrize(
    ("arch", "row_arch", "says"),
    [
        (80, 80, ""),
        (90, 90, ""),
        (86, 80, "99 KiB"),
        (89, 80, "99 KiB"),
        (100, 100, ""),
        (103, 100, "never timed"),
    ],
)
def test_a_borrowed_row_says_why(arch: int, row_arch: int, says: str):
    choice = launch_config(arch, 128, "bfloat16", "forward")
    assert choice.arch == row_arch
    assert says in choice.reason and bool(choice.reason) == bool(says)


def test_parts_before_sm80_have_no_rows():
    with pytest.raises(ValueError, match="sm_75"):
        launch_config(75, 128, "bfloat16", "forward")


def test_small_kernels_compile():
    command = [sys.executable, str(Path(__file__).with_name("aot_small.py"))]
    status, output, errors = run_group(command, "", 300.0)
    assert status == 0 and output == "done\n", output + errors


def write_budget() -> None:
    with BUDGET.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("kernel", *BUDGETED))
        for job, report in reports().items():
            writer.writerow((job, *(getattr(report, name) for name in BUDGETED)))


if __name__ == "__main__":
    write_budget()
