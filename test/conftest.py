"""Runs Triton kernels in the interpreter where there is no GPU, and sees to it that some ran."""

import os
from collections import Counter
from collections.abc import Iterator

import pytest

# Read when torch and numpy are imported; ranks that tests start inherit it. Small tensors gain
# nothing from threads, which wait for each other spinning where other processes run tests beside.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from quick_interpreter import quicken

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    # Read when Triton is imported; ranks that tests start inherit it.
    os.environ["TRITON_INTERPRET"] = "1"

_started: Counter[str] = Counter()
_passed: Counter[str] = Counter()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU through Triton's interpreter."""
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture
def empty_is_nan() -> Iterator[None]:
    """Let torch.empty return NaN, so that every element that nobody writes shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns, unless told not to
    yield
    torch.use_deterministic_algorithms(before)


# Files that take minutes, longest first: they start first, or one of two processes would end up
# waiting for the other's.
LONGEST = (
    "test_hopper_backward_bugs",
    "test_packed_forms",
    "test_packed_triton",
    "test_triton_kernels",
    "test_ring_triton",
    "test_ring_flash_attn_comparison",
    "test_hopper_forward",
    "test_packed",
    "test_copy_engine_triton",
    "test_aot",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: (*LONGEST, item.path.stem).index(item.path.stem))
    for item in items:
        if item.get_closest_marker("gpu") and not ON_GPU:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_collection_finish() -> None:
    if not ON_GPU:
        quicken()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = report.nodeid.split("::")[0].rsplit("/")[-1]
    if report.when == "setup" and ("gpu" in report.keywords or "kernel" in report.keywords):
        _started[name] += 1
    if report.when == "call" and report.passed and "gpu" not in report.keywords:
        _passed[name] += 1


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail a run without a GPU in which a file of GPU tests ran nothing on the CPU."""
    option = session.config.option
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # The process that started it sees all reports.
    if ON_GPU or exitstatus != 0 or option.collectonly or option.markexpr or option.keyword:
        return
    idle = sorted(name for name in _started if not _passed[name])
    if idle:
        print(f"\nno case ran on the CPU in {', '.join(idle)}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
